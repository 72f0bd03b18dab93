"""``scan``: from the command line to files, and from the files to a run whose audit shows them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from npu_qat.cli import dry_run, main
from npu_qat.config import load_config
from npu_qat.experiments.run import execute
from npu_qat.sensitivity import STRATEGIES

QUICK = ["--num_prompts", "4", "--loss", "layer"]


@pytest.fixture(autouse=True)
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "PROBE_SECONDS", 0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of the demo model."""
    path = tmp_path_factory.mktemp("scan")
    assert (
        main(["scan", *QUICK, "--device", "cpu", "--score", "weight", "--output", str(path)]) == 0
    )
    return path


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


# What is written ----------------------------------------------------------------------------------


def test_the_files_are_there(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "scan.json",
        "scan.html",
        "heatmap.png",
        *(f"noise-{strategy}.yaml" for strategy in STRATEGIES),
    }
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_names_the_planted_channel_and_its_layers(folder: Path) -> None:
    found = read(folder / "scan.json")
    assert found["model"] == "demo" and found["texts"] == 4
    assert any("Channel 46" in s and "layers 0, 1, 2" in s for s in found["statements"])
    assert set(found["guidance"]["strategies"]) == set(STRATEGIES)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.found += [v for name, v in attrs if name in ("src", "href", "srcset") and v]


def test_the_page_holds_all_that_it_shows(folder: Path) -> None:
    page = (folder / "scan.html").read_text()
    parser = _Links()
    parser.feed(page)
    assert all(link.startswith("#") for link in parser.found)
    assert "url(http" not in page and "@import" not in page
    for text in ("model.layers.1.mlp.down_proj", "Does the error grow with depth?", "plan"):
        assert text in page


def test_two_scans_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    words = ["scan", *QUICK, "--device", "cpu", "--score", "weight", "--output", str(tmp_path)]
    assert main(words) == 0
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


