"""Whether a machine reaches the rendezvous, the address where all processes of a launch meet.

A launcher that cannot reach it waits for minutes, and then names a socket. The four reasons can be
told apart in a second each: the name, the route, a firewall, nobody there yet.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from npu_qat.cluster.check import Check
from npu_qat.training.network import interface_to, reach


def parse(text: str) -> tuple[str, int]:
    """``HOST:PORT``; raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--rendezvous {text!r}: give HOST:PORT, for instance 10.0.0.1:29500")
    return host.strip("[]"), int(port)


def examine(
    host: str,
    port: int,
    wait: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Check]:
    """Interface, and whether the name resolves and somebody listens within ``wait`` seconds."""
    started = clock()
    try:
        interface = interface_to(host, port, wait, clock=clock, sleep=sleep)
    except ValueError as error:
        return [Check("network", "route", "missing", str(error), "")]
    here = f"{socket.gethostname()}: {interface.name} {interface.address} -> {host}"
    checks = [Check("network", "route", "ok", here)]
    problem = reach(host, port, max(started + wait - clock(), 0.0))
    if problem is None:
        value = f"{host}:{port} answers after {clock() - started:.1f} s"
        return [*checks, Check("network", "rendezvous", "ok", value)]
    advice = (
        "start the machine that keeps the rendezvous first, and check the port and the firewall"
    )
    return [*checks, Check("network", "rendezvous", "missing", problem, advice)]
