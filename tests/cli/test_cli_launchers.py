"""The program under the launchers that start several processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