# The whole way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_noise_file_goes_into_a_run_and_its_plan_shows_the_multipliers(
    strategy: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / f"noise-{strategy}.yaml"
    layers = load_config(file, preset="demo").noise.layers
    assert layers.enabled
    capsys.readouterr()
    assert main(["train", str(file), "--preset", "demo", "--dry-run", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    shown = out.split("sigma times")[1].split("generation")[0]
    for value in layers.layer_multipliers.values():
        assert f"{value:.4g}:" in shown
    if strategy == "zone":
        assert "0.5:" in shown  # the late phase of the zone


def test_the_audit_of_a_run_measures_the_multipliers_of_the_scan(
    folder: Path, tmp_path: Path
) -> None:
    """scan -> YAML -> train: what reached the norms is what the scan suggested."""
    file = folder / "noise-variable.yaml"
    wanted = load_config(file).noise.layers.layer_multipliers
    assert len(set(wanted.values())) == 3
    quick = [
        "run.device=cpu", "train.method=sft", "train.steps=2", "train.micro_batch_size=4",
        "sft.batch_size=4", "noise.apply_during=training", "noise.num_stages=2",
        "noise.sigma_start=0.05", "task.train_size=32", "task.test_size=16",
        "evaluation.problems=2", "evaluation.baselines=[]", "rollout.max_new_tokens=8",
        "dapo.overlong_penalty=false",
    ]  # fmt: skip
    config = load_config(file, preset="demo", overrides=quick)
    execute(config, tmp_path / "run", Console(quiet=True))
    audit = read(tmp_path / "run" / "audit.json")
    assert audit["verdict"] == "pass"
    (found,) = audit["noise"]["multipliers"]
    assert found["expected"] == {**{str(k): v for k, v in wanted.items()}, "other": 1.0}
    for name, multiplier in found["expected"].items():
        assert found["measured"][name] == pytest.approx(multiplier, rel=0.2)
    check = next(c for c in audit["checks"] if c["name"].startswith("noise multipliers by layer"))
    assert check["ok"] and f"1: {wanted[1]:.3g}" in check["expected"]


def test_the_documents_block_of_the_result_loads(folder: Path, tmp_path: Path) -> None:
    strategies = read(folder / "scan.json")["guidance"]["strategies"]
    for name, blocks in strategies.items():
        text = {
            "noise_injection": {"enabled": True, "layer_sigma_config": blocks["layer_sigma_config"]}
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(text))
        ours = load_config(folder / f"noise-{name}.yaml").noise.layers
        assert load_config(file).noise.layers == ours


def test_normalised_multipliers_have_mean_one(tmp_path: Path) -> None:
    words = ["scan", "--num_prompts", "2", "--loss", "none", "--normalize", "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert load_config(tmp_path / "noise-targeted.yaml").noise.layers.normalize
    blocks = read(tmp_path / "scan.json")["guidance"]["strategies"]
    block = blocks["targeted"]["layer_sigma_config"]
    assert sum(block["layer_multipliers"].values()) == pytest.approx(3.0)
    assert "layer_sigma_config" not in blocks["zone"]


# The documents' own command -----------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("method", ["published", "linears"])
def test_the_plans_command_works(
    method: str, quant_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Section 4.4 of the plan; in the earlier program it ended in an argument error."""
    target = tmp_path / "w4a4_srdd_results.json"
    words = ["scan", "--method", method, "--num_prompts", "2", "--loss", "none", "--device", "cpu"]
    words = words if method == "linears" else [w for w in words if w not in ("--loss", "none")]
    words += ["--model_path", "demo", "--quant_type", quant_type]
    assert main([*words, "--injection_point", "both", "--output", str(target)]) == 0
    found = read(target)
    assert (tmp_path / "w4a4_srdd_results-noise-variable.yaml").exists()
    assert (tmp_path / "w4a4_srdd_results.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "w4a4_srdd_results.html").read_text()
    if method == "linears":
        profile = {"mxfp4": "ascend950", "nvfp4": "nvfp4"}[quant_type]
        assert found["recipe"]["activation_profile"] == profile
        return
    assert "3 of 3 layers flagged" in page and found["statement"].partition("(")[0] in page
    for row in found["report"]["per_layer"]:
        assert f">{row['sqnr_db']:.1f}</td>" in page
        assert f">{100 * row['relative_error']:.1f}</td>" in page
    assert "experiment plan, section 3.1" in page and "<script" not in page
    assert found["config"]["quant_type"] == quant_type
    assert (
        found["config"]["profile"] == {"mxfp4": "fork-mxfp4", "nvfp4": "fork-nvfp4-row"}[quant_type]
    )
    assert "All 3 layers are flagged" in capsys.readouterr().out.replace("\n", " ")


def test_another_model_has_not_the_presets_revision() -> None:
    from npu_qat.cli import build_parser
    from npu_qat.cli.scan import _load

    words = ["scan", "--preset", "log-e13h"]
    parse = build_parser().parse_args
    assert _load(parse(words)).config.model.revision
    other = [*words, "--model_path", "m"]
    assert _load(parse(other)).config.model.revision is None
    assert _load(parse([*other, "--set", "model.revision=v1"])).config.model.revision == "v1"


def test_thresholds_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = ["--sqnr_threshold", "1", "--deadzone_threshold", "1", "--saturation_threshold", "1"]
    words = ["scan", "--method", "published", "--num_prompts", "2", "--device", "cpu"]
    target = tmp_path / "r.json"
    assert main([*words, *none, "--relative_error_threshold", "9", "--output", str(target)]) == 0
    assert read(target)["report"]["summary"]["problematic_layers"] == 0
    assert "None of the 3 layers is flagged" in capsys.readouterr().out


def test_the_choices_are_those_of_the_room() -> None:
    """The parser lists them itself, since it loads no torch."""
    from npu_qat.cli import scan as command
    from npu_qat.sensitivity.guidance import SCORES
    from npu_qat.sensitivity.published import PROFILES
    from npu_qat.sensitivity.scanner import LOSS_UNITS

    assert (command.SCORES, command.LOSSES) == (SCORES, LOSS_UNITS)
    assert set(command.QUANT_TYPES) == set(PROFILES) == set(command.SERVED)


# What is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("texts.jsonl", '{"prompt": "Tom has 3 apples.", "completion": "3+1=4"}\n\n' * 3),
        ("texts.txt", "Tom has 3 apples.\n\nAnn has 4 pens.\n"),
        ("line.jsonl", '{"prompt": "Tom has\u2028 3.", "completion": "3+1=4"}\n' * 2),
    ],
)
def test_prompts_come_from_a_file(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    words = ["scan", "--prompts", str(file), "--num_prompts", "2", "--loss", "none"]
    assert main([*words, "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    found = read(tmp_path / "out" / "scan.json")
    assert found["texts"] == 2 and found["source"] == f"the first 2 of {name}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "missing.txt"], "missing.txt: cannot be read"),
        (["--prompts", "bad.jsonl"], "bad.jsonl, line 1: expected an object"),
        (["--prompts", "empty.txt"], "there is no text in it"),
        (["--sqnr_threshold", "3"], "goes with --method published"),
        (["--num_prompts", "0"], "must be 1 or more"),
        (["--quant_type", "mxfp4", "--set", "quant.weight_profile=ocp"], "sets both profiles"),
        (["--score", "loss", "--loss", "none", "--num_prompts", "1"], "needs a scan with loss"),
        (["--score", "input", "--injection_point", "weight"], "needs a quantised input"),
        (["--method", "published", "--loss", "layer"], "--loss goes with --method linears"),
        (["--method", "published", "--score", "loss"], "--score goes with --method linears"),
        (["--method", "published", "--sqnr_threshold", "nan"], "must be a number of 0 or more"),
        (["--output", "bad.jsonl", "--num_prompts", "1"], "no folder that can be written to"),
    ],
)
def test_mistakes_are_explained(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"question": "1"}')
    Path("empty.txt").write_text("\n\n")
    monkeypatch.setattr("npu_qat.sensitivity.scanner.scan", None)  # all of it before a scan
    assert main(["scan", "--device", "cpu", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err


def test_a_real_sized_vocabulary_costs_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error passes ask the head for one row only."""
    from npu_qat.config import Recipe
    from npu_qat.sensitivity import scan
    from tests.sensitivity.models import texts, tiny

    model = tiny()
    rows: list[int] = []
    head = model.lm_head.forward

    def counting(x: torch.Tensor) -> torch.Tensor:
        rows.append(x.shape[-2])
        return head(x)

    monkeypatch.setattr(model.lm_head, "forward", counting)
    scan(model, texts(2), Recipe(), loss="none")
    assert set(rows) == {1}
