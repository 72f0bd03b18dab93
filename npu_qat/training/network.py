"""Which of this machine's interfaces leads to the other machines.

Collective libraries open their own connections, and guess which interface to use: gloo takes the
address that the host's own name resolves to, which on many machines is the loopback interface, and
HCCL the first one that it finds. Both guesses fail on machines with several networks, with an error
that names neither. The kernel knows the answer: a datagram socket that is connected to the
rendezvous (which sends nothing) has the local address of the route there.

An interface differs from machine to machine, so each process looks for its own, and a launcher need
not carry it around.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Interface:
    """A network interface and the address by which others reach this machine through it."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.address).is_loopback


def interface_to(
    host: str,
    port: int = 9,
    wait: float = 0.0,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Interface:
    """The interface that the route to ``host`` leaves by.

    Args:
        host, port: the rendezvous.
        wait: seconds to go on asking for a name that does not resolve. The name of a pod does only
            once the pod is up.
        clock, sleep: of time.

    Raises:
        ValueError: the name does not resolve, or there is no route.
    """
    import psutil

    until = clock() + wait
    while True:
        try:
            family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            break
        except socket.gaierror as error:
            if (left := until - clock()) <= 0:
                raise ValueError(
                    f"the name {host!r} does not resolve on {socket.gethostname()} "
                    f"({error.strerror}): use an IP address, or add the name to DNS or to "
                    "/etc/hosts on every machine"
                ) from error
        sleep(min(1.0, left))
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)
        except OSError as error:
            raise ValueError(
                f"{socket.gethostname()} has no route to {host}: {error.strerror}"
            ) from error
        address = probe.getsockname()[0].partition("%")[0]
    for name, found in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in found):
            return Interface(name, address)
    return Interface("lo" if ipaddress.ip_address(address).is_loopback else "", address)


def name_interface(device: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell the collective libraries which interface to use, unless the user did.

    Does nothing for a rendezvous on this machine alone (a loopback address). NCCL looks at every
    interface and is left alone.

    Args:
        device: cpu, cuda or npu.
        environment: where ``MASTER_ADDR`` is read and the variables are set.
    """
    master = environment.get("MASTER_ADDR")
    if not master:
        return
    interface = interface_to(master)
    if interface.is_loopback or not interface.name:
        return
    environment.setdefault("GLOO_SOCKET_IFNAME", interface.name)
    if device == "npu":
        environment.setdefault("HCCL_IF_IP", interface.address)
        environment.setdefault("HCCL_SOCKET_IFNAME", interface.name)
        environment.setdefault("TP_SOCKET_IFNAME", interface.name)


def reach(host: str, port: int, wait: float) -> str | None:
    """Why nothing answers at ``host:port`` within ``wait`` seconds, or None if something does.

    A refused connection and a silent one are tried again: the process that listens there may come
    up later.
    """
    until = time.monotonic() + wait
    while True:
        left = max(until - time.monotonic(), 1.0)
        try:
            socket.create_connection((host, port), timeout=min(left, 5.0)).close()
        except OSError as error:
            problem = _why(error)
        else:
            return None
        if time.monotonic() >= until:
            return (
                f"{socket.gethostname()} cannot reach the rendezvous at {host}:{port} within "
                f"{wait:.0f} s: {problem}"
            )
        time.sleep(min(1.0, max(until - time.monotonic(), 0.0)))


def _why(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "the name does not resolve"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there (rank 0's machine has not started, or uses another port)"
    if isinstance(error, TimeoutError):
        return "no answer (a firewall, a wrong address, or a machine that is down)"
    return str(error.strerror or error)
