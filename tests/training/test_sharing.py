"""A folder of rank 0 on all ranks: whatever lies at its path on another machine is not trusted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from npu_qat.training import sharing
from npu_qat.training.sharing import folder_for_all

ADAPTER = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": bytes(range(256))}
COUNT = 3


class Ranks(threading.local):
    """``torch.distributed`` for threads: the ranks of one test, each on a disk of its own."""

    rank = 0
    meeting = threading.Barrier(COUNT, timeout=10)
    shelf: list[Any] = [None] * COUNT

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return COUNT

    def get_rank(self) -> int:
        return self.rank

    def barrier(self) -> None:
        self.meeting.wait()

    def all_gather_object(self, found: list[Any], value: Any) -> None:
        self.shelf[self.rank] = value
        self.barrier()
        found[:] = self.shelf
        self.barrier()

    def broadcast_object_list(self, held: list[Any], src: int) -> None:
        found = [None] * COUNT
        self.all_gather_object(found, held[0])
        held[0] = found[src]


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def absent(folder: Path) -> None:
    """Nothing was written on that machine."""


def stale(folder: Path) -> None:
    write(folder, ADAPTER | {"adapter_model.safetensors": bytes(256)})


def cut_off(folder: Path) -> None:
    write(folder, ADAPTER | {"adapter_model.safetensors": bytes(range(100))})


def partial(folder: Path) -> None:
    write(folder, {"adapter_config.json": ADAPTER["adapter_config.json"]})


def late(folder: Path) -> None:
    """A network file system shows the folder, and its files later."""
    folder.mkdir(parents=True)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ranks:
    fake = Ranks()
    monkeypatch.setattr(sharing, "distributed", fake)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return fake


def on_each(ranks: Ranks, work: Callable[[int], Any]) -> list[Any]:
    def one(rank: int) -> Any:
        ranks.rank = rank
        return work(rank)

    with ThreadPoolExecutor(COUNT) as pool:
        return list(pool.map(one, range(COUNT)))


@pytest.mark.parametrize("other", [absent, stale, cut_off, partial, late])
def test_every_rank_reads_what_rank_0_has(
    other: Callable[[Path], None], ranks: Ranks, tmp_path: Path
) -> None:
    disks = [tmp_path / f"disk-{rank}" / "adapters" / "w4a4" for rank in range(COUNT)]
    for disk in disks[:2]:
        write(disk, ADAPTER)
    other(disks[2])
    before = read(disks[2])

    def work(rank: int) -> tuple[Path, dict[str, bytes]]:
        with folder_for_all(disks[rank]) as here:
            return here, read(here)

    found = on_each(ranks, work)
    assert [files for _, files in found] == [ADAPTER] * COUNT
    assert [here == disk for (here, _), disk in zip(found, disks, strict=True)] == [1, 1, 0]
    assert read(disks[2]) == before, "what the machine has stays as it is"
    assert list((tmp_path / "temporary").iterdir()) == [], "the copy is gone"


def test_one_shared_folder_is_read_where_it_is(ranks: Ranks, tmp_path: Path) -> None:
    write(tmp_path / "shared", ADAPTER)

    def work(rank: int) -> Path:
        with folder_for_all(tmp_path / "shared") as here:
            return here

    assert on_each(ranks, work) == [tmp_path / "shared"] * COUNT


def test_a_folder_that_rank_0_lacks_fails_everywhere(ranks: Ranks, tmp_path: Path) -> None:
    write(tmp_path / "disk-1", ADAPTER)

    def work(rank: int) -> str:
        with (
            pytest.raises(FileNotFoundError) as raised,
            folder_for_all(tmp_path / f"disk-{rank}"),
        ):
            pass
        return str(raised.value)

    assert all("is not on the machine of rank 0" in text for text in on_each(ranks, work))


def test_one_process_reads_its_own(tmp_path: Path) -> None:
    with folder_for_all(tmp_path / "nowhere") as here:
        assert here == tmp_path / "nowhere"
