"""Checkpoints that survive a kill, and resume to the same numbers.

A checkpoint holds the fp32 master weights of the adapters, Adam's moments and a few counters: all
that differs from step 0, since the base is frozen and every random number is a function of (seed,
step, row). It does not depend on the ZeRO stage or the number of processes that wrote it, because
the partitions are gathered first (``Engine.state``). DeepSpeed's own checkpoints hold partitions,
which only the same number of processes can load. Whole ones cost little, since adapters are small.

It is written into a hidden folder, flushed, listed with checksums in ``manifest.json`` and renamed
into place. Whatever interrupts that leaves either no checkpoint or a whole one; one that is
damaged later (a disk that lies, a hand that edits) fails its checksums and the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STATE, COUNTERS, MANIFEST = "state.safetensors", "counters.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A state of training after ``step`` steps."""

    step: int
    state: dict[str, torch.Tensor]
    counters: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``checkpoint`` below ``folder``; of those up to it only the newest ``keep`` stay.

    Later ones go, too: training went back to before them because they were damaged.
    """
    target = folder / f"step-{checkpoint.step:06d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(checkpoint.state, partial / STATE)
    (partial / COUNTERS).write_text(json.dumps(checkpoint.counters | {"step": checkpoint.step}))
    sums = {name: _sha256(partial / name) for name in (STATE, COUNTERS)}
    (partial / MANIFEST).write_text(json.dumps(sums, indent=2))
    for name in (STATE, COUNTERS, MANIFEST, "."):
        _flush(partial / name)
    if _manifest(target) == sums and _damage(target) is None:
        # Stopped right after a resume: this state is there, and at no moment must there be none.
        shutil.rmtree(partial)
    else:
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
    _flush(folder)
    earlier = [path for path in _folders(folder) if _step(path) <= checkpoint.step]
    later = [path for path in _folders(folder) if _step(path) > checkpoint.step]
    for old in (*earlier[:-keep], *later):
        shutil.rmtree(old)
    return target


def load_newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint below ``folder``; damaged ones are named by ``warn``."""
    for path in reversed(_folders(folder)):
        if problem := _damage(path):
            warn(f"{path} is damaged ({problem}); looking for the checkpoint before it")
            continue
        counters = json.loads((path / COUNTERS).read_text())
        return Checkpoint(counters.pop("step"), load_file(path / STATE), counters)
    if _folders(folder):
        warn(f"no intact checkpoint in {folder}; starting at step 0")
    return None


def has_checkpoints(folder: Path) -> bool:
    """Whether there is any below ``folder``, intact or not."""
    return bool(_folders(folder))


def _folders(folder: Path) -> list[Path]:
    """Those that this module wrote, in the order of steps: ``step-000010-best`` is the user's."""
    ours = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name))
    return sorted(ours, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _manifest(path: Path) -> dict[str, str] | None:
    """Checksums by file name; None if they cannot be read."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return sums if isinstance(sums, dict) else None


def _damage(path: Path) -> str | None:
    sums = _manifest(path)
    if sums is None:
        return "no readable manifest"
    for name in (STATE, COUNTERS):
        if not (path / name).exists():
            return f"{name} is missing"
        if sums.get(name) != _sha256(path / name):
            return f"{name} fails its checksum"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
