"""The run directory: everything about a run, in one folder, written so that a kill loses little.

JSON files are replaced atomically (written beside, flushed, renamed); JSON lines are appended a
whole line at a time. Before training starts, the directory is proven writable and large enough,
because a full disk after six hours is the wrong moment to learn of it. A run in progress holds a
lock, so that two processes never train into one folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
# What the run's quantised base is: written once it is made.
BASE = "base.json"
# A run that has none of these has nothing to lose.
RESULTS = (BASE, "evaluations", "checkpoints", METRICS)


class RunDirectoryError(ValueError):
    """The folder cannot hold this run; the message says why and what to do."""


class RunDirectory:
    """Paths and writers of one run.

    Args:
        path: the folder; created if absent.
        writer: False on all ranks but the first, whose calls then do nothing.
    """

    def __init__(self, path: Path, *, writer: bool = True) -> None:
        self.path, self.writer = Path(path), writer

    def holds_run(self) -> bool:
        """Whether there is a run that a new one would write over. One that failed before its first
        result, for want of a model perhaps, left descriptions only and is in nobody's way."""
        if not (self.path / "config.yaml").exists():
            return False
        described = (self.path / "environment.json").exists()
        return not described or any((self.path / name).exists() for name in RESULTS)

    def prepare(self, *, resume: bool, bytes_needed: int) -> None:
        """Create the folder and prove that it can hold the run.

        Raises:
            RunDirectoryError: it holds a run and ``resume`` is off, cannot be written, or the disk
                has less than ``bytes_needed`` free.
        """
        if not self.writer:
            return
        if self.holds_run() and not resume:
            raise RunDirectoryError(
                f"{self.path} holds a run already; continue it with --resume auto, or choose "
                "another --output"
            )
        try:
            prove_writable(self.path)
        except OSError as error:
            raise RunDirectoryError(f"cannot write to {self.path}: {error.strerror}") from error
        self.check_space(bytes_needed)

    def check_space(self, bytes_needed: int) -> None:
        """Raise ``RunDirectoryError`` if the disk has less than ``bytes_needed`` free."""
        if not self.writer:
            return
        free = shutil.disk_usage(self.path).free
        if free < bytes_needed:
            raise RunDirectoryError(
                f"{self.path}: {free / 2**20:.0f} MiB free, but this run may write "
                f"{bytes_needed / 2**20:.0f} MiB; free some space, choose another --output, or "
                "lower train.keep_checkpoints"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the lock dies with the process.

        Raises:
            RunDirectoryError: another process trains into it.
        """
        if not self.writer:
            yield
            return
        with open(self.path / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunDirectoryError(f"another process is training into {self.path}") from error
            yield

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append ``record`` as one line of ``name``."""
        if self.writer:
            with open(self.path / name, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record, ensure_ascii=False) + "\n")

    def write_json(self, name: str, content: Any) -> None:
        """Replace the JSON file ``name`` atomically."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replace the text file ``name`` atomically."""
        if self.writer:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, text.encode())

    def read_json(self, name: str) -> Any | None:
        """The content of ``name``, or None if it does not exist."""
        target = self.path / name
        return json.loads(target.read_text("utf-8")) if target.exists() else None

    def forget_after(self, arm: str, step: int) -> None:
        """Drop the lines of ``arm`` that lie after ``step``: a resumed run writes them anew.

        A last line that a kill cut off is dropped, too.
        """
        if not self.writer:
            return
        for name in (METRICS, SAMPLES):
            target = self.path / name
            if not target.exists():
                continue
            kept = []
            # Not splitlines(): completions may hold U+2028. Half a character may end the file.
            for line in target.read_text("utf-8", errors="replace").split("\n"):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if not isinstance(record, dict):
                    continue
                if record.get("arm") != arm or record.get("step", 0) <= step:
                    kept.append(line)
            self.write_text(name, "".join(f"{line}\n" for line in kept))


def prove_writable(folder: Path) -> None:
    """Make ``folder``, and a file in it for a moment: before the work whose results are to lie
    there. Raises ``OSError`` if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{os.getpid()}.probe"
    try:
        probe.write_text("probe")  # an empty file needs no room
    finally:
        probe.unlink(missing_ok=True)


def write_atomically(target: Path, content: bytes) -> None:
    """Write ``content`` beside ``target``, flush it to the disk, and rename it into place."""
    partial = target.with_name(f".{target.name}.partial")
    with open(partial, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, target)
