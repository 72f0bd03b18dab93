"""``parity`` from the command line: exit codes, files, and what does not fit together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from npu_qat.cli import main
from npu_qat.deploy.run_source import describe_base
from tests.deploy.models import damage
from tests.parity.world import World, make, save_run

SMALL = ["--prompts", "4", "--max-new-tokens", "4", "--seeds", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make(tmp_path_factory.mktemp("world"), adapter=True)


@pytest.fixture
def there(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run ``runs/mine`` and its export ``served``."""
    monkeypatch.chdir(tmp_path)
    run = save_run(world, tmp_path / "runs" / "mine")
    world.copy(tmp_path / "served")
    return run


def test_a_run_and_its_export_pass_and_the_page_is_written(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["parity", "run", "runs/mine", "--export", "served", *SMALL]
    assert main([*words, "--html", "p.html"]) == 0
    out = capsys.readouterr().out
    assert "The export computes what was trained" in out
    assert [line[:8] for line in out.splitlines() if line.startswith("PASS")] == [
        "PASS  L0",
        "PASS  L1",
        "PASS  L2",
        "PASS  L3",
    ]
    assert "<figure" in Path("p.html").read_text()


def test_a_damaged_export_fails_with_exit_code_1(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    damage(Path("served"), lambda tensors: tensors[name][0, 0].bitwise_xor_(1))
    assert main(["parity", "run", "runs/mine", "--export", "served", *SMALL, "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["verdict"] == "fail"
    assert content["levels"][0]["weights"]["differing"] == ["model.layers.0.mlp.up_proj"]


def test_a_recording_is_checked_where_neither_run_nor_model_is(
    there: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "record", "runs/mine", "--output", "recording", *SMALL]) == 0
    assert "14 linears, 4 texts" in capsys.readouterr().out
    shutil.rmtree("runs")
    words = ["parity", "check", "recording", "--export", "served", "--device", "cpu"]
    assert main([*words, "--backend", "reference"]) == 0
    content = Path("recording/recording.json")
    content.write_text(content.read_text().replace('"linears"', '"linear"'))
    capsys.readouterr()
    assert main(words) == 2
    assert "its seal does not fit" in capsys.readouterr().err


def test_a_model_is_compared_without_a_run(
    there: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(world.config.model.path)]
    assert main(["export", *model, "--format", "ascend", "--output", "ptq"]) == 0
    words = [*model, "--export", "ptq", *SMALL, "--device", "cpu"]
    assert main(["parity", "run", *words]) == 0
    # The run's export has an adapter that this side does not.
    capsys.readouterr()
    assert main(["parity", "run", *model, "--export", "served", *SMALL, "--device", "cpu"]) == 1
    assert "FAIL  adapter" in capsys.readouterr().out


def test_the_base_alone_is_compared_on_request(there: Path) -> None:
    words = ["runs/mine", "--format", "ascend", "--adapter", "none", "--output", "base"]
    assert main(["export", *words]) == 0
    run = ["parity", "run", "runs/mine", "--export", "base", *SMALL]
    assert main([*run, "--adapter", "none"]) == 0
    assert main(run) == 1


def test_a_run_that_wrote_its_base_refuses_another_model(
    there: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    right = describe_base(world.config, world.side.handle)
    (there / "base.json").write_text(json.dumps(right))
    export = ["export", "runs/mine", "--format", "ascend", "--output"]
    assert main([*export, "again"]) == 0
    (there / "base.json").write_text(json.dumps({**right, "fingerprint": "0" * 64}))
    for words in (
        [*export, "other"],
        [*export, "merged", "--adapter", "merge"],
        ["parity", "record", "runs/mine", "--output", "recording", *SMALL],
    ):
        capsys.readouterr()
        assert main(words) == 2
        assert "is not the model that was trained" in capsys.readouterr().err
    assert not list(Path().glob("other*")) and not list(Path().glob("merged*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--export", "served"], "give either a run directory or --model PATH"),
        (["run", "runs/mine", "--model", "x", "--export", "served"], "give either a run"),
        (["run", "runs/other", "--export", "served"], "runs/other is no run directory"),
        (["run", "runs/mine", "--preset", "demo", "--export", "x"], "--preset goes with --model"),
        (["run", "runs/mine", "--set", "task.seed=1", "--export", "x"], "goes with --model"),
        (["run", "runs/mine", "--export", "served", "--prompts", "0"], "must be 1 or more"),
        (["run", "runs/mine", "--export", "nowhere", *SMALL], "nowhere is no model folder"),
        (["check", "nowhere", "--export", "served"], "holds no readable recording"),
        (
            ["run", "--model", "x", "--adapter", "none", "--adapter-dir", "y", "--export", "z"],
            "contradicts --adapter-dir",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    there: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", *words]) == 2
    assert message in capsys.readouterr().err
