"""Carry out the cells of a matrix: several processes at once, resumable, one failure stops nothing.

Cells are small and many, and most of a short run's first seconds are imports. So a worker is a
process that lives for many cells: it reads the id of a cell from its standard input, carries it
out, and answers with one line. A worker that dies (out of memory, a driver's fault) takes one cell
with it, which is recorded as failed, and is replaced.

Several runs may share a folder: a worker locks a cell while it carries it out, passes over one that
another process has locked, and takes a result that another one wrote meanwhile as it is.

Several workers on one accelerator pay off for models so small that launching kernels, not
computing, is what takes the time; each is one thread on the host.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npu_qat.experiments.matrix import Cell
from npu_qat.experiments.matrix_store import FORMAT, Store, code_digest

# The environment variable by which a process sees one accelerator only.
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
# What a worker's answer begins with; everything else on its standard output is a library's.
ANSWER = "@cell "
# A cell that is asked to stop finishes a step and writes a checkpoint.
SECONDS_TO_STOP = 30.0
# A cell is started only if a time limit leaves this many times what such a cell took last.
MARGIN = 1.1
# Failures in a row, or twice the number of workers if that is more, after which no cell is started:
# the cause is then the machine (no memory, a broken driver), and the rest is spared.
ENOUGH_FAILURES = 4


@dataclass(frozen=True)
class Workplace:
    """Where and how cells run.

    Attributes:
        command: starts a worker, e.g. ``python -m npu_qat experiment worker MATRIX ...``.
        runs: folder of the runs' own folders and logs.
        slots: one entry a worker: variables of its environment over this process's.
    """

    command: Sequence[str]
    runs: Path
    slots: Sequence[dict[str, str]]


@dataclass
class Progress:
    """What became of the cells so far."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # another process was at it
    not_started: list[str] = field(default_factory=list)


def make_slots(jobs: int, devices: Sequence[str], kind: str) -> list[dict[str, str]]:
    """Environments of ``jobs`` workers, spread over ``devices`` (numbers as the driver counts).

    Raises ``ValueError`` if devices are named for a kind that has no numbers.
    """
    if not devices:
        return [{} for _ in range(jobs)]
    if kind not in VISIBLE:
        raise ValueError(f"--devices goes with --device cuda or npu, not {kind}")
    return [{VISIBLE[kind]: devices[i % len(devices)]} for i in range(jobs)]


def run_cells(
    cells: Sequence[Cell],
    store: Store,
    workplace: Workplace,
    say: Callable[[str], None],
    *,
    time_limit: float | None = None,
    known: Mapping[str, float] | None = None,
) -> Progress:
    """Carry out ``cells`` in order, several at a time; results go to ``store``.

    Args:
        cells: what to do; those that have a result are not among them.
        store: where workers write results; here only the deaths of workers are recorded.
        workplace: how to start workers.
        say: prints a line.
        time_limit: seconds after which running cells are asked to stop. Cells that an earlier call
            stopped go first: they need the least, and a checkpoint loses nothing. Then a cell that
            would not end before is not started, a shorter one behind it is.
        known: arm -> most seconds that a cell of it took earlier.

    Ctrl-C asks the running cells to stop, a second one ends them.

    Raises:
        OSError: results cannot be written to ``store``; nothing is started then.
    """
    store.check_writable()
    begun = [cell for cell in cells if _is_begun(workplace.runs, cell)]
    ordered = [*begun, *(cell for cell in cells if cell not in begun)]
    scheduler = _Scheduler(
        ordered, {cell.id for cell in begun}, store, workplace, say, time_limit, dict(known or {})
    )
    scheduler.start()
    while not scheduler.over.is_set():
        try:
            scheduler.watch()
        except KeyboardInterrupt:
            scheduler.interrupt()
    scheduler.close()
    scheduler.progress.not_started = [cell.id for cell in scheduler.waiting]
    return scheduler.progress


def _run_folder(runs: Path, cell: Cell) -> Path:
    return runs / f"{cell.id}--{cell.digest}--{code_digest()}"


def _is_begun(runs: Path, cell: Cell) -> bool:
    """Whether an earlier call left a checkpoint of ``cell``."""
    return any((_run_folder(runs, cell) / "checkpoints").glob("*/*"))


