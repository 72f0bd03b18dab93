"""Two machines on one: network namespaces, joined by a pair of virtual network cards.

Each has its own interfaces, addresses, ports and host name, so that whatever assumes one machine
(loopback, a shared host name, a port on localhost) fails here as it would between machines. They
share the file system, the clock and the processors. A machine can be killed, all processes at once,
or its cable pulled, after which its connections end without a word.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.training.launching import ROOT, environment


def why_not() -> str | None:
    """Why this machine cannot make namespaces, or None."""
    for tool in ("ip", "unshare", "hostname"):
        if shutil.which(tool) is None:
            return f"no {tool!r} here (Debian: iproute2, util-linux, hostname)"
    name = f"npuqat-try-{os.getpid()}"
    made = _ip("netns", "add", name, check=False)
    if made.returncode != 0:
        return f"cannot make a network namespace: {made.stderr.strip()}"
    uts = subprocess.run(["unshare", "--uts", "true"], capture_output=True, text=True)
    cards = _ip("-n", name, "link", "add", "x", "type", "veth", "peer", "name", "y", check=False)
    _ip("netns", "del", name)
    if uts.returncode != 0 or cards.returncode != 0:
        return f"no namespaces with host names and cards: {uts.stderr} {cards.stderr}".strip()
    return None


class Node:
    """One of the machines."""

    def __init__(self, index: int) -> None:
        self.host = f"node-{'abc'[index]}"
        self.address = f"10.77.0.{index + 1}"
        self.namespace = f"npuqat-{os.getpid()}-{index}"
        self.card = f"nq{os.getpid()}{index}"

    def start(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        own: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start ``command`` on this machine; what it prints is appended to ``log``.

        ``own``: a folder that is empty here and not shared with the other machine.
        """
        mount = "" if own is None else f"mount -t tmpfs none '{own}' && "
        inside = ["sh", "-c", f'hostname "$0" && {mount}exec "$@"', self.host, *command]
        with open(log, "ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", *inside],
                cwd=ROOT,
                env=environment({"DS_ACCELERATOR": "cpu", **dict(env or {})}),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[int]:
        """Ids of all processes on this machine."""
        return [int(word) for word in _ip("netns", "pids", self.namespace).stdout.split()]

    def kill(self) -> None:
        """Every process at once: connections are closed by the kernel."""
        for process in self.processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def unplug(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", self.card, "down")

    def plug(self) -> None:
        _ip("-n", self.namespace, "link", "set", self.card, "up")


class TwoNodes:
    """A context with two machines that reach each other and nothing else."""

    def __init__(self) -> None:
        self.nodes = (Node(0), Node(1))

    def __enter__(self) -> tuple[Node, Node]:
        a, b = self.nodes
        _remove_orphans()
        try:
            for node in self.nodes:
                _ip("netns", "add", node.namespace)
                hosts = Path("/etc/netns") / node.namespace / "hosts"
                hosts.parent.mkdir(parents=True)
                known = "".join(f"{n.address} {n.host}\n" for n in self.nodes)
                hosts.write_text(f"127.0.0.1 localhost\n{known}")
            pair = ("type", "veth", "peer", "name", b.card, "netns", b.namespace)
            _ip("-n", a.namespace, "link", "add", a.card, *pair)
            for node in self.nodes:
                _ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", node.card)
                _ip("-n", node.namespace, "link", "set", node.card, "up")
                _ip("-n", node.namespace, "link", "set", "lo", "up")
        except BaseException:
            self._remove()
            raise
        return self.nodes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for node in self.nodes:
            listed = _ip("netns", "pids", node.namespace, check=False)
            if listed.returncode == 0:
                node.kill()
            _ip("netns", "del", node.namespace, check=False)
            shutil.rmtree(Path("/etc/netns") / node.namespace, ignore_errors=True)


def _remove_orphans() -> None:
    """Namespaces of a test run that was killed before it could remove them."""
    listed = _ip("netns", "list").stdout.splitlines()
    for name in (line.split()[0] for line in listed if line.startswith("npuqat-")):
        if not Path("/proc", name.split("-")[1]).exists():
            for process in _ip("netns", "pids", name).stdout.split():
                os.kill(int(process), signal.SIGKILL)
            _ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done
