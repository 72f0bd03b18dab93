"""Carrying out a matrix: workers, failures, time limits, resuming. Workers are small scripts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from npu_qat.experiments.matrix import cells
from npu_qat.experiments.matrix_run import Workplace, make_slots, run_cells
from npu_qat.experiments.matrix_store import Store, code_digest
from tests.experiments.matrices import write_matrix

# Answers "done" to every cell, after what the first argument says to do.
WORKER = """
import json, os, signal, sys, time
print("a library's chatter")
for line in sys.stdin:
    name = line.strip()
    if name.startswith("noisy"):
        os._exit(9)
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
    assert not (tmp_path / "results").exists()


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
