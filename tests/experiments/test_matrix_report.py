"""Reports: what the numbers say, what the checks find, and that pages hold only what files hold."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from npu_qat.evaluation.intervals import across_seeds, paired_difference
from npu_qat.evaluation.significance import paired_t_test
from npu_qat.experiments.matrix import Matrix, cells, load_matrix, matrix_path, shipped_matrices
from npu_qat.experiments.matrix_analysis import Analysis, analyse
from npu_qat.experiments.matrix_pages import answers_page, pages, stale_pages, write_pages
from npu_qat.experiments.matrix_report import as_json, report_files
from npu_qat.experiments.matrix_store import Store, code_digest, unpack_outcomes
from tests.experiments.matrices import TEXT, fill, record, write_matrix

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    return write_matrix(tmp_path)


def analysed(matrix: Matrix, folder: Path, **changes: dict[str, object]) -> Analysis:
    fill(matrix, folder, **changes)
    return analyse(matrix, folder)


def check(found: Analysis, start: str) -> tuple[bool, str]:
    [one] = [c for c in found.checks if c.name.startswith(start)]
    return one.ok, one.detail


def test_rows_have_means_and_intervals_over_seeds(matrix: Matrix, tmp_path: Path) -> None:
    rows = {row.name: row for row in analysed(matrix, tmp_path / "r").rows}
    assert list(rows) == ["start", "bf16", "bf16@w4a4", "plain", "noisy", "late"]
    expected = across_seeds([0.43, 0.45, 0.44])
    mean, low, high, over = rows["plain"].estimate(analyse(matrix, tmp_path / "r").scale) or ()
    assert (mean, low, high, over) == (expected.mean, expected.low, expected.high, "3 seeds")
    scale = analyse(matrix, tmp_path / "r").scale
    assert (rows["start"].estimate(scale) or ())[3] == "problems"
    assert (rows["late"].estimate(scale) or ())[3] == "problems, 1 seed"


def test_questions_are_answered_seed_by_seed(matrix: Matrix, tmp_path: Path) -> None:
    found = analysed(matrix, tmp_path / "r")
    noise, training, four_bits, late = found.answers
    differences = [0.41 - 0.43, 0.46 - 0.45, 0.42 - 0.44]
    assert noise.estimate == pytest.approx(across_seeds(differences).mean)
    assert noise.p == pytest.approx(paired_t_test(differences), rel=1e-6)
    assert noise.p_holm == noise.p  # alone in its topic
    assert noise.words(found.scale) == "no effect found"
    # Against a row without seeds, every seed is compared with the one value.
    assert training.estimate == pytest.approx(0.44 - 0.28) and training.seeds == [0, 1, 2]
    assert training.p_holm == pytest.approx(2 * min(training.p or 1, four_bits.p or 1))
    assert training.words(found.scale) == "better"
    # 30 of the 43 that plain solves: the interval of one seed is over problems.
    assert late.seeds == [0] and late.p is None and late.words(found.scale).startswith("one seed")
    paired = paired_difference([i < 30 for i in range(100)], [i < 43 for i in range(100)])
    assert (late.estimate, late.low, late.high) == pytest.approx(
        (paired.mean, paired.low, paired.high)
    )


def test_what_was_not_measured_is_said(matrix: Matrix, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    found = analyse(matrix, tmp_path / "r")
    assert {answer.words(found.scale) for answer in found.answers} == {"not yet measured"}
    assert not check(found, "every cell has a result")[0]
    text = report_files(matrix, tmp_path / "r")["report.md"]
    assert "No results yet." in text and "not yet measured" in text


def test_good_results_pass_every_check(matrix: Matrix, tmp_path: Path) -> None:
    found = analysed(matrix, tmp_path / "r")
    assert [c.name for c in found.checks if not c.ok] == []
    assert check(found, "never is refused") == (True, "NoiseError: it changes no norm")


@pytest.mark.parametrize(
    ("cell", "change", "name", "detail"),
    [
        ("noisy__s1", {"data": "other"}, "every arm of a seed read the same", "noisy (seed 1)"),
        ("noisy__s1", {"updates": 11}, "every arm of a seed made the same number", "noisy"),
        ("noisy__s1", {"adapter": "adapter-plain--s1"}, "no two arms", "plain = noisy (seed 1)"),
        ("noisy__s1", {"noise": {"noisy_steps": 0}}, "noise was measured", "noisy--s1"),
        ("plain__s0", {"test_digest": "x"}, "every cell was evaluated on", "several"),
        ("plain__s0", {"model_digest": "x"}, "every cell used the same model", "several"),
        (
            "plain__s2",
            {"audit": {"verdict": "fail", "checks": [], "adapters": 1}},
            "the audit of every run",
            "plain--s2",
        ),
    ],
)
def test_what_makes_arms_incomparable_is_found(
    matrix: Matrix, tmp_path: Path, cell: str, change: dict[str, object], name: str, detail: str
) -> None:
    ok, said = check(analysed(matrix, tmp_path / "r", **{cell: change}), name)
    assert not ok and detail in said


def test_an_arm_that_should_be_refused_and_ran_is_found(matrix: Matrix, tmp_path: Path) -> None:
    store = fill(matrix, tmp_path / "r")
    never = next(c for c in cells(matrix) if c.arm.name == "never")
    store.add(never, record(never, {"never": 40}))
    ok, said = check(analyse(matrix, tmp_path / "r"), "never is refused")
    assert not ok and "it ran: never--s0" in said


@pytest.mark.parametrize(("without", "ok"), [(0, False), (3, True)])
def test_an_arm_that_cannot_learn_has_to_show_it(tmp_path: Path, without: int, ok: bool) -> None:
    text = TEXT.replace("name: noisy, title: Noisy,", "name: noisy, title: N, expect: no-learning,")
    audit = {"verdict": "pass", "checks": [], "adapters": 4, "adapters_without_gradient": without}
    changes = {f"noisy__s{seed}": {"audit": audit} for seed in range(3)}
    found = analysed(write_matrix(tmp_path, text), tmp_path / "r", **changes)
    assert check(found, "noisy is shown as failing")[0] is ok


def test_perplexities_are_compared_as_ratios(tmp_path: Path) -> None:
    text = TEXT.replace("train.steps: 3,", "train.steps: 3, evaluation.metric: answer_perplexity,")
    matrix = write_matrix(tmp_path, text)
    store = Store(tmp_path / "r")
    for cell in cells(matrix):
        if cell.arm.name not in ("plain", "noisy"):
            continue
        value = 4.0 * (1.0 if cell.arm.name == "plain" else 0.9) * (1 + 0.01 * cell.seed)
        made = record(cell, {})
        made["evaluations"] = {
            cell.arm.name: {
                "n": 10,
                "tokens": 50,
                "answer_perplexity": {"mean": value, "low": value - 1, "high": value + 1},
            }
        }
        store.add(cell, made)
    found = analyse(matrix, tmp_path / "r")
    noise = found.answers[0]
    assert math.exp(noise.estimate or 0) == pytest.approx(0.9)
    assert noise.words(found.scale) == "better"  # less perplexity
    row = next(r for r in as_json(found)["rows"] if r["row"] == "plain")
    assert row["mean"] == pytest.approx(4.0 * (1 * 1.01 * 1.02) ** (1 / 3), rel=1e-5)
    assert "-10.0 %" in report_files(matrix, tmp_path / "r")["report.md"]


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    text = TEXT.replace("title: Plain", 'title: "Plain <b> & so on"')
    matrix = write_matrix(tmp_path, text)
    fill(matrix, tmp_path / "r")
    files = report_files(matrix, tmp_path / "r")
    page = files["report.html"]
    assert "Plain &lt;b&gt; &amp; so on" in page and "<b>" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    for name in ("rows.svg", "curves.svg"):
        ElementTree.fromstring(files[name])
    assert json.loads(files["report.json"])["matrix"] == "small"


# --- committed pages --------------------------------------------------------------------------


def committed() -> list[str]:
    return [name for name in shipped_matrices() if (RESULTS / name / "cells").is_dir()]


def test_committed_pages_are_what_the_committed_results_give() -> None:
    assert committed()
    assert stale_pages(RESULTS) == [], "run: npu-qat experiment pages docs/results"


@pytest.mark.parametrize("name", committed())
def test_committed_results_add_up(name: str) -> None:
    """Every stored accuracy is that of its stored outcomes."""
    matrix = load_matrix(matrix_path(name))
    found = analyse(matrix, RESULTS / name / "cells")
    assert found.results and not found.stale
    for result in found.results:
        for evaluation in result["evaluations"].values():
            if "outcomes" in evaluation:
                outcomes = unpack_outcomes(evaluation["outcomes"])
                assert len(outcomes) == evaluation["n"]
                assert sum(outcomes) / len(outcomes) == pytest.approx(evaluation["strict"]["mean"])
            else:
                rate = sum(evaluation["nll"]) / sum(evaluation["answer_tokens"])
                mean = evaluation["answer_perplexity"]["mean"]
                assert math.exp(rate) == pytest.approx(mean, rel=1e-4)


def test_the_commit_of_a_code_is_taken_from_the_table(matrix: Matrix, tmp_path: Path) -> None:
    cells_folder = tmp_path / "results" / "small" / "cells"
    found = analysed(matrix, cells_folder)
    [code] = {r["code"] for r in found.results}
    (tmp_path / "results" / "commits.json").write_text(json.dumps({code: "0123456789ab"}))
    assert "commit 0123456789ab" in report_files(matrix, cells_folder)["report.md"]


def test_commits_that_are_named_for_a_code_hold_it(tmp_path: Path) -> None:
    """The table of the committed results, against the history of this checkout."""
    if shutil.which("git") is None:
        pytest.skip("no git, so no history to compare with (an image has none)")
    table = json.loads((RESULTS / "commits.json").read_text())
    for code, commit in table.items():
        git = ["git", "-C", str(ROOT), "archive", commit, "npu_qat"]
        archive = subprocess.run(git, capture_output=True, check=False)
        if archive.returncode:
            pytest.skip(f"commit {commit} is not in this checkout's history")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(tmp_path / commit, filter="data")
        assert code_digest(tmp_path / commit / "npu_qat") == code


def test_only_the_arms_that_the_file_names_are_drawn(matrix: Matrix, tmp_path: Path) -> None:
    fill(matrix, tmp_path / "r")
    every = report_files(matrix, tmp_path / "r")["curves.svg"]
    chosen = matrix.model_copy(update={"curve_arms": ("plain",)})
    files = report_files(chosen, tmp_path / "r")
    assert every.count("<polyline") > 1 and files["curves.svg"].count("<polyline") == 1
    assert "Some of the arms" in files["report.md"]


def test_a_page_that_was_edited_is_stale(tmp_path: Path) -> None:
    name = committed()[0]
    target = tmp_path / name / "cells"
    target.mkdir(parents=True)
    for file in sorted((RESULTS / name / "cells").glob("*.json"))[:4]:
        (target / file.name).write_bytes(file.read_bytes())
    write_pages(tmp_path)
    assert stale_pages(tmp_path) == []
    page = tmp_path / name / "report.md"
    page.write_text(page.read_text() + "and it is the best\n")
    assert stale_pages(tmp_path) == [page]


def test_headlines_stand_at_the_top_and_gains_are_larger_or_smaller(tmp_path: Path) -> None:
    text = TEXT.replace("answers: aqn,", "answers: difference, headline: true,")
    matrix = write_matrix(tmp_path, text)
    for cell in cells(matrix):
        if cell.arm.name in ("plain", "noisy"):
            solved = 40 + cell.seed - (10 + cell.seed % 2 if cell.arm.name == "noisy" else 0)
            Store(tmp_path / "r").add(cell, record(cell, {cell.arm.name: solved}))
    page = answers_page([analyse(matrix, tmp_path / "r")])
    short = page[page.index("## In short") : page.index("## 1.")]
    (row,) = [line for line in short.splitlines() if "Noise?" in line]
    assert row.startswith("| small | Noise? | -1") and row.endswith("| 3 | smaller |")
    assert "Training?" not in short


def test_the_answers_page_asks_all_five_questions() -> None:
    page = answers_page([])
    assert page.count("\n## ") == 6 and "No results yet." in page
    assert RESULTS / "answers.md" in pages(RESULTS)
