"""What rank 0 has on its disk, for all ranks.

Rank 0 alone writes a run. If the others read the files themselves, a run needs a file system that
all machines share, and one without the delay by which a network file system shows a new file to
some machines before others: two ranks that disagree on the newest checkpoint train two models. So
rank 0 reads, and sends.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed

from npu_qat.training.checkpoint import Checkpoint, has_checkpoints, load_newest


def first_says(value: Any) -> Any:
    """Rank 0's ``value``, on every rank; plain data."""
    if not _several():
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def load_newest_for_all(
    folder: Path, warn: Callable[[str], None], device: torch.device
) -> Checkpoint | None:
    """The newest intact checkpoint of rank 0, on every rank, whatever wrote it.

    Args:
        folder: as ``load_newest`` takes it.
        warn: called on rank 0 with what was damaged.
        device: through which tensors travel; what is returned is on the CPU.

    Raises:
        ValueError: rank 0 has none, but a rank on another machine has.
    """
    if not _several():
        return load_newest(folder, warn)
    _check_place(folder)
    mine = load_newest(folder, warn) if distributed.get_rank() == 0 else None
    head = None
    if mine is not None:
        head = mine.step, mine.counters, {name: tuple(v.shape) for name, v in mine.state.items()}
    head = first_says(head)
    if head is None:
        return None
    step, counters, shapes = head
    state = {}
    for name, shape in shapes.items():
        value = torch.empty(shape) if mine is None else mine.state[name]
        value = value.to(device)
        distributed.broadcast(value, src=0)
        state[name] = value.cpu()
    return Checkpoint(step, state, counters)


@contextmanager
def folder_for_all(folder: Path) -> Iterator[Path]:
    """``folder`` of rank 0, a small one such as an adapter's, on every rank inside the block.

    A folder that is there is not therefore rank 0's: without a shared file system it may be left
    from an earlier run, and a kill may have cut it off. So contents are compared, and a rank whose
    own differ reads a copy in a temporary folder; what it has under that name stays as it is.

    Raises:
        FileNotFoundError: rank 0 has no such folder, or no file in it.
    """
    if not _several():
        yield folder
        return
    distributed.barrier()  # rank 0 may just have written it
    mine = _read(folder)
    prints = _everyones(_fingerprint(mine))
    if not prints[0]:
        raise FileNotFoundError(f"{folder} is not on the machine of rank 0, or is empty")
    if all(found == prints[0] for found in prints):
        yield folder
        return
    rank = distributed.get_rank()
    content = first_says(mine if rank == 0 else None)
    if prints[rank] == prints[0]:
        yield folder
        return
    with TemporaryDirectory(prefix="npu-qat-") as own:
        for name, data in content.items():
            (Path(own) / name).write_bytes(data)
        yield Path(own)


def _check_place(folder: Path) -> None:
    """A run that was written on one machine must not begin anew on another."""
    found = _everyones((socket.gethostname(), has_checkpoints(folder)))
    here, there = found[0], next((host for host, has in found if has), None)
    if not here[1] and there is not None and there != here[0]:
        raise ValueError(
            f"rank 0 is on {here[0]} now, where {folder} has no checkpoint, but {there} has some: "
            f"give {there} node rank 0, as before, or copy the run directory to {here[0]}"
        )


def _read(folder: Path) -> dict[str, bytes]:
    """Content by file name; empty if there is no such folder."""
    if not folder.is_dir():
        return {}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _fingerprint(files: dict[str, bytes]) -> str:
    """Of names and contents; empty for no files."""
    if not files:
        return ""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _everyones(value: Any) -> list[Any]:
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def _several() -> bool:
    return distributed.is_initialized() and distributed.get_world_size() > 1
