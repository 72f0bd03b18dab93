"""The watch over the other ranks: who is lost, who is only slow, and what is said about it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest

from npu_qat.training import peers
from npu_qat.training.peers import PeerLost, PeerWatch, failures_told, is_communication_error

FAST = 0.02


class Memory:
    """The store of a launch, in one process; can be made to refuse or to hang."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.broken = False
        self.hanging = threading.Event()
        self.lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        self._may_answer()
        with self.lock:
            self.values[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        while True:
            self._may_answer()
            with self.lock:
                if all(key in self.values for key in keys):
                    return [self.values[key] for key in keys]
            time.sleep(0.001)

    def _may_answer(self) -> None:
        if self.broken:
            raise ConnectionError("Broken pipe")
        if self.hanging.is_set():
            time.sleep(5)


class World:
    """Watches of several ranks on two hosts over one store."""

    def __init__(self, count: int, patience: float = 0.5) -> None:
        self.store = Memory()
        self.left: dict[int, str] = {}
        self.watches = [
            PeerWatch(
                self.store,
                rank,
                count,
                host=f"node-{'ab'[rank >= count // 2]}",
                interval=FAST,
                patience=patience,
                leave=lambda verdict, rank=rank: self.left.setdefault(rank, verdict),
            )
            for rank in range(count)
        ]
        for watch in self.watches:
            watch.start()

    def freeze(self, rank: int) -> None:
        """As if the process were killed: no thread of it writes any more."""
        self.watches[rank]._ended.set()

    def until(self, rank: int, seconds: float = 5.0) -> str:
        """The verdict of ``rank``, which must come."""
        end = time.monotonic() + seconds
        while self.watches[rank].verdict is None and time.monotonic() < end:
            time.sleep(FAST / 2)
        verdict = self.watches[rank].verdict
        assert verdict is not None, "no verdict"
        return verdict


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(peers, "GRACE", 0.05)
    monkeypatch.setattr(peers, "QUICK", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    made = World(4)
    yield made
    for watch in made.watches:
        watch._ended.set()


def test_nobody_is_lost_while_all_are_there(world: World) -> None:
    time.sleep(1.0)
    assert [watch.verdict for watch in world.watches] == [None] * 4
    assert world.left == {}


def test_a_silent_machine_is_named_with_its_ranks_by_everyone(world: World) -> None:
    for rank in (2, 3):
        world.freeze(rank)
    started = time.monotonic()
    verdicts = [world.until(rank) for rank in (0, 1)]
    assert 0.3 < time.monotonic() - started < 2.0
    assert verdicts[0] == verdicts[1]
    assert verdicts[0].startswith("node-b (ranks 2, 3): no sign of life for")


def test_a_process_that_hangs_in_a_collective_is_ended_by_its_watch(world: World) -> None:
    world.freeze(3)
    world.until(0)
    time.sleep(0.5)
    assert set(world.left) >= {0, 1}
    assert "node-b (rank 3)" in world.left[1]


def test_a_broken_collective_shortens_the_wait(world: World) -> None:
    for watch in world.watches:
        watch.patience = 60.0
    world.freeze(2)
    error = world.watches[1].explain(RuntimeError("[gloo/transport/tcp/pair.cc:1] x"))
    assert isinstance(error, PeerLost) and "node-b (rank 2): no sign of life" in str(error)


def test_a_failure_here_is_told_to_the_others_with_its_reason(world: World) -> None:
    assert world.watches[3].explain(MemoryError("the device is full\nmore")) is None
    wanted = "rank 3 on node-b failed: MemoryError: the device is full"
    assert [world.until(rank) for rank in (0, 1)] == [wanted] * 2


def test_a_failure_of_rank_0_is_told_before_it_leaves_with_the_store(world: World) -> None:
    assert world.watches[0].explain(ValueError("no space in runs/x")) is None
    world.store.broken = True
    for rank in (1, 2, 3):
        assert world.until(rank) == "rank 0 on node-a failed: ValueError: no space in runs/x"


def test_a_store_that_is_gone_means_that_rank_0_is(world: World) -> None:
    time.sleep(5 * FAST)
    world.freeze(0)
    world.store.broken = True
    verdict = world.until(2)
    assert verdict.startswith("node-a (rank 0), with the rendezvous at 10.0.0.1:29500")
    assert "Broken pipe" in verdict


def test_a_store_that_hangs_does_not_hold_the_verdict(world: World) -> None:
    time.sleep(5 * FAST)
    world.freeze(0)
    world.store.hanging.set()
    verdict = world.until(1)
    assert "node-a (rank 0)" in verdict and "no answer for" in verdict


def test_who_leaves_in_peace_is_not_missed(world: World) -> None:
    threads = [threading.Thread(target=watch.close) for watch in world.watches[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(1.0)
    assert world.watches[0].verdict is None
    world.watches[0].close()
    assert world.left == {}


def test_ranks_that_are_still_busy_do_not_miss_a_rank_0_that_left(world: World) -> None:
    world.watches[0].close()  # waits, so that all have seen it
    world.store.broken = True
    time.sleep(1.0)
    assert [watch.verdict for watch in world.watches[1:]] == [None] * 3


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (RuntimeError("EI0006: Getting socket times out"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("out of memory"), False),
        (ValueError("a NCCL word in a user's mistake"), False),
    ],
)
def test_errors_of_collectives_are_told_from_own_ones(error: Exception, wanted: bool) -> None:
    assert is_communication_error(error) is wanted


def test_a_failed_collective_becomes_a_message_with_the_way_to_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_current", world.watches[1])
    monkeypatch.setenv(peers.LAUNCH_VARIABLE, "scripts/launch_multinode.sh --nodes 2 -- train x")
    world.freeze(3)
    with pytest.raises(PeerLost) as raised, failures_told():
        raise RuntimeError("Connection closed by peer [10.0.0.2]:4711")
    text = str(raised.value)
    assert "node-b (rank 3)" in text
    assert "scripts/launch_multinode.sh --nodes 2 -- train x --resume auto" in text
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert not peers.stop_watching(), "cleaning up would wait for the lost one"


def test_an_own_error_stays_what_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_current", world.watches[1])
    with pytest.raises(KeyError), failures_told():
        raise KeyError("x")


def test_an_agreed_stop_is_no_failure(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_current", world.watches[1])
    with pytest.raises(KeyboardInterrupt), failures_told(KeyboardInterrupt):
        raise KeyboardInterrupt
    assert json.loads(world.store.values["npu_qat/peers/1"])["state"] == "alive"


def test_a_failure_that_is_still_being_told_is_not_taken_for_a_lost_peer(world: World) -> None:
    """Telling takes longer than the grace; the process ends by its own error, not by the watch."""
    watch = world.watches[0]
    watch.patience = 3.0
    watch._say("failed", "MemoryError: full")
    watch._conclude("rank 0 on node-a failed: MemoryError: full", tell=False)
    time.sleep(0.5)  # ten times the grace
    assert 0 not in world.left
    until = time.monotonic() + 10
    while 0 not in world.left and time.monotonic() < until:
        time.sleep(FAST)
    assert 0 in world.left, "after its patience it is ended all the same: the store hangs"


SCRIPT = "scripts/launch_multinode.sh"


@pytest.mark.parametrize(
    ("launch", "advice"),
    [
        (
            f"{SCRIPT} --hostfile hosts -- train x --output r",
            f"start it again: {SCRIPT} --hostfile hosts -- train x --output r --resume auto",
        ),
        (
            f"{SCRIPT} --nodes 2 --master a -- train x --output r --resume=auto",
            f"start it again on every machine: {SCRIPT} --nodes 2 --master a -- train x --output r "
            "--resume=auto",
        ),
        (
            f"{SCRIPT} --nodes 2 --node-rank 1 --master a -- train x --output=r",
            "start it again as before (on each machine, its own command): "
            f"{SCRIPT} --nodes 2 --node-rank 1 --master a -- train x --output=r --resume auto",
        ),
        (
            f"{SCRIPT} --nodes 2 --master a -- doctor --cluster",
            f"start it again on every machine: {SCRIPT} --nodes 2 --master a -- doctor --cluster",
        ),
        (
            None,
            "start it again as before (on each machine, its own command): npu-qat train x "
            "--resume auto (and its --output)",
        ),
    ],
)
def test_the_way_to_go_on_is_that_of_the_launch(
    launch: str | None, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(peers.LAUNCH_VARIABLE, raising=False)
    monkeypatch.setattr("sys.argv", ["npu_qat/__main__.py", "train", "x"])
    if launch is not None:
        monkeypatch.setenv(peers.LAUNCH_VARIABLE, launch)
    assert peers.how_to_go_on() == advice


@pytest.mark.parametrize("text", ["soon", "1", "-5"])
def test_a_timeout_that_makes_no_sense_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(peers.TIMEOUT_VARIABLE, text)
    with pytest.raises(ValueError, match="NPU_QAT_PEER_TIMEOUT"):
        peers._patience()
