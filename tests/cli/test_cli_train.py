"""``train``: where the configuration, the run directory and the exit code come from."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from npu_qat.cli import main
from npu_qat.cli.train import run_directory
from npu_qat.config import RunConfig, dump_yaml, load_config, load_run, parse_overrides


class Execute:
    """Stands in for the run itself and keeps what it was asked for."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.config = RunConfig()
        self.directory = Path()

    def __call__(self, config: RunConfig, directory: Path, console: Any) -> dict[str, Any]:
        self.config, self.directory = config, directory
        if self.error is not None:
            raise self.error
        console.print("trained")
        return {}


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Execute:
    fake = Execute()
    module = SimpleNamespace(execute=fake)
    monkeypatch.setitem(sys.modules, "npu_qat.experiments.run", module)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    return fake


def test_without_a_configuration_it_is_the_demo_and_says_so(
    execute: Execute, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train"]) == 0
    assert execute.config == load_config(preset="demo")
    assert re.fullmatch(r"runs/demo-\d{8}-\d{6}", str(execute.directory))
    out = capsys.readouterr().out
    assert "using the preset 'demo'" in out and "trained" in out


def test_options_go_over_set_and_set_over_the_file(execute: Execute) -> None:
    Path("mine.yaml").write_text("train: {lr: 1e-3}\nrun: {seed: 5}\n")
    words = ["--device", "cpu", "--output", "out", "--resume", "auto"]
    sets = ["--set", "train.lr=2e-3", "--set", "run.device=cuda"]
    assert main(["train", "mine.yaml", *sets, *words]) == 0
    assert (execute.config.train.lr, execute.config.run.seed) == (2e-3, 5)
    assert (execute.config.run.device, execute.config.run.resume) == ("cpu", "auto")
    assert execute.directory == Path("out")
    assert execute.config.model == RunConfig().model, "a file alone does not start from the demo"


def test_the_run_directory_is_named_after_the_file(execute: Execute) -> None:
    Path("mine.yaml").write_text("run: {seed: 5}\n")
    assert main(["train", "mine.yaml"]) == 0
    assert execute.directory.name.startswith("mine-")


def test_resuming_takes_the_configuration_of_the_run(
    execute: Execute, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    earlier = load_config(preset="log-e6a", overrides=["train.steps=3"])
    Path("out/config.yaml").write_text(dump_yaml(earlier))
    assert main(["train", "--output", "out", "--resume", "auto"]) == 0
    assert execute.config.train == earlier.train and execute.config.run.resume == "auto"
    assert "going on with the configuration in out/config.yaml" in capsys.readouterr().out


def test_resuming_what_has_no_name_is_refused(
    execute: Execute, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", "auto"]) == 2
    assert "add --output DIR" in capsys.readouterr().err


def test_a_stopped_run_ends_with_130_and_says_how_to_go_on(
    execute: Execute, capsys: pytest.CaptureFixture[str]
) -> None:
    from npu_qat.training.loop import Interrupted

    execute.error = Interrupted("stopped after step 3 of 9")
    assert main(["train", "--output", "out"]) == 130
    assert "Go on with: --output out --resume auto" in capsys.readouterr().out


def test_a_failed_run_ends_with_2(execute: Execute, capsys: pytest.CaptureFixture[str]) -> None:
    execute.error = ValueError("out holds a run already")
    assert main(["train", "--output", "out"]) == 2
    assert capsys.readouterr().err == "error: out holds a run already\n"


def test_notes_of_the_translation_are_shown(
    execute: Execute, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plan.yaml").write_text(
        "hw_error_injection: {enabled: true, error_type: mxfp4, injection_point: both}"
    )
    assert main(["train", "plan.yaml"]) == 0
    assert "note: hw_error_injection.injection_point: both is weight" in capsys.readouterr().out


def test_other_ranks_print_nothing(
    execute: Execute, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--local_rank=1", "train"]) == 0
    assert capsys.readouterr() == ("", "")


def test_ranks_of_one_launch_agree_on_the_run_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    loaded = load_run(preset="demo")
    times = iter([1e9, 2e9])
    monkeypatch.setattr("time.time", lambda: next(times))
    assert run_directory(loaded) == run_directory(loaded)


def test_a_launch_over_machines_needs_a_named_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="one folder for all: add --output DIR"):
        run_directory(load_run(preset="demo"))
    named = load_run(preset="demo", overrides=parse_overrides(["run.output_dir=out"]))
    assert run_directory(named) == Path("out")
