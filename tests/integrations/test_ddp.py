"""Two processes on one model: the same update as one, the same noise on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.launching import launch

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).with_name("ddp_worker.py"))


def results(launcher: str, processes: int, kind: str, folder: Path) -> list[dict[str, Any]]:
    printed = launch(launcher, processes, [WORKER, kind, str(folder)])
    lines = [x.partition("RESULT ")[2] for x in printed.splitlines() if "RESULT " in x]
    assert len(lines) == processes
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", ["trainer", "accelerate"])
def test_two_processes_make_the_update_of_one(kind: str, tmp_path: Path) -> None:
    (alone,) = results("python", 1, kind, tmp_path / "one")
    first, second = results("torchrun", 2, kind, tmp_path / "two")
    assert first["adapters"] == second["adapters"] != 0
    assert first["noise"] == second["noise"] == alone["noise"]
    assert all(value != first["clean"] for value in first["noise"])
    assert first["clean"] == second["clean"] == alone["clean"]
    # The sums over a batch are split in two; 4 bits magnify the last digit in later steps.
    assert first["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-6)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert first["adapters"] == pytest.approx(alone["adapters"], rel=1e-3)
    if kind == "trainer":
        audit = json.loads((tmp_path / "two" / "audit.json").read_text())
        assert audit["verdict"] == "pass" and audit["evidence"]["updates"] == 4
