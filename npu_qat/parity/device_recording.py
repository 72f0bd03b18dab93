"""Recordings of the conformance kit as files, to be sent and to be kept.

``NAME.json`` says what was asked and where: suite, device, backend, environment, and for each entry
the digests of its input and of every tensor that the device returned. ``NAME.safetensors`` beside
it holds the tensors themselves; the JSON has its SHA-256, so the two cannot be mixed up and damage
is found.

What can be made again is left out: the inputs, which every version of the kit can make; and, of
entries that equal the reference, the values in 16 bits and the large tensors (their digests stay).
What differs from the reference is kept whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from npu_qat.parity.device import Entry, Recording, Verdict

FORMAT = "npu-qat device recording"
VERSION = 1
KEPT_BYTES = 1 << 18
"""A tensor of an entry that equals the reference is kept up to this size."""


def write_recording(path: Path, recording: Recording, verdicts: Sequence[Verdict]) -> list[Path]:
    """Write ``path`` (``.json``) and the ``.safetensors`` beside it; returns both.

    Args:
        path: must end in ``.json``.
        recording: what the device answered.
        verdicts: of ``judge`` on the same recording, in its order.

    Raises ValueError for another ending.
    """
    from safetensors.torch import save

    tensors_path = _tensors_path(path)
    kept: dict[str, Tensor] = {}
    entries = []
    for entry, verdict in zip(recording.entries, verdicts, strict=True):
        names = [name for name, t in entry.tensors.items() if _keeps(name, t, verdict)]
        kept |= {_key(entry, name): entry.tensors[name].contiguous() for name in names}
        entries.append(_entry_as_dict(entry, names))
    data = save(kept)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "suite": recording.suite,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": recording.device,
        "stubbed": recording.stubbed,
        "backend": dict(recording.backend),
        "environment": dict(recording.environment),
        "tensors": {"file": tensors_path.name, "sha256": hashlib.sha256(data).hexdigest()},
        "differ": sum(not v.equal and not v.refused for v in verdicts),
        "entries": entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors_path.write_bytes(data)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [path, tensors_path]


def read_recording(path: Path) -> Recording:
    """Read what ``write_recording`` wrote.

    Raises ValueError for a file that is no recording, is newer than this program, or is damaged.
    """
    from safetensors.torch import load

    tensors_path = _tensors_path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a recording of 'npu-qat parity device'")
    if content["version"] != VERSION:
        raise ValueError(
            f"{path} has format version {content['version']} and this npu-qat reads {VERSION}"
        )
    if not tensors_path.exists():
        raise ValueError(f"{tensors_path} is missing: a recording is two files")
    data = tensors_path.read_bytes()
    if hashlib.sha256(data).hexdigest() != content["tensors"]["sha256"]:
        raise ValueError(f"{tensors_path} is damaged, or belongs to another recording")
    tensors = load(data)
    return Recording(
        suite=content["suite"],
        device=content["device"],
        backend=content["backend"],
        environment=content["environment"],
        entries=[_entry_from_dict(entry, tensors) for entry in content["entries"]],
    )


def _keeps(name: str, tensor: Tensor, verdict: Verdict) -> bool:
    if not verdict.equal:
        return True
    small = tensor.numel() * tensor.element_size() <= KEPT_BYTES
    return small and name not in ("values", "decoded")


def _tensors_path(path: Path) -> Path:
    if path.suffix != ".json":
        raise ValueError(f"{path}: name the .json file of the recording; the tensors go beside it")
    return path.with_suffix(".safetensors")


def _key(entry: Entry, name: str) -> str:
    return f"{entry.profile}/{entry.case}/{name}"


def _entry_as_dict(entry: Entry, kept: list[str]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "case": entry.case,
        "profile": entry.profile,
        "kind": entry.kind,
        "input": entry.input,
    }
    if entry.refused is not None:
        return {**content, "refused": entry.refused}
    return {**content, "digests": dict(entry.digests), "kept": kept}


def _entry_from_dict(content: dict[str, Any], tensors: dict[str, Tensor]) -> Entry:
    entry = Entry(
        case=content["case"],
        profile=content["profile"],
        kind=content["kind"],
        input=content["input"],
        refused=content.get("refused"),
        digests=content.get("digests", {}),
    )
    kept = {name: tensors[_key(entry, name)] for name in content.get("kept", [])}
    return Entry(**{**vars(entry), "tensors": kept})
