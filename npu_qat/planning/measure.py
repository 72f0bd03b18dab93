"""What the plan is checked against: memory and time of real updates and rollouts, small shapes.

    python -m npu_qat.planning.measure --json rows.json [--devices 4] [--seconds 150]

``cases`` says what is measured and ``worker`` how; here are the processes that do it. Each case is
a row, written as soon as it is measured:

* ``probe``: one large matmul and one large copy; ``collective``: all-gather and all-reduce.
* ``build``: bytes of the model, and the peak while it was made.
* ``update``: peak memory of an update of two micro-batches; seconds of a micro-batch, of a pass
  without gradients and of the optimiser's step.
* ``decode``: seconds of the prefill and of one decoding step, peak memory.

On several devices, jobs of one process run on all devices at a time, then pairs, then all devices
together. A case that fails is a row with its error and the next one goes on; whoever runs out of
time leaves the rest out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from npu_qat.planning.cases import Job, jobs

GRACE_SECONDS = 25.0
COUNTS = (1, 2, 4)


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """The rows of an earlier result; none without one.

    Raises ``ValueError`` if it is no result.
    """
    if path is None:
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--add {path}: no result of this program: {error}") from error
    return rows


def is_measured(job: Job, processes: int, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether ``rows`` have an update of ``job``."""
    mine = (job.model, job.storage, job.zero, job.changes, processes)
    keys = ("model", "storage", "zero", "changes", "processes")
    updates = [row for row in rows if row["kind"] == "update"]
    return any(tuple(row[key] for key in keys) == mine for row in updates)


def work(device: str, slot: int, rows: Path, deadline: float, earlier: Path | None) -> None:
    """The body of one process of group ``slot``; rank 0 appends its rows to ``rows``."""
    from npu_qat.backends import select
    from npu_qat.planning.worker import Worker
    from npu_qat.training.engine import launch_environment, shut_down, world

    selection = select(device)
    launch_environment(selection.device)
    processes = world()[1]

    def write(row: dict[str, Any]) -> None:
        text = json.dumps({**row, "slot": slot})
        print(text, flush=True)
        with rows.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    worker = Worker(selection, deadline, write)
    if slot == 0:
        worker.probe()
        worker.collectives()
    done = read_rows(earlier)
    for job in jobs(selection.device.type, processes, slot):
        if not is_measured(job, processes, done):
            worker.run(job)
    shut_down()


def _groups(device: str, devices: int) -> Iterator[tuple[int, list[int]]]:
    """(processes of a group, slots) of each round."""
    for processes in COUNTS:
        if processes <= devices:
            slots = range(1 if device == "cpu" else devices // processes)
            yield processes, [slot for slot in slots if jobs(device, processes, slot)]


def measure(
    device: str, devices: int, seconds: float, rows: Path, earlier: Path | None = None
) -> None:
    """Run all rounds within about ``seconds``, without what ``earlier`` has; rows are appended to
    ``rows``."""
    rounds = list(_groups(device, devices))
    ends = time.time() + seconds
    for left, (processes, slots) in zip(range(len(rounds), 0, -1), rounds, strict=True):
        # The first round has most cases; a later one needs its share of what is left.
        share = (ends - time.time()) / left
        if left == len(rounds) > 1:
            share = 0.42 * seconds
        deadline = time.time() + share - 5.0
        running = [_start(device, processes, slot, rows, deadline, earlier) for slot in slots]
        for process in running:
            try:
                process.wait(timeout=max(1.0, deadline + GRACE_SECONDS - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(
    device: str, processes: int, slot: int, rows: Path, deadline: float, earlier: Path | None
) -> subprocess.Popen[bytes]:
    """Start the processes of a group on devices of their own."""
    words = [sys.executable, "-m"]
    if processes > 1:
        words += ["torch.distributed.run", f"--nproc_per_node={processes}"]
        words += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}", "-m"]
    words += ["npu_qat.planning.measure", "--work", str(slot), "--device", device]
    words += ["--json", str(rows), "--deadline", str(deadline)]
    words += [] if earlier is None else ["--add", str(earlier)]
    mine = ",".join(str(slot * processes + i) for i in range(processes))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device != "cpu":
        name = "ASCEND_RT_VISIBLE_DEVICES" if device == "npu" else "CUDA_VISIBLE_DEVICES"
        environment[name] = mine
    return subprocess.Popen(words, env=environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> int:
    """Measure, and write one file: the machine and the rows.

    Returns:
        1 if nothing was measured, for no process could start; 2 if what was asked for is not
        there; else 0.
    """
    parser = argparse.ArgumentParser(
        prog="npu_qat.planning.measure", description="Measure what npu-qat plan predicts."
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the result")
    parser.add_argument("--device", default="auto", help="npu, cuda or cpu; default: auto")
    parser.add_argument(
        "--devices", type=int, choices=COUNTS, default=1, help="how many (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=150.0, help="time for all of it (150)")
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="an earlier result: measure the rest, keep both"
    )
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        work(args.device, args.work, args.json, args.deadline, args.add)
        return 0
    from npu_qat.backends import select
    from npu_qat.experiments.environment import describe_environment

    try:
        selection = select(args.device)
        earlier = read_rows(args.add)
    except ValueError as error:
        parser.error(str(error))
    device = selection.device.type
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.touch()
        try:
            measure(device, args.devices, args.seconds, rows, args.add)
        finally:
            lines = rows.read_text(encoding="utf-8").splitlines()
            found = earlier + [json.loads(line) for line in lines]
            described = {
                "command": f"python -m npu_qat.planning.measure --devices {args.devices} "
                f"--seconds {args.seconds:g}",
                **describe_environment(selection),
                "load_average": [round(x, 2) for x in os.getloadavg()],
            }
            args.json.write_text(
                json.dumps({"environment": described, "rows": found}, indent=1) + "\n",
                encoding="utf-8",
            )
    print(f"{len(found)} rows: {args.json}")
    return 0 if lines else 1


if __name__ == "__main__":
    sys.exit(main())
