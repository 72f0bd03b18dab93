"""Which interface leads where, and why a rendezvous is not reached."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from npu_qat.cluster import rendezvous
from npu_qat.training import network
from npu_qat.training.network import Interface, interface_to, name_interface, reach


def test_the_way_to_this_machine_is_the_loopback() -> None:
    found = interface_to("127.0.0.1")
    assert found == Interface("lo", "127.0.0.1") and found.is_loopback


def test_a_name_that_nobody_knows_says_so_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'no-such-host.invalid' does not resolve .*/etc/hosts"):
        interface_to("no-such-host.invalid")


class Clock:
    """Time that passes by sleeping alone, and a name that resolves from second ``at`` on."""

    def __init__(self, at: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.at, self.resolve = 100.0, 100.0 + at, socket.getaddrinfo
        monkeypatch.setattr(network.socket, "getaddrinfo", self.getaddrinfo)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def getaddrinfo(self, host: str, port: int, **options: Any) -> Any:
        if self.now < self.at:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self.resolve("127.0.0.1", port, **options)


def test_a_name_that_resolves_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(30.5, monkeypatch)
    found = interface_to("node-a", 9, 60.0, clock=clock, sleep=clock.sleep)
    assert found == Interface("lo", "127.0.0.1") and clock.now == 131.0


def test_a_name_is_waited_for_no_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(30.5, monkeypatch)
    with pytest.raises(ValueError, match="'node-a' does not resolve"):
        interface_to("node-a", 9, 20.5, clock=clock, sleep=clock.sleep)
    assert clock.now == 120.5


def test_what_is_left_of_the_wait_is_for_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(45.0, monkeypatch)
    waits: list[float] = []

    def reach(host: str, port: int, wait: float) -> None:
        waits.append(wait)

    monkeypatch.setattr(rendezvous, "reach", reach)
    checks = rendezvous.examine("node-a", 9, 60.0, clock=clock, sleep=clock.sleep)
    assert [check.status for check in checks] == ["ok", "ok"]
    assert waits == [15.0] and "answers after 45.0 s" in checks[1].value


def test_a_name_that_never_resolves_is_the_answer_after_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(1000.0, monkeypatch)
    (check,) = rendezvous.examine("node-a", 9, 60.0, clock=clock, sleep=clock.sleep)
    assert check.status == "missing" and "does not resolve" in check.value
    assert clock.now == 160.0


def test_libraries_are_told_the_interface_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interface_to", lambda host: Interface("bond1", "10.0.0.7"))
    variables = {"MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "mine"}
    name_interface("cpu", variables)
    assert variables == {"MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "mine"}
    name_interface("npu", variables)
    assert variables["GLOO_SOCKET_IFNAME"] == "mine", "what the user set stays"
    assert variables["HCCL_IF_IP"] == "10.0.0.7"
    assert variables["HCCL_SOCKET_IFNAME"] == variables["TP_SOCKET_IFNAME"] == "bond1"


@pytest.mark.parametrize("variables", [{}, {"MASTER_ADDR": "127.0.0.1"}])
def test_one_machine_alone_is_left_alone(variables: dict[str, str]) -> None:
    before = dict(variables)
    name_interface("npu", variables)
    assert variables == before


def test_who_comes_up_late_is_reached() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        timer = threading.Timer(1.2, listener.listen)
        timer.start()
        started = time.monotonic()
        assert reach("127.0.0.1", port, 10) is None
        timer.join()
        assert time.monotonic() - started > 1.0


def test_nobody_there_is_told_from_a_name_that_does_not_resolve() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        refused = reach("127.0.0.1", port, 0)
    assert refused is not None and "nothing listens there" in refused
    unknown = reach("no-such-host.invalid", 1, 0)
    assert unknown is not None and "the name does not resolve" in unknown
