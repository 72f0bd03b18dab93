"""``growth``: how the cost of a 4-bit training step grows with tokens, width, layers, processes.

The first three are LoRA steps as in ``train-step`` (image storage, beside PEFT in bf16), one thing
changed at a time. Processes are steps of the demo itself under ``torchrun`` (DeepSpeed, one process
a device, or several on one CPU), beside the same run in one process: the same work, shared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npu_qat.bench import models, train_step
from npu_qat.bench.rows import Row, Setup
from npu_qat.bench.timing import Times, accelerator

CPU_BASE, GPU_BASE = (32, 64), (4, 1024)  # sequences, tokens
STEPS = 4


def rows(setup: Setup) -> Iterator[Row]:
    """Rows with one thing changed at a time; the names say which."""
    name, base = (models.QWEN, GPU_BASE) if setup.on_gpu else (models.DEMO, CPU_BASE)
    common = {"num_hidden_layers": 4} if setup.on_gpu else {}
    factors = (1, 2) if setup.quick else (1, 2, 4)
    for factor in factors:
        batch = (base[0] * factor, base[1])
        label = f"{name}/tokens-{batch[0] * batch[1]}"
        yield from _steps(setup, name, models.architecture(name, **common), batch, label)
    for factor in factors[1:]:
        config = models.architecture(name, **common)
        for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
            setattr(config, key, getattr(config, key) * factor)
        config.num_key_value_heads *= factor
        label = f"{name}/width-{config.hidden_size}"
        yield from _steps(setup, name, config, base, label)
    for factor in factors[1:]:
        layers = models.architecture(name, **common).num_hidden_layers * factor
        config = models.architecture(name, num_hidden_layers=layers)
        yield from _steps(setup, name, config, base, f"{name}/layers-{layers}")
    yield from _processes(setup)


def _steps(
    setup: Setup, name: str, config: Any, batch: tuple[int, int], label: str
) -> Iterator[Row]:
    for row in train_step.steps(setup, name, config, batch, False, ("image",), label):
        yield Row(row.name.replace("train-step/", "growth/"), row.value, row.baseline)


def _processes(setup: Setup) -> Iterator[Row]:
    device = setup.selection.device
    most = accelerator(device).device_count() if setup.on_gpu else (os.cpu_count() or 1)
    counts = [count for count in (1, 2, 4, 8) if count <= most]
    times = {count: _demo_steps(setup, count) for count in counts[: 2 if setup.quick else None]}
    for count, measured in times.items():
        yield Row.of_times(f"growth/w4a4-ascend950/demo/processes-{count}", measured, times[1])


def _demo_steps(setup: Setup, processes: int) -> Times:
    """Times of the demo's steps but the first, in so many processes of one thread each."""
    changes = [
        f"train.steps={2 if setup.quick else STEPS}",
        f"run.device={setup.selection.device.type}",
        "evaluation.problems=4",
        "evaluation.baselines=[]",
        "noise.enabled=false",
        "dapo.dynamic_sampling=false",
        "dapo.generation_prompts=16",
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", "-m", "npu_qat", "train", "--preset", "demo"]
        command += [word for change in changes for word in ("--set", change)]
        run_dir = Path(folder) / "run"
        done = subprocess.run(
            [*command, "--output", str(run_dir)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"the demo in {processes} processes failed: {done.stderr.strip()[-400:]}"
            )
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines[1:]]
    return Times(tuple(1e3 * s for s in seconds))
