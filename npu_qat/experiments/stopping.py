"""Ctrl-C as a request: the run ends at the next safe place, with a checkpoint.

The second signal means it: the handler of before is back by then.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request; yields whether one came, as a function.

    Outside the main thread Python delivers no signals, and nothing is changed.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        requested.set()
        restore()
        say("stopping at the next safe place, with a checkpoint; once more stops at once")

    for number in SIGNALS:
        signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        restore()
