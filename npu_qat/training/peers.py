"""Whether the other processes of a run are still there, and what to say if one is not.

A collective waits for all ranks. If a machine goes away, the others wait: for a closed connection,
which comes at once if a process was killed and never if a machine lost its power; else for the
library's timeout, 10 minutes under DeepSpeed. And the error that ends the wait names an address.

So each process has a thread that writes a heartbeat, with its host's name, into the store of the
rendezvous. The thread of rank 0 reads them all, the others read rank 0's: work grows with the
number of ranks, not with its square. Rank 0 judges and publishes a verdict:

* a rank that says that it failed: at once, with its reason;
* a rank that is silent for ``QUICK`` seconds while another one's collective has failed;
* a rank that is silent for ``patience`` seconds (``NPU_QAT_PEER_TIMEOUT``, default 60).

Whoever does not hear from rank 0, or cannot reach the store, judges rank 0 by the same rules. A
process with a verdict has ``GRACE`` seconds to end by the error of its own collective; then it
prints the verdict and leaves without cleaning up, which might wait for the lost peer, too.
Checkpoints are whole at every moment (checkpoint.py), so nothing is lost but the steps since.

What this costs: the thread needs Python's lock once in ``interval`` seconds. A single call that
holds the lock for longer than ``patience`` counts as silence.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal, Protocol

# sysexits.h, "temporary failure": the same command with --resume auto goes on.
PEER_LOST = 75
INTERVAL, QUICK, PATIENCE, GRACE = 2.0, 6.0, 60.0, 5.0
TIMEOUT_VARIABLE = "NPU_QAT_PEER_TIMEOUT"
# The command that started this run, from scripts/launch_multinode.sh.
LAUNCH_VARIABLE = "NPU_QAT_LAUNCH"
_PREFIX = "npu_qat/peers"

# How the collective libraries word it when a peer is gone. torch has no class for gloo's.
_COMMUNICATION = re.compile(
    r"gloo[/:]|Connection (closed|reset)|Broken pipe|NCCL|HCCL|EI00\d\d|Timed out waiting"
    r"|failed to (recv|send)|Socket (closed|Timeout)",
    re.IGNORECASE,
)

State = Literal["alive", "stuck", "failed", "stopped", "done"]


class PeerLost(RuntimeError):
    """Another process of the run is gone; the message says which, and how to go on."""


class Store(Protocol):
    """What is used of ``torch.distributed.TCPStore``."""

    def set(self, key: str, value: str) -> None: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...


class PeerWatch:
    """The heartbeat of this process and its opinion of the others.

    Args:
        store: a connection to the rendezvous that nothing else uses.
        rank, world_size: this process and how many there are.
        host: this machine's name.
        interval: seconds between heartbeats.
        patience: seconds of silence after which a process counts as lost.
        leave: called with the verdict by the thread, if the process did not end by itself.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        host: str,
        interval: float = INTERVAL,
        patience: float = PATIENCE,
        leave: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.host, self.interval, self.patience = host, interval, patience
        self.leave, self.clock = leave, clock
        self.verdict: str | None = None
        self._state: State = "alive"
        self._why = ""
        self._beats = 0
        self._records: dict[int, dict[str, Any]] = {}
        now = clock()
        # When each rank that is watched from here was last heard of, and the store last answered.
        self._heard = dict.fromkeys(range(1, world_size) if rank == 0 else [0], now)
        self._answered = now
        self._quick = min(QUICK, patience)
        self._ended, self._found = threading.Event(), threading.Event()
        self._writing = threading.Lock()
        self._threads = [
            threading.Thread(target=target, name=f"npu-qat{target.__name__}", daemon=True)
            for target in (self._pulse, self._guard)
        ]

    # --- the life of a watch ----------------------------------------------------------------

    def start(self) -> None:
        """Say hello, so that everyone has a record, and begin. All ranks must call this."""
        self._write()
        for thread in self._threads:
            thread.start()

    @property
    def in_peace(self) -> bool:
        """No failure here, and none known of the others."""
        return self.verdict is None and self._state == "alive"

    def close(self) -> None:
        """Leave in peace. Rank 0, which may keep the store, waits a moment for the others."""
        self._say("done")
        if self.rank == 0:
            self._wait(lambda: all(self._state_of(r) in ("done", "failed") for r in self._heard))
        self._ended.set()

    def explain(self, error: BaseException) -> PeerLost | None:
        """What ``error`` is about, after the others were told of it.

        Returns:
            The error to raise instead, if a collective failed; None if the reason lies here.
        """
        if not is_communication_error(error):
            self._say("failed", _one_line(error))
            if self.rank == 0:
                self._publish(f"rank 0 on {self.host} failed: {_one_line(error)}")
            self._ended.set()
            return None
        self._say("stuck")
        self._found.wait(self._quick + 4 * self.interval)
        found = self.verdict or f"a collective failed, but every process answers: {error}"
        self._ended.set()
        return PeerLost(found)

    # --- what the threads do ----------------------------------------------------------------

    def _pulse(self) -> None:
        """Write, read and judge until the end. Only this thread waits for the store."""
        # Read at once: who is lost before the first beat shall have a name.
        reached = self._reaches_store(self._read)
        while reached and self.verdict is None and not self._ended.wait(self.interval):
            reached = self._reaches_store(self._write, self._read)
            if reached:
                self._answered = self.clock()
                self._conclude(self.judge(), tell=True)

    def _reaches_store(self, *calls: Callable[[], None]) -> bool:
        try:
            for call in calls:
                call()
        except Exception as error:  # torch raises several kinds for a store that went away
            self._conclude(self._store_gone(_one_line(error)), tell=False)
            return False
        return True

    def _guard(self) -> None:
        """End the process if nothing else does: the other thread may hang in a connection to a dead
        machine, and the main one in a collective."""
        while not self._ended.wait(self.interval / 2):
            silent = self.clock() - self._answered
            if self.verdict is None and silent > self.patience:
                self._conclude(self._store_gone(f"no answer for {silent:.0f} s"), tell=False)
            if self.verdict is not None:
                if not self._ended.wait(GRACE) and not self._ends_by_its_own_failure():
                    self.leave(self.verdict)
                return

    def _ends_by_its_own_failure(self) -> bool:
        """Telling the others may take longer than ``GRACE``; only a store that hangs, for ever."""
        return self._state == "failed" and self._ended.wait(self.patience)

    def judge(self) -> str | None:
        """The verdict on the others at this moment, or None."""
        now = self.clock()
        published = self._records.get(-1)
        if published:
            return str(published["verdict"])
        states = {r: self._state_of(r) for r in self._heard}
        failed = [r for r in self._heard if states[r] == "failed"]
        if failed:
            why = self._records[failed[0]]["why"]
            return f"rank {failed[0]} on {self._host_of(failed[0])} failed: {why}"
        stuck = self._state == "stuck" or "stuck" in states.values()
        limit = self._quick if stuck else self.patience
        silent = [
            r for r, heard in self._heard.items() if now - heard > limit and states[r] != "done"
        ]
        if not silent:
            return None
        seconds = max(now - self._heard[r] for r in silent)
        return f"{self._name(silent)}: no sign of life for {seconds:.0f} s"

    # --- the store --------------------------------------------------------------------------

    def _write(self) -> None:
        with self._writing:
            self._beats += 1
            record = {
                "beat": self._beats,
                "host": self.host,
                "state": self._state,
                "why": self._why,
            }
            self.store.set(f"{_PREFIX}/{self.rank}", json.dumps(record))
            if self._beats == 1 and self.rank == 0:
                self.store.set(f"{_PREFIX}/verdict", "null")

    def _read(self) -> None:
        ranks = [*self._heard, -1]
        keys = [f"{_PREFIX}/{'verdict' if r < 0 else r}" for r in ranks]
        for rank, value in zip(ranks, self.store.multi_get(keys), strict=True):
            record = json.loads(value)
            if record != self._records.get(rank):
                self._records[rank] = record
                if rank >= 0:
                    self._heard[rank] = self.clock()

    def _say(self, state: State, why: str = "") -> None:
        self._state, self._why = state, why
        with suppress(Exception):  # a store that is gone is noticed by the thread
            self._write()

    def _publish(self, verdict: str) -> None:
        """Tell all, and stay until they have heard: this process may keep the store."""
        with suppress(Exception):
            self.store.set(f"{_PREFIX}/verdict", json.dumps({"verdict": verdict}))
        told = ("failed", "stopped", "done")
        self._wait(lambda: all(self._state_of(r) in told for r in self._alive()))

    def _wait(self, met: Callable[[], bool]) -> None:
        until = self.clock() + 3 * self.interval
        while self.clock() < until and not met():
            with suppress(Exception):
                self._read()
            time.sleep(self.interval / 10)

    def _conclude(self, verdict: str | None, *, tell: bool) -> None:
        if verdict is None or self.verdict is not None:
            return
        self.verdict = verdict
        if tell and self.rank == 0:
            self._publish(verdict)
        elif tell:
            self._say("stopped")
        self._found.set()

    def _store_gone(self, what: str) -> str | None:
        """None if rank 0 had said that it was leaving."""
        if self._state_of(0) == "done":
            return None
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        return f"{self._name([0])}, with the rendezvous at {where}, does not answer ({what})"

    def _alive(self) -> Iterator[int]:
        now = self.clock()
        return (r for r, heard in self._heard.items() if now - heard <= self._quick)

    def _state_of(self, rank: int) -> str:
        return str(self._records.get(rank, {}).get("state", "alive"))

    def _host_of(self, rank: int) -> str:
        if rank == self.rank:
            return self.host
        return str(self._records.get(rank, {}).get("host", "an unknown host"))

    def _name(self, ranks: Iterable[int]) -> str:
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self._host_of(rank), []).append(rank)
        return " and ".join(
            f"{host} (rank{'s' if len(found) > 1 else ''} {', '.join(map(str, found))})"
            for host, found in by_host.items()
        )


def is_communication_error(error: BaseException) -> bool:
    """Whether ``error`` comes from a collective or the store, rather than from this process."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return isinstance(error, RuntimeError) and bool(_COMMUNICATION.search(str(error)))


def how_to_go_on() -> str:
    """The command that goes on with this run, as far as this process can know it.

    A hostfile starts all machines from one. A command that names its node rank, or one that was
    not started by the script, differs from machine to machine.
    """
    launched = os.environ.get(LAUNCH_VARIABLE)
    command = launched or shlex.join(["npu-qat", *sys.argv[1:]])
    given = command.split()
    if "train" in given and not _has(given, "--resume"):
        command += " --resume auto"
        if not _has(given, "--output"):
            command += " (and its --output)"
    if launched and _has(given, "--hostfile"):
        where = ""
    elif launched and not _has(given, "--node-rank"):
        where = " on every machine"
    else:
        where = " as before (on each machine, its own command)"
    return f"start it again{where}: {command}"


def _has(given: list[str], option: str) -> bool:
    return any(word == option or word.startswith(f"{option}=") for word in given)


def words(verdict: str) -> str:
    """The message for a user."""
    return (
        f"{socket.gethostname()}: stopped, because the run lost a process. {verdict}. Everything "
        f"up to the newest checkpoint is kept; when the machine is back, {how_to_go_on()}"
    )


_current: PeerWatch | None = None


def watch_peers() -> None:
    """Begin to watch the other ranks of the process group; nothing to do for a single process."""
    global _current
    from torch import distributed

    if _current is not None or distributed.get_world_size() == 1 or "MASTER_ADDR" not in os.environ:
        return
    store = distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=300),
    )
    _current = PeerWatch(
        store,
        distributed.get_rank(),
        distributed.get_world_size(),
        host=socket.gethostname(),
        patience=_patience(),
        leave=_leave_at_once,
    )
    _current.start()


def stop_watching() -> bool:
    """End the watch.

    Returns:
        False if a process failed or is gone: what waits for the others may then wait for ever.
    """
    global _current
    if _current is None:
        return True
    if not _current.in_peace:
        return False
    _current.close()
    _current = None
    return True


@contextmanager
def failures_told(
    expected: type[BaseException] | tuple[type[BaseException], ...] = (),
) -> Iterator[None]:
    """Tell the other ranks of an error in the block, and name who caused a failed collective.

    Args:
        expected: exceptions by which all ranks end the block together.

    Raises:
        PeerLost: a collective failed, or the others had failed before.
    """
    try:
        yield
    except expected:
        raise
    except BaseException as error:
        lost = _current.explain(error) if _current is not None else None
        if lost is not None:
            raise PeerLost(words(str(lost))) from error
        raise


def _patience() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if seconds < 3 * INTERVAL:
        raise ValueError(
            f"{TIMEOUT_VARIABLE} is {text!r}: give the seconds of silence after which a process "
            f"counts as lost, at least {3 * INTERVAL:g}"
        )
    return seconds


def _leave_at_once(verdict: str) -> None:
    """From the thread: the main thread waits in a collective that will never end."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one voice a machine
        print(f"error: {words(verdict)}", file=sys.stderr, flush=True)
    else:
        time.sleep(INTERVAL)  # the first to end has its neighbours ended, too
    sys.stdout.flush()
    os._exit(PEER_LOST)


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
