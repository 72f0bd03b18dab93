"""A committed CPU row, run again: the same answers, problem by problem."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from npu_qat.config import Override
from npu_qat.experiments.matrix import cells, load_matrix, matrix_path
from npu_qat.experiments.matrix_cell import run_cell
from npu_qat.experiments.matrix_store import Store

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["start-w4a4", "w4a4"])
def test_a_committed_cpu_row_is_reproduced(arm: str, tmp_path: Path) -> None:
    """By its code, on its processor and with its torch; others may round sums otherwise, and must
    then land within the row's interval over problems."""
    planned = cells(
        load_matrix(matrix_path("smoke")), overrides=[Override(("run", "device"), "cpu", "test")]
    )
    cell = next(c for c in planned if c.arm.name == arm)
    committed = Store(RESULTS / "smoke" / "cells", any_code=True).result(cell)
    assert committed is not None
    again = run_cell(cell, tmp_path / "run", Console(quiet=True))
    assert again["status"] == "done", again.get("error")
    before, after = (r["evaluations"][arm] for r in (committed, again))
    same = ("processor", "versions")
    alike = all(committed["environment"][k] == again["environment"][k] for k in same)
    if alike and committed["code"] == again["code"]:
        assert after["outcomes"] == before["outcomes"]
        assert again.get("adapter") == committed.get("adapter")
    else:
        assert before["strict"]["low"] <= after["strict"]["mean"] <= before["strict"]["high"]