class _Scheduler:
    def __init__(
        self,
        waiting: list[Cell],
        begun: set[str],
        store: Store,
        workplace: Workplace,
        say: Callable[[str], None],
        time_limit: float | None,
        known: dict[str, float],
    ) -> None:
        self.waiting, self.begun = waiting, begun
        self.store, self.workplace, self.say = store, workplace, say
        self.started = time.monotonic()
        self.end = None if time_limit is None else self.started + time_limit
        self.total = len(waiting)
        self.expected = {cell.id for cell in waiting if cell.arm.expect == "refused"}
        self.progress = Progress()
        self.known = known
        self.failures_in_a_row = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.workers: dict[int, subprocess.Popen[str]] = {}
        self.busy = len(workplace.slots)
        # Not Thread.join(): until Python 3.13 Ctrl-C in it makes a running thread count as ended.
        self.over = threading.Event()
        self.killer = threading.Timer(SECONDS_TO_STOP, self._kill)
        self.error: Exception | None = None

    def start(self) -> None:
        """One thread a slot."""
        for number, slot in enumerate(self.workplace.slots):
            threading.Thread(target=self._use_slot, args=(slot, number), daemon=True).start()

    def watch(self) -> None:
        """Wait for the workers; at the time limit ask them to stop, and soon make them."""
        while not self.over.wait(timeout=0.2):
            if self.end is not None and time.monotonic() > self.end and not self.stopping.is_set():
                self.say("time limit: running cells are asked to stop")
                self.stop()

    def interrupt(self) -> None:
        """Ctrl-C: the first asks, the second does not."""
        if self.stopping.is_set():
            self._kill()
            return
        self.say(
            "stopping: running cells write a checkpoint; the same command goes on from there. "
            "Once more ends them at once"
        )
        self.stop()

    def stop(self) -> None:
        """Start no cell any more and ask the running ones to stop; kill what does not."""
        with self.lock:
            if self.stopping.is_set():
                return
            self.stopping.set()
            self.killer.start()
        for worker in list(self.workers.values()):
            worker.terminate()

    def close(self) -> None:
        """All workers are gone. Raises what went wrong with them, if it was no cell's failure."""
        self.killer.cancel()
        if self.error is not None:
            raise self.error

    def _kill(self) -> None:
        for worker in list(self.workers.values()):
            if worker.poll() is None:
                worker.kill()

    def next(self) -> Cell | None:
        """The next cell, or None if there is none or no time for it."""
        with self.lock:
            if self.stopping.is_set() or self._hopeless():
                return None
            left = math.inf if self.end is None else self.end - time.monotonic()
            for i, cell in enumerate(self.waiting):
                if cell.id in self.begun or left > MARGIN * self._expected_seconds(cell):
                    return self.waiting.pop(i)
            return None

    def _expected_seconds(self, cell: Cell) -> float:
        """The most that a cell of its arm took, else of any arm: with little time left an arm of
        unknown length must not displace one that is known to fit."""
        longest = max(self.known.values(), default=0.0)
        return self.known.get(cell.arm.name, longest)

    def _hopeless(self) -> bool:
        """Whether everything fails now."""
        return self.failures_in_a_row >= max(ENOUGH_FAILURES, 2 * len(self.workplace.slots))

    def _use_slot(self, slot: dict[str, str], number: int) -> None:
        """What a thread does. An error of its own (results that cannot be written) ends the run."""
        try:
            self._work(slot, number)
        except Exception as error:
            self.error = self.error or error
            self.stop()
        finally:
            with self.lock:
                self.busy -= 1
                if not self.busy:
                    self.over.set()

    def _work(self, slot: dict[str, str], number: int) -> None:
        """One worker after another until nothing is left."""
        cell = self.next()
        while cell is not None:
            with (self.workplace.runs / f"worker-{number}.log").open("a") as log:
                worker = self._start(slot, log)
                self.workers[number] = worker
                while cell is not None and self._carry_out(worker, cell, number):
                    cell = self.next()
                assert worker.stdin is not None
                with suppress(BrokenPipeError):  # it died with the id of a cell unread
                    worker.stdin.close()
                worker.wait()
            if self.stopping.is_set():
                return
            if cell is not None:  # the worker is gone
                cell = self.next()

    def _start(self, slot: dict[str, str], log: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            list(self.workplace.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **slot},
            # Ctrl-C reaches this process alone, which then asks each worker once.
            start_new_session=True,
        )

    def _carry_out(self, worker: subprocess.Popen[str], cell: Cell, number: int) -> bool:
        """Have ``worker`` do ``cell``; False if it shall do no other.

        One that failed at a cell has to go: what made it fail may stay with the process (a broken
        CUDA context, a taken port), which would then fail at every cell that is left.
        """
        started = time.monotonic()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(cell.id + "\n")
            worker.stdin.flush()
            answer = next((line for line in worker.stdout if line.startswith(ANSWER)), None)
        except BrokenPipeError:
            answer = None
        seconds = time.monotonic() - started
        if answer is None:
            self._died(worker, cell, seconds, number)
            return False
        said = json.loads(answer.removeprefix(ANSWER))
        self._note(said["status"], cell, seconds, said.get("text", ""))
        return said["status"] in ("done", "elsewhere")

    def _note(self, status: str, cell: Cell, seconds: float, text: str) -> None:
        with self.lock:
            getattr(self.progress, status).append(cell.id)
            if status == "failed" and cell.id not in self.expected:
                self.failures_in_a_row += 1
            if status == "done":
                self.failures_in_a_row = 0
                # The longest: one that went on from a checkpoint took less than the next will.
                self.known[cell.arm.name] = max(self.known.get(cell.arm.name, 0.0), seconds)
            count = len(self.progress.done) + len(self.progress.failed)
            elapsed = time.monotonic() - self.started
            self.say(
                f"[{elapsed:6.0f} s] {count}/{self.total} {cell.id}: {status}"
                f"{', ' + text if text else ''} ({seconds:.0f} s)"
            )

    def _died(self, worker: subprocess.Popen[str], cell: Cell, seconds: float, number: int) -> None:
        code = worker.wait()
        if self.stopping.is_set():
            self._note("stopped", cell, seconds, "its checkpoint is kept")
            return
        text = f"the worker ended with code {code}; see worker-{number}.log"
        self.store.add(
            cell,
            {
                "format": FORMAT,
                "matrix": cell.matrix,
                "arm": cell.arm.name,
                "model": cell.model,
                "seed": cell.seed,
                "digest": cell.digest,
                "code": code_digest(),
                "status": "failed",
                "error": {"type": "WorkerDied", "text": text, "traceback": []},
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            },
        )
        self._note("failed", cell, seconds, text)


