"""``dapo-step``: a whole step of the embedded demo, rollout and updates, beside its 16-bit arm.

This is the one benchmark that runs the product itself, from configuration to metrics, and reads
the times of its steps. Both arms sample the same number of completions for the same problems:
noise, which only the 4-bit arm has, and dynamic sampling, which samples more for an arm that is
right more often, are off. The arms train one after the other in a run, so there are several runs.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npu_qat.bench.rows import Row, Setup
from npu_qat.bench.timing import Times

ROUNDS, STEPS = 2, 5
ARMS = ("w4a4", "bf16_lora")


def rows(setup: Setup) -> Iterator[Row]:
    """One row, on a CPU; the demo model is too small to say anything about a GPU."""
    if setup.on_gpu:
        return
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for _ in range(1 if setup.quick else ROUNDS):
        for line in _metrics(setup, 2 if setup.quick else STEPS):
            if line["step"] > 1:  # the first one compiles and warms up
                found[line["arm"]].append(line)
    ours, baseline = (Times(tuple(line["seconds"] * 1e3 for line in found[arm])) for arm in ARMS)
    rates = {
        f"{name}_tokens_per_second": _median([line["tokens_per_second"] for line in found[arm]])
        for name, arm in zip(("rollout", "baseline_rollout"), ARMS, strict=True)
    }
    yield Row.of_times("dapo-step/w4a4-ascend950/demo", ours, baseline, **rates)


def _metrics(setup: Setup, steps: int) -> list[dict[str, Any]]:
    """The metrics of one short run."""
    from rich.console import Console

    from npu_qat.config import load_run, parse_overrides
    from npu_qat.experiments.run import execute

    names = {"emulation": "reference"}
    backend = setup.selection.backend.name
    changes = [
        f"train.steps={steps}",
        f"run.device={setup.selection.device.type}",
        f"run.backend={names.get(backend, backend)}",
        "evaluation.problems=4",
        "evaluation.baselines=[bf16_lora]",
        "noise.enabled=false",
        "dapo.dynamic_sampling=false",
        "dapo.generation_prompts=16",
    ]
    config = load_run(None, preset="demo", overrides=parse_overrides(changes)).config
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        execute(config, run_dir, Console(file=io.StringIO()), report=False)
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _median(values: list[float]) -> float:
    return Times(tuple(values)).median
