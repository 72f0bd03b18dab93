"""What is measured is what was asked for, and one failure does not end it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_qat.backends import select
from npu_qat.planning import measure
from npu_qat.planning.cases import Decode, Job, Update, jobs
from npu_qat.planning.measure import is_measured, main, read_rows
from npu_qat.planning.model import known_models
from npu_qat.planning.worker import MICRO_BATCHES, Worker, profiled_peak, update_batches
from tests.planning.models import SMALL


def test_the_peak_is_that_of_what_was_alive_together() -> None:
    def work() -> None:
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(3 << 20, dtype=torch.uint8)
        del a
        c = torch.empty(1 << 19, dtype=torch.uint8)
        del b, c
        _ = torch.empty(2 << 20, dtype=torch.uint8)

    assert profiled_peak(work) == 4 << 20


def test_a_micro_batch_has_the_asked_tokens() -> None:
    ragged = update_batches(Update(3, 80), 100)
    assert len(ragged) == MICRO_BATCHES
    lengths = [len(s.prompt) + len(s.completion) for s in ragged[0]]
    assert lengths == [80, 79, 80]
    assert {len(s.prompt) for s in ragged[0]} == {20}
    even = update_batches(Update(2, 80, ragged=False), 100)
    assert [len(s.prompt) + len(s.completion) for s in even[0]] == [80, 80]
    assert max(t for s in even[0] for t in (*s.prompt, *s.completion)) < 100


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_jobs_name_known_models(processes: int) -> None:
    on_gpus = [job for slot in range(4 // processes) for job in jobs("cuda", processes, slot)]
    assert on_gpus and {job.model for job in on_gpus} <= set(known_models())
    assert all(job.updates for job in on_gpus)
    if processes > 1:
        assert {job.zero for job in on_gpus} >= {0, 2, 3} or processes == 2


def test_a_failing_job_is_a_row_and_the_next_one_runs() -> None:
    rows: list[dict[str, Any]] = []
    worker = Worker(select("cpu", "reference"), time.time() + 60, rows.append)
    worker.run(Job("gpt-9", "image", updates=(Update(1, 8),)))
    worker.probe()
    assert [row["kind"] for row in rows] == ["error", "probe"]
    assert "unknown model 'gpt-9'" in rows[0]["error"]
    assert rows[1]["flops"] > 0 and rows[1]["bandwidth"] > 0


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    job = Job("qwen2.5-0.5b", "image", zero=2)
    row = {"kind": "update", "model": job.model, "storage": "image", "zero": 2, "changes": {}}
    assert is_measured(job, 2, [row | {"processes": 2}])
    assert not is_measured(job, 2, [row | {"processes": 4}])
    assert not is_measured(job, 2, [row | {"processes": 2, "kind": "decode"}])
    assert read_rows(None) == []
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [row]}))
    assert read_rows(file) == [row]
    file.write_text("{}")
    with pytest.raises(ValueError, match="no result of this program"):
        read_rows(file)


def test_out_of_time_nothing_begins() -> None:
    rows: list[dict[str, Any]] = []
    worker = Worker(select("cpu", "reference"), time.time() - 1, rows.append)
    worker.run(Job("qwen2.5-0.5b", "image", updates=(Update(1, 8),)))
    assert rows == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--devices", "3"], "invalid choice: 3"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "cpu", "--add", "nowhere.json"], "no result of this program"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["measure", "--json", "rows.json", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "rows.json").exists()


def test_nothing_measured_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "measure", lambda *given: None)
    words = ["measure", "--device", "cpu", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 1
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == []


@pytest.mark.slow
def test_a_measurement_can_be_predicted(tmp_path: Path) -> None:
    """From the command to rows that calibration reads."""
    from npu_qat.planning.calibration import memory_of
    from npu_qat.planning.hardware import Hardware
    from npu_qat.training.engine import launch_environment

    file = tmp_path / "rows.json"
    words = [sys.executable, "-m", "npu_qat.planning.measure", "--device", "cpu"]
    words += ["--seconds", "8", "--json", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["environment"]["versions"]["torch"] and written["rows"][0]["kind"] == "probe"

    selection = select("cpu")
    launch_environment(selection.device)
    rows: list[dict[str, Any]] = []
    worker = Worker(selection, time.time() + 120, rows.append)
    job = Job("qwen2.5-1.5b", "packed", updates=(Update(2, 64),), decodes=(Decode(2, 8),))
    worker.run(replace(job, changes=SMALL))
    assert [row["kind"] for row in rows] == ["build", "update", "decode"], rows
    measured, predicted = memory_of(rows[1], Hardware("host", "cpu"))
    assert measured == pytest.approx(predicted, rel=0.1)
