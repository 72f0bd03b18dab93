"""Starting workers as users do: plain Python, torchrun, the deepspeed launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Set by launchers; a test run under one must not pass them on.
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(launcher: str, processes: int, job: Sequence[str]) -> list[str]:
    """The command line that starts ``processes`` of ``job``: a script or ``-m`` and a module, and
    its arguments."""
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    if launcher == "python":
        assert processes == 1
        return [sys.executable, *job]
    if launcher == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", *address]
        return [*run, "--nproc_per_node", str(processes), *job]
    assert launcher == "deepspeed"
    run = [sys.executable, str(BIN / "deepspeed"), "--num_gpus", str(processes), *address]
    return [*run, *("--module" if part == "-m" else part for part in job)]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, with one thread and without another launcher's variables."""
    kept = {k: v for k, v in os.environ.items() if k not in RENDEZVOUS}
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_IGNORE_CUDA_DETECTION": "1"}
    return kept | settings | dict(changes or {})


def launch(
    launcher: str,
    processes: int,
    job: Sequence[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> str:
    """Run to the end and return what was printed; the test fails if the exit status is not 0."""
    done = subprocess.run(
        command(launcher, processes, job),
        cwd=ROOT,
        env=dict(env) if env is not None else environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout
