"""All benchmarks by name, and one run of some of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from npu_qat.backends import select
from npu_qat.bench import dapo_step, decode, fake_quant, growth, linear, train_step
from npu_qat.bench.rows import Note, Row, Setup
from npu_qat.bench.timing import Clock
from npu_qat.experiments.environment import describe_environment

BENCHMARKS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "fake-quant": fake_quant.rows,
    "linear": linear.rows,
    "train-step": train_step.rows,
    "decode": decode.rows,
    "dapo-step": dapo_step.rows,
    "growth": growth.rows,
}
QUICK_REPEATS = 3


def make_setup(
    device: str, backend: str, *, repeats: int, quick: bool, peers: bool, note: Note
) -> Setup:
    """Choose device and backend, and the clock. Raises BackendUnavailable."""
    selection = select(device, backend)
    if selection.device.type == "npu":
        note("this benchmark was never run on an NPU by its authors; look at its times with care")
    clock = Clock(selection.device, repeats=QUICK_REPEATS if quick else repeats)
    return Setup(selection, clock, quick=quick, peers=peers, note=note)


def measure(setup: Setup, names: list[str], seen: Callable[[Row], None]) -> None:
    """Run the named benchmarks; ``seen`` gets each row as it is made.

    A benchmark that runs out of memory is reported and left; others go on.
    """
    for name in names:
        try:
            for row in BENCHMARKS[name](setup):
                seen(row)
        except torch.OutOfMemoryError as error:
            setup.note(f"{name}: stopped, {str(error).splitlines()[0]}")


def environment(setup: Setup, command: str) -> dict[str, Any]:
    """Machine, versions, load, and what was asked for."""
    return {
        "command": command,
        **describe_environment(setup.selection),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "repeats": setup.clock.repeats,
        "clock": _clock(setup),
        "computed_by": setup.selection.backend.describe(),
    }


def _clock(setup: Setup) -> str:
    if setup.clock.counts_processor_time:
        return "processor time (runs of the demo: time passed)"
    return "time passed"
