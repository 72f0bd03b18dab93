"""Where results of a matrix live: one file a cell, written once, never written again.

A result is keyed by what made it: ``<cell>--<configuration digest>--<code digest>.json``. The code
digest covers the sources that decide numbers (not the command line, reports or documentation), so a
result that was made by other code is another result and lies beside it. A cell that failed leaves
``... .failed-1.json`` with its error; a second attempt that fails leaves a second one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from npu_qat.experiments.matrix import DIGITS, Cell
from npu_qat.training.rundir import prove_writable

FORMAT = 1
PACKAGE = Path(__file__).resolve().parents[1]
# What decides a cell's numbers, below the package.
DECIDES = (
    *("numerics", "backends", "layers", "noise", "tasks", "training", "evaluation"),
    *("config/schema.py", "experiments/run.py", "experiments/evidence.py"),
)

# What every record has; the rest depends on what became of its cell.
_ALWAYS = ("arm", "model", "seed", "status", "finished")


@lru_cache(maxsize=2)
def code_digest(package: Path = PACKAGE) -> str:
    """Digest of the sources that decide results, of this package or of another copy."""
    digest = hashlib.sha256()
    for part in DECIDES:
        place = package / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.relative_to(package).as_posix().encode() + b"\0")
            digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:DIGITS]


@dataclass(frozen=True)
class Store:
    """A folder of results.

    Attributes:
        folder: where the files are; made when the first is written.
        any_code: take a result whatever code made it (the newest), not that of this code only.
    """

    folder: Path
    any_code: bool = False

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The result of ``cell``, or None."""
        found = [r for p in self._files(cell) if (r := _read(p))["status"] == "done"]
        return max(found, key=lambda r: str(r["finished"]), default=None)

    def failures(self, cell: Cell) -> list[dict[str, Any]]:
        """Failed attempts at ``cell``, oldest first."""
        found = [r for p in self._files(cell) if (r := _read(p))["status"] == "failed"]
        return sorted(found, key=lambda r: str(r["finished"]))

    def add(self, cell: Cell, record: dict[str, Any]) -> Path:
        """Write the record of ``cell``; it has ``status`` done or failed.

        Raises:
            FileExistsError: there is a result of this configuration and code already.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{cell.id}--{cell.digest}--{code_digest()}"
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
        if record["status"] == "done":
            return _write_new(self.folder / f"{stem}.json", text)
        attempt = 1
        while True:
            try:
                return _write_new(self.folder / f"{stem}.failed-{attempt}.json", text)
            except FileExistsError:
                attempt += 1

    def check_writable(self) -> None:
        """Make the folder, and a file in it: hours of work are to end there.

        Raises:
            OSError: that failed.
        """
        try:
            prove_writable(self.folder)
        except OSError as error:
            raise OSError(
                f"results cannot be written to {self.folder}: {error.strerror}; give --results"
            ) from None

    def _files(self, cell: Cell) -> Iterator[Path]:
        code = "*" if self.any_code else code_digest()
        yield from sorted(self.folder.glob(f"{cell.id}--{cell.digest}--{code}.json"))
        yield from sorted(self.folder.glob(f"{cell.id}--{cell.digest}--{code}.failed-*.json"))

    def unknown(self, cells: list[Cell]) -> list[str]:
        """Files that belong to none of ``cells``: results of another version of the matrix."""
        known = {path.name for cell in cells for path in Store(self.folder, True)._files(cell)}
        return sorted(path.name for path in self.folder.glob("*.json") if path.name not in known)


def pack_outcomes(outcomes: Sequence[bool]) -> str:
    """0/1 outcomes as ``<count>:<hexadecimal digits>``, the first problem in the highest bit."""
    bits = "".join("1" if outcome else "0" for outcome in outcomes)
    return f"{len(bits)}:{int(bits or '0', 2):x}"


def unpack_outcomes(text: str) -> list[bool]:
    """The inverse of ``pack_outcomes``."""
    count, _, digits = text.partition(":")
    bits = f"{int(digits, 16):0{int(count)}b}" if int(count) else ""
    return [bit == "1" for bit in bits]


def _read(path: Path) -> dict[str, Any]:
    """Raises ``ValueError`` for a file that is no result of this version."""
    advice = "the file was damaged, restore or delete it"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        raise ValueError(f"{path}: not valid JSON ({reason}); {advice}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not a result; {advice}")
    if record.get("format") != FORMAT:
        raise ValueError(f"{path}: format {record.get('format')} is not {FORMAT} of this version")
    if missing := [key for key in _ALWAYS if key not in record]:
        raise ValueError(f"{path}: there is no {missing[0]!r} in it; {advice}")
    return record


def _write_new(target: Path, text: str) -> Path:
    """Write ``target`` whole or not at all, and never over what is there."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    try:
        os.link(partial, target)  # fails if it exists, unlike a rename
    finally:
        partial.unlink()
    return target
