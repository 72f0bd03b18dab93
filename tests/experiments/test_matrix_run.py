"""Carrying out a matrix: workers, failures, time limits, resuming. Workers are small scripts."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from npu_qat.experiments import matrix_run
from npu_qat.experiments.matrix import Cell, cells
from npu_qat.experiments.matrix_run import Workplace, make_slots, run_cells, serve_cells
from npu_qat.experiments.matrix_store import Store, code_digest
from tests.experiments.matrices import record, write_matrix

# Answers "done" to every cell, after what the first argument says to do.
WORKER = """
import json, os, signal, sys, time
print("a library's chatter")
for line in sys.stdin:
    name = line.strip()
    if name.startswith("noisy"):
        os._exit(9)
    if name.startswith("late") and os.environ.get("DEAF"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if name.startswith("late"):
        def stop(*_):
            print('@cell {"status": "stopped"}', flush=True)
            os._exit(0)
        signal.signal(signal.SIGTERM, stop)
        time.sleep(60)
    status = "failed" if name.startswith("plain") else "done"
    with open(sys.argv[1], "a") as log:
        log.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {name}\\n")
    print("@cell " + json.dumps({"status": status}), flush=True)
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    runs = tmp_path / "runs"
    runs.mkdir()
    return Workplace([sys.executable, str(script), str(tmp_path / "log")], runs, [{}, {}])


def test_one_failure_stops_nothing_and_a_dead_worker_is_replaced(
    tmp_path: Path, workplace: Workplace
) -> None:
    chosen = [c for c in cells(write_matrix(tmp_path)) if c.arm.name != "late"]
    store, said = Store(tmp_path / "results"), []
    progress = run_cells(chosen, store, workplace, said.append)
    assert sorted(progress.done) == ["bf16--s0", "bf16--s1", "bf16--s2", "never--s0", "start--s0"]
    assert sorted(progress.failed) == [
        *("noisy--s0", "noisy--s1", "noisy--s2", "plain--s0", "plain--s1", "plain--s2"),
    ]
    # A death is recorded here, because the worker cannot; its own failures are its own business.
    dead = [c for c in chosen if c.arm.name == "noisy"]
    assert [store.failures(c)[0]["error"]["type"] for c in dead] == ["WorkerDied"] * 3
    assert "code 9" in store.failures(dead[0])[0]["error"]["text"]
    assert any("noisy--s1: failed" in line for line in said)


def test_a_worker_lives_for_many_cells(tmp_path: Path, workplace: Workplace) -> None:
    chosen = [c for c in cells(write_matrix(tmp_path)) if c.arm.name in ("start", "bf16")]
    run_cells(chosen, Store(tmp_path / "results"), workplace, lambda text: None)
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 4 and len({line.split()[0] for line in lines}) <= 2


def test_a_worker_that_failed_does_no_other_cell(tmp_path: Path, workplace: Workplace) -> None:
    """What broke it (a CUDA context, a taken port) would break every cell that is left."""
    chosen = [c for c in cells(write_matrix(tmp_path)) if c.arm.name in ("plain", "bf16")]
    one = Workplace(workplace.command, workplace.runs, [{}])
    progress = run_cells(chosen, Store(tmp_path / "results"), one, lambda text: None)
    assert len(progress.failed) == len(progress.done) == 3
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    after_failure = [
        now[0] != before[0] for before, now in pairwise(lines) if before[2].startswith("plain")
    ]
    assert len(after_failure) >= 2 and all(after_failure)


def test_a_time_limit_stops_what_runs_and_starts_nothing_else(
    tmp_path: Path, workplace: Workplace
) -> None:
    chosen = [c for c in cells(write_matrix(tmp_path)) if c.arm.name in ("late", "start")]
    one = Workplace(workplace.command, workplace.runs, [{}])
    started = time.monotonic()
    progress = run_cells(
        chosen[::-1], Store(tmp_path / "results"), one, lambda text: None, time_limit=1.5
    )
    assert time.monotonic() - started < 20
    assert (progress.stopped, progress.not_started) == (["late--s0"], ["start--s0"])
    assert not list((tmp_path / "results").iterdir())


def test_a_cell_that_would_not_end_in_time_makes_room_for_a_shorter_one(
    tmp_path: Path, workplace: Workplace
) -> None:
    chosen = [c for c in cells(write_matrix(tmp_path)) if c.arm.name in ("bf16", "start")]
    progress = run_cells(
        chosen,
        Store(tmp_path / "results"),
        workplace,
        lambda text: None,
        time_limit=30,
        known={"bf16": 100.0, "start": 1.0},
    )
    assert progress.done == ["start--s0"]
    assert progress.not_started == ["bf16--s0", "bf16--s1", "bf16--s2"]


def test_with_little_time_a_known_length_goes_before_an_unknown_one(
    tmp_path: Path, workplace: Workplace
) -> None:
    chosen = [c for c in cells(write_matrix(tmp_path)) if c.arm.name in ("bf16", "start", "late")]
    progress = run_cells(
        chosen,
        Store(tmp_path / "results"),
        workplace,
        lambda text: None,
        time_limit=30,
        known={"start": 1.0, "other": 100.0},
    )
    assert progress.done == ["start--s0"]
    assert progress.not_started == ["bf16--s0", "bf16--s1", "bf16--s2", "late--s0"]


def test_what_was_stopped_goes_first_whatever_it_took(tmp_path: Path, workplace: Workplace) -> None:
    """A folder with a checkpoint, of this configuration and this code."""
    chosen = [c for c in cells(write_matrix(tmp_path)) if c.arm.name in ("bf16", "start")]
    stopped, other_code = chosen[2], chosen[3]
    for cell, code in ((stopped, code_digest()), (other_code, "0" * 12)):
        folder = workplace.runs / f"{cell.id}--{cell.digest}--{code}" / "checkpoints" / "w4a4"
        (folder / "step-1").mkdir(parents=True)
    one = Workplace(workplace.command, workplace.runs, [{}])
    progress = run_cells(
        chosen,
        Store(tmp_path / "results"),
        one,
        lambda text: None,
        time_limit=30,
        known={"bf16": 100.0, "start": 1.0},
    )
    assert stopped.arm.name == other_code.arm.name == "bf16"
    assert progress.done == [stopped.id, "start--s0", *progress.done[2:]]
    assert other_code.id not in progress.done[:2]


def test_where_everything_fails_the_rest_is_spared(tmp_path: Path, workplace: Workplace) -> None:
    """Also after a success: a machine can run out of memory later on."""
    planned = cells(write_matrix(tmp_path))
    chosen = [c for c in planned if c.arm.name == "start"]
    chosen += [c for c in planned if c.arm.name == "plain"] * 3
    one = Workplace(workplace.command, workplace.runs, [{}])
    progress = run_cells(chosen, Store(tmp_path / "results"), one, lambda text: None)
    assert len(progress.failed) == 4 and len(progress.not_started) == 5


@pytest.mark.parametrize("deaf", [False, True])
def test_ctrl_c_stops_the_cells_and_says_so(
    tmp_path: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    """A second Ctrl-C ends a worker that does not listen."""
    chosen = [c for c in cells(write_matrix(tmp_path)) if c.arm.name in ("late", "start")][::-1]
    one = Workplace(workplace.command, workplace.runs, [{"DEAF": "1"} if deaf else {}])
    said: list[str] = []
    for after in (2.0, 3.0) if deaf else (2.0,):
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    progress = run_cells(chosen, Store(tmp_path / "results"), one, said.append)
    assert (progress.stopped, progress.not_started) == (["late--s0"], ["start--s0"])
    assert any(line.startswith("stopping") for line in said)
    assert any("late--s0: stopped" in line for line in said)
    assert time.monotonic() - started < 15
    killers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert all(timer.finished.is_set() for timer in killers)  # else the program lingers


def test_results_that_cannot_be_written_are_an_error_before_any_work(
    tmp_path: Path, workplace: Workplace
) -> None:
    (tmp_path / "results").write_text("a file")
    chosen = cells(write_matrix(tmp_path))[:1]
    with pytest.raises(OSError, match="results cannot be written to"):
        run_cells(chosen, Store(tmp_path / "results"), workplace, print)
    assert not (tmp_path / "log").exists()


def test_a_disk_that_fills_up_ends_the_run_with_an_error(
    tmp_path: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Store, cell: object, record: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "add", full)
    chosen = [c for c in cells(write_matrix(tmp_path)) if c.arm.name == "noisy"]
    with pytest.raises(OSError, match="No space left"):
        run_cells(chosen, Store(tmp_path / "results"), workplace, lambda text: None)


def test_a_cell_of_another_process_is_left_to_it_and_its_result_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs share a folder: what one is at, or has done, is no failure of the other."""
    matrix = write_matrix(tmp_path)
    chosen = [c for c in cells(matrix) if c.arm.name in ("start", "bf16")][:3]
    busy, done, free = chosen
    store, runs = Store(tmp_path / "results"), tmp_path / "runs"
    store.add(done, record(done, {done.arm.name: 50}))
    made: list[str] = []

    def carry_out(cell: Cell, run_dir: Path, console: object) -> dict[str, Any]:
        made.append(cell.id)
        assert matrix_run._run_folder(runs, cell).is_dir()
        return record(cell, {cell.arm.name: 50})

    monkeypatch.setattr("npu_qat.experiments.matrix_cell.run_cell", carry_out)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{c.id}\n" for c in chosen)))
    with matrix_run._claimed(matrix_run._run_folder(runs, busy)) as ours:
        assert ours and serve_cells(chosen, store, runs) == 0
    answers = [
        json.loads(line.removeprefix("@cell "))
        for line in capsys.readouterr().out.split("\n")
        if line
    ]
    assert [a["status"] for a in answers] == ["elsewhere", "done", "done"]
    assert made == [free.id] and store.result(busy) is None
    assert not list(runs.iterdir())


def test_slots_are_spread_over_devices() -> None:
    assert make_slots(3, ["0", "2"], "cuda") == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "2"},
        {"CUDA_VISIBLE_DEVICES": "0"},
    ]
    assert make_slots(2, ["4"], "npu")[0] == {"ASCEND_RT_VISIBLE_DEVICES": "4"}
    assert make_slots(2, [], "cpu") == [{}, {}]
    with pytest.raises(ValueError, match="cuda or npu"):
        make_slots(1, ["0"], "auto")


def test_the_worker_command_carries_real_cells_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: the command line, a worker, a run, its record, the skip of a second call."""
    from npu_qat.cli import main

    (tmp_path / "tiny.yaml").write_text(
        "name: tiny\ntitle: Tiny\npreset: demo\n"
        "set: {train.steps: 2, noise.num_stages: 2, task.test_size: 8, task.train_size: 64,\n"
        "  evaluation.baselines: [], dapo.max_generation_tries: 1, dapo.generation_prompts: 4,\n"
        "  dapo.prompts_per_rollout: 4, rollout.max_new_tokens: 24}\n"
        "arms:\n"
        "  - {name: a, title: A, serve: {w4a16: [w4a16]}}\n"
        "  - {name: b, title: B, set: {noise.target_modules: [nope]}, expect: refused}\n"
        "variants:\n  w4a16: {quant.injection_point: weight}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    words = ["experiment", "run", "tiny.yaml", "--device", "cpu"]
    assert main(words) == 0
    results = sorted((tmp_path / "runs/experiments/tiny/results").iterdir())
    assert [p.name.split("--")[0] for p in results] == ["a", "b"]
    done, failed = (json.loads(p.read_text()) for p in results)
    assert done["status"] == "done" and set(done["evaluations"]) == {"a", "a@w4a16"}
    assert done["steps"] == 2 and done["audit"]["verdict"] == "pass" and done["updates"] >= 0
    assert failed["error"]["type"] == "NoiseError"
    assert failed["error"]["traceback"]
    assert str(Path(__file__).resolve().parents[2]) not in json.dumps(failed["error"])
    stamps = [p.stat().st_mtime_ns for p in results]
    assert main(words) == 0
    assert [p.stat().st_mtime_ns for p in results] == stamps
