"""Whether all machines see one run directory, and what follows if they do not.

Rank 0 alone writes checkpoints, metrics and the report, and sends the others what they must read
(training/sharing.py). So a run works without a shared file system; but a resumed run goes on only
if rank 0 is again on the machine that has the folder.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from npu_qat.cluster.check import Check

# Network file systems keep old listings for some seconds.
PATIENCE = 5.0


def nearest(folder: Path) -> Path:
    """``folder``, or the nearest of its parents that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())


def look(
    folder: Path, facts: Sequence[dict[str, Any]], everyones: Callable[[Any], list[Any]]
) -> Check:
    """Rank 0 leaves a file beside the run, the others look for it. All ranks must call this.

    Args:
        folder: the run directory; it need not exist yet.
        facts: of all ranks.
        everyones: gathers an object of every rank, in their order.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    problem, sign = None, None
    if first:
        sign = nearest(folder) / f".npu-qat-{secrets.token_hex(8)}"
        try:
            sign.write_text("seen")
        except OSError as error:
            problem = f"cannot write to {sign.parent}: {error.strerror}"
    place, problem = everyones((sign and str(sign), problem))[0]
    seen = problem is None and _appears(Path(place))
    found = everyones(seen)
    if sign is not None and problem is None:
        with suppress(OSError):
            sign.unlink()
    return judge(folder, Path(place).parent, problem, facts, found)


def judge(
    folder: Path,
    where: Path,
    problem: str | None,
    facts: Sequence[dict[str, Any]],
    seen: Sequence[bool],
) -> Check:
    """``seen``: whether each rank found the file that rank 0 left in ``where``."""
    name = "run directory"
    if problem is not None:
        return Check("agreement", name, "missing", problem, "choose another --output")
    blind = list(dict.fromkeys(f["host"] for f, s in zip(facts, seen, strict=True) if not s))
    if not blind:
        return Check("agreement", name, "ok", f"every rank sees what rank 0 writes to {where}")
    return Check(
        "agreement",
        name,
        "warning",
        f"{folder} of {facts[0]['host']} is not seen by {', '.join(blind)}",
        f"it works: rank 0 writes, and sends what others need. To resume, rank 0 must be on "
        f"{facts[0]['host']} again (fixed node ranks), or put --output on a shared file system",
    )


def _appears(path: Path) -> bool:
    until = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
