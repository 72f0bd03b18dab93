"""Which interface leads where, and why a rendezvous is not reached."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from npu_qat.training import network
from npu_qat.training.network import Interface, interface_to, name_interface, reach


def test_the_way_to_this_machine_is_the_loopback() -> None:
    found = interface_to("127.0.0.1")
    assert found == Interface("lo", "127.0.0.1") and found.is_loopback


def test_a_name_that_nobody_knows_says_so_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'no-such-host.invalid' does not resolve .*/etc/hosts"):
        interface_to("no-such-host.invalid")


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
