"""A sign of life for whoever watches a run from outside: a file whose time of change is now.

A training process that hangs, in a collective of which one rank has died say, still exists, so
asking for the process says nothing. The loops of a run ask often whether the user wants to stop:
between the steps, in rollouts and in evaluations. Each time they ask, a file is touched, at most
once a second, and ``npu-qat healthcheck`` looks at the file's age, which takes no torch.

The environment variable ``NPU_QAT_HEARTBEAT`` names the file; without it there is none. In a
container it lies outside of the run directory, because the one of an earlier container says
nothing about this one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

VARIABLE = "NPU_QAT_HEARTBEAT"
SECONDS_BETWEEN_BEATS = 1.0


def with_heartbeat(should_stop: Callable[[], bool]) -> Callable[[], bool]:
    """``should_stop``, which touches the file that ``NPU_QAT_HEARTBEAT`` names when it is asked.

    Touches it once at once. Raises ``OSError`` if the file cannot be written.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return should_stop
    file = Path(name)
    file.touch()
    last = time.monotonic()

    def ask() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_BEATS:
            with suppress(OSError):  # a full disk is no reason to end training; the file gets old
                file.touch()
            last = now
        return should_stop()

    return ask


def age(file: Path) -> float | None:
    """Seconds since the last beat; None if there was none yet."""
    try:
        return max(time.time() - file.stat().st_mtime, 0.0)
    except FileNotFoundError:
        return None
