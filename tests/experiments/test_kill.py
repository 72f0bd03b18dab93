"""kill -9 and Ctrl-C at moments that nobody chose: the same numbers as without."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.experiments.running import configuration, metrics, results
from tests.training.launching import ROOT, environment
from tests.training.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.distributed

RUNNER = Path(__file__).with_name("running.py")


def start(config: dict[str, Any], folder: Path, *, resume: bool) -> subprocess.Popen[str]:
    config = {**config, "run": {**config["run"], "resume": "auto" if resume else "no"}}
    path = folder.parent / "config.json"
    path.write_text(json.dumps(config))
    return subprocess.Popen(
        [sys.executable, str(RUNNER), str(path), str(folder)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed[-6000:]
    return printed


def stop_after(
    process: subprocess.Popen[str], sign: Path, seconds: float, how: signal.Signals
) -> bool:
    """Signal ``process`` some time after ``sign`` exists; False if it had ended by then."""
    deadline = time.monotonic() + 240
    while not sign.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(seconds)
    running = process.poll() is None
    process.send_signal(how)
    process.communicate(timeout=240)
    return running


def test_a_run_that_is_stopped_at_random_moments_gives_the_same_numbers(tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    config = configuration(
        model,
        train={"steps": 8, "checkpoint_every": 2},
        noise={"num_stages": 4},
        evaluation={"problems": 8, "baselines": ["ptq", "bf16_lora"], "every": 3},
    )
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    for folder in (whole, parts):
        folder.parent.mkdir()
    finish(start(config, whole, resume=False))
    seed = random.randrange(10**6)
    print(f"the moments come from random.Random({seed})")
    moments = random.Random(seed)
    stopped = 0
    for turn, (sign, how) in enumerate(
        [
            ("w4a4/step-000002", signal.SIGKILL),
            ("bf16_lora/step-000002", signal.SIGINT),
        ]
    ):
        process = start(config, parts, resume=turn > 0)
        seconds = moments.uniform(0.0, 1.5)
        stopped += stop_after(process, parts / "checkpoints" / sign, seconds, how)
    assert stopped > 0, "the run was too fast to be stopped"
    finish(start(config, parts, resume=True))
    assert metrics(parts) == metrics(whole)
    assert results(parts) == results(whole)
    audits = [json.loads((folder / "audit.json").read_text()) for folder in (whole, parts)]
    for key in ("verdict", "noise", "first_update_gradients"):
        assert audits[0][key] == audits[1][key]
