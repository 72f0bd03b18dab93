"""``evaluate``: a run directory or a model, and never both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from npu_qat.cli import main
from npu_qat.config import RunConfig, dump_yaml, load_config

RESULT = {
    "confidence": 0.95,
    "arms": {
        "w4a4_ptq": {
            "n": 200,
            "strict": {"mean": 0.25, "low": 0.2, "high": 0.31},
            "flexible": {"mean": 0.3, "low": 0.24, "high": 0.37},
        },
    },
    "comparisons": [
        {"a": "w4a4_trained", "b": "w4a4_ptq", "difference": 0.1, "low": 0.05, "high": 0.15}
    ],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the evaluation was asked for; a finished run stands in ``runs/mine``."""
    calls: dict[str, Any] = {}

    def evaluate(config: RunConfig, **kwargs: Any) -> dict[str, Any]:
        calls.update(config=config, **kwargs)
        kwargs["console"].print("measuring")
        return RESULT

    module = SimpleNamespace(evaluate=evaluate)
    monkeypatch.setitem(sys.modules, "npu_qat.experiments.run", module)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.yaml").write_text(dump_yaml(load_config(preset="log-e6a")))
    Path("adapter").mkdir()
    return calls


def test_a_run_brings_its_configuration(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "runs/mine", "--set", "evaluation.problems=200"]) == 0
    expected = load_config(preset="log-e6a", overrides=["evaluation.problems=200"])
    assert asked["config"] == expected
    assert (asked["run_dir"], asked["adapter"]) == (Path("runs/mine"), None)
    out = capsys.readouterr().out
    assert "25.0% (20.0% to 31.0%)" in out and "strict [95% interval]" in out
    assert "w4a4_trained - w4a4_ptq: +10.0 points (+5.0 to +15.0), paired" in out


def test_a_model_is_evaluated_with_an_adapter(asked: dict[str, Any]) -> None:
    words = ["--model", "there", "--adapter", "adapter", "--preset", "log-e13h", "--device", "cpu"]
    assert main(["evaluate", *words]) == 0
    config = asked["config"]
    assert (config.model.path, config.run.device) == ("there", "cpu")
    assert config.quant == load_config(preset="log-e13h").quant
    assert (asked["run_dir"], asked["adapter"]) == (None, Path("adapter"))


def test_json_is_all_there_is_on_standard_output(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "runs/mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either a run directory or --model PATH"),
        (["runs/mine", "--model", "x"], "give either a run directory or --model PATH"),
        (["runs/other"], "runs/other is no run directory"),
        (["runs/mine", "--preset", "demo"], "--preset goes with --model"),
        (["runs/mine", "--adapter", "adapter"], "--adapter goes with --model"),
        (["--model", "x", "--adapter", "nowhere"], "--adapter nowhere: no such folder"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    asked: dict[str, Any], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err and not asked
