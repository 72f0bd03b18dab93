"""Safetensors files written while their tensors are still being made.

The library writes a file from tensors that are all in memory. Here the layout (names, types,
shapes) is known before the data, so the header is written first and each tensor goes to its place
when it comes: the memory is one tensor's. The format is eight bytes with the header's length, the
header as JSON, and the data without gaps; tensors with wide elements come first, so that each is
aligned. (huggingface/safetensors, README, "Format".)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from npu_qat.deploy.core import raw_bytes

DTYPE_NAMES = {
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes."""

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class ShardedWriter:
    """A set of safetensors files with an index, filled tensor by tensor. A context manager.

    Args:
        folder: where the files go.
        stem: ``<stem>-00001-of-00003.safetensors``, or ``<stem>.safetensors`` if one is enough.
        layout: names with meta tensors, in the order in which the data will come.
        shard_bytes: size at which a new file begins; a single tensor may exceed it.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        layout: Iterable[tuple[str, torch.Tensor]],
        shard_bytes: int,
    ) -> None:
        self.folder, self.stem = folder, stem
        shards = _split(layout, shard_bytes)
        self.names = [self._file_name(i, len(shards)) for i in range(len(shards))]
        self._headers: list[bytes] = []
        self._slots: dict[str, Slot] = {}
        self._handles: list[BinaryIO] = []
        for number, shard in enumerate(shards):
            self._lay_out(number, shard)
        self.total_bytes = sum(_size(t) for shard in shards for t in shard.values())
        self._weight_map = {n: self.names[slot.file] for n, slot in self._slots.items()}

    def __enter__(self) -> ShardedWriter:
        for name, header in zip(self.names, self._headers, strict=True):
            handle = open(self.folder / name, "xb")
            self._handles.append(handle)
            handle.write(header)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put ``tensor`` in its place. It must be what the layout said, and come once."""
        slot = self._slots.pop(name)
        assert (slot.dtype, slot.shape) == (tensor.dtype, tuple(tensor.shape)), name
        handle = self._handles[slot.file]
        handle.seek(slot.offset)
        handle.write(raw_bytes(tensor))

    def __exit__(self, kind: object, *rest: object) -> None:
        for handle in self._handles:
            handle.close()
        if kind is None:
            assert not self._slots, f"never written: {sorted(self._slots)[:3]}"
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self._weight_map}
            path = self.folder / f"{self.stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n")

    def _file_name(self, number: int, count: int) -> str:
        return f"{self.stem}-{number + 1:05d}-of-{count:05d}.safetensors"

    def _lay_out(self, number: int, shard: dict[str, torch.Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places: dict[str, int] = {}
        end = 0
        for name, tensor in sorted(shard.items(), key=lambda item: (-item[1].itemsize, item[0])):
            start, end = end, end + _size(tensor)
            places[name] = start
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._headers.append(len(text).to_bytes(8, "little") + text)
        for name, start in places.items():
            tensor = shard[name]
            offset = 8 + len(text) + start
            self._slots[name] = Slot(number, offset, tensor.dtype, tuple(tensor.shape))


def _split(
    layout: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in layout:
        if shards[-1] and size + _size(tensor) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += _size(tensor)
    return shards


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize
