"""Files that travel with the package: the demo model, checked before it is used.

A clone without its large files, a broken download or a hand edit would otherwise show itself much
later, as an odd tensor error or as results that differ from the documented ones.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "demo_model"


def demo_model_path() -> Path:
    """Folder of the embedded demo model, in Hugging Face's layout, after a checksum of each file.

    Raises:
        FileNotFoundError: if the folder, its `SHA256SUMS` or a listed file is missing.
        ValueError: if a file differs from its checksum or the list cannot be read.
    """
    return verified_folder(DEMO_MODEL)


def verified_folder(folder: Path) -> Path:
    """`folder`, once every file listed in its `SHA256SUMS` has been compared with its checksum."""
    listing = folder / "SHA256SUMS"
    if not listing.is_file():
        raise FileNotFoundError(
            f"{listing} is missing: the demo model was not installed whole. Reinstall npu-qat, "
            "or make the model anew with scripts/pretrain_demo.py"
        )
    for line in listing.read_text().splitlines():
        expected, separator, name = line.partition("  ")
        if not separator or len(expected) != 64:
            raise ValueError(f"{listing}: cannot read the line {line!r}")
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, but {listing} lists it: reinstall npu-qat")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"{file} is damaged or was edited: its SHA-256 is {found}, expected {expected}. "
                "Reinstall npu-qat, or run scripts/pretrain_demo.py for a model of your own"
            )
    return folder
