"""What reaches the screen: one console on rank 0, and errors as one readable line."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

from npu_qat.training.peers import INTERVAL, PEER_LOST, PeerLost

if TYPE_CHECKING:
    from rich.console import Console

FAILED = 2
INTERRUPTED = 130
# Width of tables where there is no terminal to ask (logs, pipes).
_PLAIN_WIDTH = 120


def rank() -> int:
    """This process's rank, as torchrun and the deepspeed launcher tell it; 0 without them."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes of this launch; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def _number(variable: str, alone: int) -> int:
    """Of a launcher; ``alone`` also for what is none, which training refuses (``engine.py``)."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else alone


def make_console() -> Console:
    """A console on standard output that is silent on every rank but 0."""
    from rich.console import Console

    console = Console(quiet=rank() != 0, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    return console


def report_line(text: str) -> None:
    """A line on standard error, from rank 0."""
    if rank() == 0:
        print(text, file=sys.stderr)


def report_error(error: BaseException) -> int:
    """Print ``error: ...`` on standard error and return the exit code.

    Mistakes of the user are ``ValueError`` and ``OSError`` and explain themselves; anything else
    is named by its class, with a hint at how to see where it came from.
    """
    if os.environ.get("NPU_QAT_DEBUG") == "1":
        traceback.print_exception(error)
    if rank() != 0 and _same_on_every_rank(error):
        return FAILED
    if isinstance(error, PeerLost):  # one voice a machine; it names the machine itself
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return PEER_LOST
    text = str(error) or type(error).__name__
    if not isinstance(error, (ValueError, OSError, ImportError)):
        text = f"{type(error).__name__}: {text}"
        if os.environ.get("NPU_QAT_DEBUG") != "1":
            text += "\n(NPU_QAT_DEBUG=1 shows where it came from)"
    who = f"[rank {rank()}] " if world_size() > 1 and rank() != 0 else ""
    print(f"{who}error: {text}", file=sys.stderr)
    return FAILED


def end_failed_rank(code: int) -> int:
    """``code``; but a process that has joined others ends here, without Python's clean-up.

    That would take down the process group, and wait for ranks that are gone or stuck. A launcher
    ends all processes of a machine after the first: so one that may be silent leaves its neighbours
    the time to say why.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        sys.stderr.flush()
        time.sleep(INTERVAL)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _same_on_every_rank(error: BaseException) -> bool:
    """A wrong configuration is wrong everywhere; once is enough to say so."""
    from npu_qat.config.errors import ConfigError

    return isinstance(error, ConfigError)
