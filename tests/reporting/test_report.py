"""The page says what the files say, in words that follow the intervals, and needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from npu_qat.reporting import plots, verdict, write_report
from npu_qat.reporting.html import render
from npu_qat.reporting.rundata import read_run
from tests.reporting import fabricated

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags, ids, links and the text inside elements, with a check that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[tuple[list[tuple[str, dict[str, str | None]]], str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.pieces.append((list(self.open), data.strip()))

    def text(self, **wanted: str) -> str:
        """All text inside elements with these attributes (``data_arm="x"`` for data-arm)."""
        pairs = {key.replace("_", "-"): value for key, value in wanted.items()}
        found = [
            text
            for path, text in self.pieces
            if any(pairs.items() <= attributes.items() for _, attributes in path)
        ]
        return " ".join(" ".join(found).split())

    def values(self, attribute: str) -> list[str]:
        return [str(a[attribute]) for _, a in self.tags if attribute in a]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricated.write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def source(run_dir: Path) -> str:
    target = write_report(run_dir)
    assert target == run_dir / "report.html"
    return target.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def fresh(tmp_path: Path, **rates: float) -> Path:
    return fabricated.write_run(tmp_path / "run", {**fabricated.RATES, **rates})


def shown(share: float) -> str:
    return f"{100 * share:.1f}"


# The answer ---------------------------------------------------------------------------------------


def test_the_table_shows_the_numbers_of_evaluations_json(run_dir: Path, page: Page) -> None:
    arms = fabricated.read_json(run_dir / "evaluations.json")["arms"]
    assert page.values("data-arm") == list(fabricated.RATES)
    for name, arm in arms.items():
        row = page.text(data_arm=name)
        for score in ("strict", "flexible"):
            s = arm[score]
            assert f"{shown(s['mean'])} %" in row
            assert f"{shown(s['low'])} – {shown(s['high'])} %" in row
        assert "1,024" in row


def test_rows_say_what_was_trained_and_served_in_what(page: Page) -> None:
    texts = {name: page.text(data_arm=name) for name in fabricated.RATES}
    assert texts["bf16_start"].startswith("BF16 start")
    assert "W4A4 start (PTQ)" in texts["w4a4_ptq"]
    assert "BF16 W4A4" in texts["bf16_lora_served_w4a4"]
    assert "W4A4 W4A4" in texts["w4a4_trained"]


def test_comparisons_show_differences_and_intervals(run_dir: Path, page: Page) -> None:
    rows = fabricated.read_json(run_dir / "evaluations.json")["comparisons"]
    keys = {"w4a4_ptq": "ptq", "bf16_lora_served_w4a4": "served"}
    for row in rows:
        key = f"trained-{keys.get(row['b'], row['b'])}"
        text = page.text(data_comparison=key).replace("−", "-")
        assert f"{100 * row['difference']:+.1f} points" in text
        assert f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f} points" in text
    assert page.values("data-comparison")[0] == "trained-ptq"


def test_the_headline_is_the_gain_with_both_accuracies(run_dir: Path, page: Page) -> None:
    evaluations = fabricated.read_json(run_dir / "evaluations.json")
    gain = next(c for c in evaluations["comparisons"] if c["b"] == "w4a4_ptq")
    answer = page.text(**{"class": "answer good"})
    assert answer.startswith(f"Training in W4A4 gained {shown(gain['difference'])} points.")
    for name in ("w4a4_ptq", "w4a4_trained", "bf16_lora_served_w4a4"):
        assert shown(evaluations["arms"][name]["strict"]["mean"]) in answer
    assert "Audit passed: 3 of 3 checks" in answer


@pytest.mark.parametrize(
    ("trained", "tone", "text"),
    [
        (0.40, "good", "gained"),
        (0.30, "neutral", "made no measurable difference"),
        (0.20, "bad", "lost"),
    ],
)
def test_the_headline_follows_the_interval(
    tmp_path: Path, trained: float, tone: str, text: str
) -> None:
    run = read_run(fresh(tmp_path, w4a4_ptq=0.295, w4a4_trained=trained))
    headline = verdict.headline(run)
    assert (headline.tone, text in headline.text) == (tone, True)
    assert ("not distinguishable from zero" in headline.detail) == (tone == "neutral")
    gain = verdict.comparisons(run)[0]
    assert gain.tone == tone
    assert ("not distinguishable from zero" in gain.words) == (gain.low <= 0 <= gain.high)


def test_a_failed_audit_outranks_a_gain_and_names_the_check(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    audit = fabricated.audit()
    audit["verdict"] = "fail"
    audit["checks"][2] |= {"ok": False, "measured": "0 did"}
    fabricated.write_json(path / "audit.json", audit)
    headline = verdict.headline(read_run(path))
    assert headline.tone == "bad"
    assert "do not use" in headline.text
    assert "noise reaches the norms (expected 27 noisy blocks" in headline.detail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("arms", "w4a4_ptq", "strict", "mean"), r"gives w4a4_ptq a strict accuracy of 0\.9"),
        (("arms", "w4a4_ptq", "flexible", "mean"), r"gives w4a4_ptq a flexible accuracy of 0\.9"),
        (("comparisons", 0, "difference"), r"w4a4_trained minus bf16_start as \+0\.9"),
    ],
)
def test_numbers_that_contradict_each_other_are_reported(
    tmp_path: Path, change: tuple[str | int, ...], message: str
) -> None:
    path = fresh(tmp_path)
    assert read_run(path).contradictions == []
    evaluations = fabricated.read_json(path / "evaluations.json")
    place = evaluations
    for key in change[:-1]:
        place = place[key]
    place[change[-1]] = 0.9
    fabricated.write_json(path / "evaluations.json", evaluations)
    run = read_run(path)
    assert re.search(message, " ".join(run.contradictions))
    assert verdict.headline(run).tone == "bad"


def test_other_modes_are_named_after_their_arms(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    (path / "evaluations.json").write_text(
        (path / "evaluations.json").read_text().replace("w4a4", "w4a16")
    )
    run = read_run(path)
    assert verdict.headline(run).text.startswith("Training in W4A16 gained")
    assert [arm.role for arm in verdict.arms(run)] == list(verdict.ROLE_ORDER[:5])


def test_rounding_never_shows_a_signed_zero() -> None:
    assert verdict.points(-0.0003) == verdict.points(0.0003) == "0.0"
    assert verdict.points(-0.012) == "−1.2"
    assert verdict.points(0.012) == "+1.2"


# What is not there --------------------------------------------------------------------------------


def test_an_empty_directory_gives_a_page_that_names_every_missing_piece(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    text = page.text(**{"class": "box"})
    for name in ("config.yaml", "metrics.jsonl", "audit.json", "evaluations.json", "samples.jsonl"):
        assert name in text
    assert "This run has not been evaluated." in page.text(**{"class": "answer neutral"})
    assert "Not audited" in page.text(**{"class": "answer neutral"})


def test_a_run_directory_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        write_report(tmp_path / "nowhere")


def test_a_run_without_one_side_of_the_comparison_says_which(tmp_path: Path) -> None:
    rates = dict(fabricated.RATES)
    del rates["w4a4_trained"]
    headline = verdict.headline(read_run(fabricated.write_run(tmp_path / "run", rates)))
    assert "no evaluation in W4A4 after training" in headline.detail


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    (path / "audit.json").write_text('{"verdict": "pa')
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"arm": "w4a4", "step": 31, "accur')
    run = read_run(path)
    assert {m.name: m.reason.split(":")[0] for m in run.missing} == {
        "audit.json": "not valid JSON",
        "metrics.jsonl": "1 line cut short or damaged",
    }
    assert [record["step"] for record in run.metrics["w4a4"]] == list(range(1, 31))


def test_supervised_runs_do_not_miss_samples(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    (path / "config.yaml").write_text(fabricated.CONFIG.replace("dapo, steps", "sft, steps"))
    (path / "samples.jsonl").unlink()
    assert read_run(path).missing == []


# Resumed runs -------------------------------------------------------------------------------------


def test_of_a_repeated_step_the_last_record_wins_and_evaluations_are_added(tmp_path: Path) -> None:
    fabricated.write_lines(
        tmp_path / "metrics.jsonl",
        [
            {"arm": "w4a4", "step": 1, "reward_mean": 0.1},
            {"arm": "w4a4", "step": 2, "reward_mean": 0.2},
            {"arm": "bf16_lora", "step": 2, "reward_mean": 0.7},
            {"arm": "w4a4", "step": 2, "reward_mean": 0.3},
            {"arm": "w4a4", "step": 2, "evaluation": {"strict": 0.5}},
        ],
    )
    metrics = read_run(tmp_path).metrics
    assert [r["reward_mean"] for r in metrics["w4a4"]] == [0.1, 0.3]
    assert metrics["w4a4"][1]["evaluation"] == {"strict": 0.5}
    assert [r["reward_mean"] for r in metrics["bf16_lora"]] == [0.7]


def test_samples_of_steps_that_were_made_again_are_superseded(tmp_path: Path) -> None:
    steps = [(1, "a"), (1, "b"), (2, "c"), (3, "d"), (2, "e"), (2, "f"), (3, "g")]
    lines = [{"arm": "w4a4", "step": step, "completion": text} for step, text in steps]
    fabricated.write_lines(tmp_path / "samples.jsonl", lines)
    assert [s["completion"] for s in read_run(tmp_path).samples] == ["a", "b", "e", "f", "g"]


# The page as a file -------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(source: str, page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed"}
    for reference in [*page.values("href"), *page.values("xlink:href"), *page.values("src")]:
        assert reference.startswith("#"), reference
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]+)\)", source))


def test_ids_are_unique_and_every_internal_reference_has_a_target(source: str, page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = [h[1:] for h in page.values("href") + page.values("xlink:href")]
    targets += re.findall(r"url\(#([^)]+)\)", source)
    targets += page.values("aria-labelledby")
    assert set(targets) <= set(ids)


def test_colors_are_css_variables_defined_for_light_and_dark(source: str) -> None:
    light, dark = source.split("prefers-color-scheme: dark", 1)
    dark = dark[: dark.index("* {")]
    assert not re.search(r"#0101[0-9a-f]{2}", source), "a stand-in colour was not replaced"
    for name in {*plots.COLORS, *re.findall(r"var\(--(\w+)\)", source)} - {"c", "row"}:
        assert f"--{name}:" in light, name
        assert name in ("row", "c") or f"--{name}:" in dark, name


def test_every_plot_is_there_with_a_title_and_a_caption(run_dir: Path, page: Page) -> None:
    slugs = ["learning", "by-level", "logp-gap", "noise", "weight-error", "input-error"]
    slugs += ["signal", "lengths", "speed"]
    assert [a["id"] for tag, a in page.tags if tag == "figure"] == slugs
    svgs = [a for tag, a in page.tags if tag == "svg"]
    assert len(svgs) == len(slugs)
    assert all(a["role"] == "img" and a["aria-labelledby"] for a in svgs)
    for slug in slugs:
        assert page.text(id=f"{slug}-title")
    assert "17 norms changed in each" in page.text(id="noise")
    assert "within the limit of 0.05" in page.text(id="logp-gap")
    assert "largest down_proj" in page.text(id="input-error")


def test_a_gap_above_the_limit_is_said_so(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    lines = [{"arm": "w4a4", "step": s, "logp_gap_off_mean": 0.001 * 9**s} for s in (1, 2)]
    fabricated.write_lines(path / "metrics.jsonl", lines)
    figure = plots.logp_gap(read_run(path))
    assert figure is not None
    assert "0.081, ABOVE the limit of 0.05" in figure.caption


def test_plots_without_data_are_left_out(tmp_path: Path) -> None:
    fabricated.write_lines(tmp_path / "metrics.jsonl", [{"arm": "w4a4", "step": 1, "loss": 2.5}])
    figures = plots.all_figures(read_run(tmp_path))
    assert [figure.slug for figure in figures] == ["loss"]
    assert "2.500" in figures[0].caption


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    sample = {"arm": evil, "step": 1, "question": evil, "completion": evil, "strict": False}
    fabricated.write_lines(tmp_path / "samples.jsonl", [sample])
    (tmp_path / "config.yaml").write_text(f"model: {{path: '{evil}'}}")
    source = render(read_run(tmp_path))
    assert "<script" not in source
    assert source.count("&lt;script&gt;") >= 4


def test_adapters_whose_first_gradient_is_zero_are_named(tmp_path: Path) -> None:
    audit = fabricated.audit()
    name = "base_model.model.model.layers.3.self_attn.q_proj.lora_B.default.weight"
    assert audit["first_update_gradients"][name] > 0
    audit["first_update_gradients"][name] = 0.0
    fabricated.write_json(tmp_path / "audit.json", {**audit, "modules": []})
    page = Page(render(read_run(tmp_path)))
    text = " ".join(text for _, text in page.pieces)
    assert "some are exactly zero" in text
    assert "q_proj: 1 with gradient zero" in text
    assert name in text
    assert "lora_A.default" not in text


def test_checks_configuration_and_environment_are_on_the_page(page: Page) -> None:
    text = " ".join(text for _, text in page.pieces)
    for check in fabricated.audit()["checks"]:
        assert check["name"] in text and check["expected"] in text
    assert "sigma_start: 0.05" in text
    assert "versions.python" in text
    assert "FABRICATED answer of w4a4." in text
    assert "rollout 72,000" in text  # 8 layers of a kind with 9000 calls each


def test_an_older_report_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    write_report(tmp_path)
    assert "old" not in (tmp_path / "report.html").read_text(encoding="utf-8")[:10]
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_line_separator_inside_a_completion_breaks_no_record(tmp_path: Path) -> None:
    sample = {"arm": "w4a4", "step": 1, "completion": "a\u2028b"}
    (tmp_path / "samples.jsonl").write_text(
        json.dumps(sample, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    run = read_run(tmp_path)
    assert run.samples == [sample]
    assert not any("samples.jsonl" in str(problem) for problem in run.missing)
