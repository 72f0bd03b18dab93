"""The check that CI makes on the demo's run fails when the run does not hold what README says."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def check_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_demo", ROOT / ".ci" / "check_demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def good(check_demo: ModuleType) -> dict[str, Any]:
    """File name -> content of a run that proves its point."""
    arm = {"n": 1024, "strict": {"mean": 0.5, "low": 0.47, "high": 0.53}}
    gain = {"a": "w4a4_trained", "b": "w4a4_ptq", "difference": 0.1, "low": 0.06, "high": 0.14}
    return {
        "config.yaml": {},
        "environment.json": {},
        "metrics.jsonl": {},
        "summary.json": {"seconds": 300.0},
        "report.html": {},
        "audit.json": {"verdict": "pass"},
        "evaluations.json": {
            "arms": {name: dict(arm) for name in check_demo.ARMS},
            "comparisons": [gain],
        },
    }


def write(run: Path, files: dict[str, Any]) -> None:
    run.mkdir(parents=True)
    for name, content in files.items():
        (run / name).write_text(json.dumps(content), encoding="utf-8")


def test_a_good_run_passes(check_demo: ModuleType, good: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "runs" / "demo-1", good)
    assert check_demo.main(str(tmp_path / "runs")) == 0


def test_the_order_of_a_comparison_does_not_matter(check_demo: ModuleType) -> None:
    entry = {"a": "w4a4_ptq", "b": "w4a4_trained", "difference": -0.1, "low": -0.14, "high": -0.06}
    assert check_demo.comparison([entry], "w4a4_trained", "w4a4_ptq") == (0.1, 0.06, 0.14)


def break_gain(files: dict[str, Any]) -> None:
    files["evaluations.json"]["comparisons"][0]["low"] = -0.01


def break_comparisons(files: dict[str, Any]) -> None:
    files["evaluations.json"]["comparisons"].clear()


def break_arm(files: dict[str, Any]) -> None:
    del files["evaluations.json"]["arms"]["bf16_lora_served_w4a4"]


def break_size(files: dict[str, Any]) -> None:
    files["evaluations.json"]["arms"]["w4a4_trained"]["n"] = 999


def break_time(files: dict[str, Any]) -> None:
    files["summary.json"]["seconds"] = 481.0


def break_audit(files: dict[str, Any]) -> None:
    files["audit.json"]["verdict"] = "fail"


def break_report(files: dict[str, Any]) -> None:
    del files["report.html"]


@pytest.mark.parametrize(
    "damage",
    [break_gain, break_comparisons, break_arm, break_size, break_time, break_audit, break_report],
)
def test_a_run_that_proves_nothing_fails(
    check_demo: ModuleType,
    good: dict[str, Any],
    tmp_path: Path,
    damage: Callable[[dict[str, Any]], None],
) -> None:
    damage(good)
    write(tmp_path / "runs" / "demo-1", good)
    assert check_demo.main(str(tmp_path / "runs")) == 1