def serve_cells(cells: Sequence[Cell], store: Store, runs: Path, *, keep_runs: bool = False) -> int:
    """The worker's side: read ids from standard input, carry the cells out, answer.

    Returns the exit code.
    """
    import shutil

    from rich.console import Console

    from npu_qat.experiments.matrix_cell import run_cell
    from npu_qat.training.loop import Interrupted

    by_id = {cell.id: cell for cell in cells}
    for line in sys.stdin:
        cell = by_id[line.strip()]
        run_dir = _run_folder(runs, cell)
        with _claimed(run_dir) as ours:
            if not ours:
                _answer({"status": "elsewhere", "text": "another process is at it"})
                continue
            if (known := store.result(cell)) is not None:
                _answer({"status": "done", "text": f"by another process: {_in_short(known)}"})
                continue
            run_dir.mkdir(parents=True, exist_ok=True)
            with (run_dir / "log.txt").open("a", encoding="utf-8") as log:
                try:
                    record = run_cell(cell, run_dir, Console(file=log, width=160))
                except (Interrupted, KeyboardInterrupt):
                    _answer({"status": "stopped"})
                    return 0
            store.add(cell, record)
            _release()
            if record["status"] == "done" and not keep_runs:
                shutil.rmtree(run_dir)
        _answer({"status": record["status"], "text": _in_short(record)})
    return 0


@contextmanager
def _claimed(run_dir: Path) -> Iterator[bool]:
    """Whether this process alone is at the cell of ``run_dir``, until the end of the block.

    A lock on a file beside the folder: the folder itself goes when its cell is done, and the lock
    of a process that dies goes with it.
    """
    path = run_dir.with_name(f"{run_dir.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that its owner removed after it was opened here locks nothing.
            ours = os.path.samestat(os.fstat(handle.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        try:
            yield ours
        finally:
            if ours:
                path.unlink(missing_ok=True)


def _release() -> None:
    """Give memory back that the cell needed and the next one, or another worker, may need."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _answer(content: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(content), flush=True)


def _in_short(record: dict[str, Any]) -> str:
    """A result on the screen."""
    if record["status"] == "failed":
        return f"{record['error']['type']}: {record['error']['text']}"[:200]
    parts = []
    for row, found in record["evaluations"].items():
        if "strict" in found:
            parts.append(f"{row} {found['strict']['mean']:.1%}")
        else:
            parts.append(f"{row} ppl {found['answer_perplexity']['mean']:.4g}")
    return ", ".join(parts)
