"""The program under the launchers that start several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.launching import ROOT, command, environment

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_processes_print_once(launcher: str) -> None:
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
        "deepspeed": [
            "deepspeed.launcher.launch", "--world_info", "eyJsb2NhbGhvc3QiOiBbMCwgMV19",
            "--master_addr", "127.0.0.1", "--master_port", "29617", "--module",
        ],
    }[launcher]  # fmt: skip
    words = ["npu_qat", "config", "presets"]
    done = subprocess.run(
        [sys.executable, "-m", *start, *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("log-e13h") == 1


@pytest.mark.parametrize("where", ["config of the user", "config of the run"])
def test_a_mistake_that_all_processes_meet_is_told_by_the_first(where: str, tmp_path: Path) -> None:
    """The launcher ends rank 0 as soon as rank 1 has ended; rank 1 is silent about it. A mistake in
    the run's own file is met when the processes have joined, the user's before."""
    bad = tmp_path / "run" / "config.yaml"
    bad.parent.mkdir()
    bad.write_text("train:\n  lrr: 1\n")
    given = ["--preset", "demo"] if where == "config of the run" else [str(bad)]
    words = ["train", *given, "--device", "cpu", "--output", str(bad.parent), "--resume", "auto"]
    done = subprocess.run(
        command("torchrun", 2, ["-m", "npu_qat", *words]),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "error: " in line and "lrr" in line]
    assert len(told) == 1 and told[0].startswith("error: "), done.stderr
    joined = "waiting for all 2 processes at 127.0.0.1:" in done.stderr
    assert joined is (where == "config of the run")
