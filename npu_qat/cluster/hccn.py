"""The network cards of NPUs: each chip has its own, outside the host's view.

``hccn_tool`` (part of the driver) asks them. What it prints, as its manual and users' recordings
show it (read; nothing here has run on an NPU):

    -link -g              link status: UP
    -net_health -g        net health status: Success
    -ip -g                ipaddr:192.168.1.8
                          netmask:255.255.255.0
    -ping -g address X    ... 3 packets transmitted, 3 received, 0.00% packet loss

"0.00% packet loss" is also the end of "100.00% packet loss", so the number is read, not searched.
On A3 two dies of one card may not answer each other's pings though HCCL works: a failed ping is a
warning, a link that is down is not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from npu_qat.backends.npu_installation import ASCEND, device_nodes
from npu_qat.cluster.check import Check

TIMEOUT = 20
Ask = Callable[[int, Sequence[str]], str]


def tool() -> str | None:
    """``hccn_tool`` on PATH, or where the driver puts it."""
    usual = ASCEND / "driver/tools/hccn_tool"
    return shutil.which("hccn_tool") or (str(usual) if usual.is_file() else None)


def device_ids() -> list[int]:
    """Physical numbers of the NPUs whose device files this process sees."""
    return sorted(int(re.sub(r"\D", "", node.name)) for node in device_nodes())


def asker(program: str) -> Ask:
    """A function that runs ``hccn_tool -i <device> <words>`` and returns what it printed."""

    def ask(device: int, words: Sequence[str]) -> str:
        try:
            done = subprocess.run(
                [program, "-i", str(device), *words],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return f"no answer within {TIMEOUT} s"
        except OSError as error:
            return f"cannot be run: {error.strerror}"
        return done.stdout + done.stderr

    return ask


def survey(ask: Ask, devices: Sequence[int]) -> dict[str, dict[str, str]]:
    """Device -> ``link``, ``health``, ``address`` as the tool says them; ``?`` if it does not."""
    return {
        str(device): {
            "link": _field(ask(device, ["-link", "-g"]), r"link status:\s*(\S+)"),
            "health": _field(ask(device, ["-net_health", "-g"]), r"net health status:\s*(\S.*)"),
            "address": _field(ask(device, ["-ip", "-g"]), r"ipaddr:\s*(\S+)"),
        }
        for device in devices
    }


def packet_loss(printed: str) -> float | None:
    """Per cent of packets lost, or None if the output does not say."""
    found = re.search(r"(\d+(?:\.\d+)?)\s*%\s*packet loss", printed)
    return float(found[1]) if found else None


def ping(ask: Ask, devices: Sequence[int], addresses: Sequence[str]) -> dict[str, float | None]:
    """Loss from the first of ``devices`` to each address; None where the tool did not say."""
    return {
        address: packet_loss(ask(devices[0], ["-ping", "-g", "address", address]))
        for address in addresses
    }


def judge_survey(hosts: Mapping[str, Mapping[str, Mapping[str, str]]]) -> list[Check]:
    """``hosts``: host -> what ``survey`` found there."""
    down, sick, silent = [], [], []
    seen: dict[str, str] = {}
    twice = []
    for host, devices in hosts.items():
        for device, found in devices.items():
            place = f"{host} NPU {device}"
            if found["link"] == "?":
                silent.append(place)
            elif found["link"].upper() != "UP":
                down.append(f"{place} ({found['link']})")
            if found["health"] not in ("?", "Success"):
                sick.append(f"{place} ({found['health']})")
            address = found["address"]
            if address != "?" and address in seen:
                twice.append(f"{address} on {seen[address]} and {place}")
            seen[address] = place
    count = sum(map(len, hosts.values()))
    checks = []
    if down:
        checks.append(
            _wrong("link", "missing", f"down: {', '.join(down)}", "check cable and switch")
        )
    if sick:
        advice = "hccn_tool -i N -netdetect -g and -gateway -g show what the card cannot reach"
        checks.append(_wrong("health", "warning", f"not healthy: {', '.join(sick)}", advice))
    if twice:
        advice = "give each card an address of its own: hccn_tool -i N -ip -s address ..."
        checks.append(_wrong("addresses", "missing", f"used twice: {'; '.join(twice)}", advice))
    if silent:
        advice = "mount hccn_tool and /etc/hccn.conf into the container"
        value = f"hccn_tool says nothing of {', '.join(silent)}"
        checks.append(_wrong("link", "warning", value, advice))
    return checks or [Check("npu network", "links", "ok", f"{count} cards up and healthy")]


def judge_pings(host: str, lost: Mapping[str, float | None]) -> Check:
    """``lost``: what ``ping`` found from ``host``."""
    bad = [f"{address} ({'no result' if p is None else f'{p:g} % lost'})"
           for address, p in lost.items() if p != 0.0]  # fmt: skip
    if not bad:
        return Check("npu network", "ping", "ok", f"{host} reaches {len(lost)} cards of others")
    advice = (
        "same subnet or a gateway on both cards, and the same TLS switch (hccn_tool -i N -tls -g); "
        "on A3, pings between the two dies of a card may fail though HCCL works"
    )
    return Check("npu network", "ping", "warning", f"from {host}: {', '.join(bad)}", advice)


def examine(
    facts: Sequence[dict[str, Any]], mine: dict[str, Any], everyones: Callable[[Any], list[Any]]
) -> list[Check]:
    """The cards of all hosts. Every rank must call this; one a host asks.

    Args:
        facts: of all ranks.
        mine: those of this one.
        everyones: gathers an object of every rank, in their order.
    """
    program, devices = tool(), device_ids()
    asks = mine["local_rank"] == 0
    found = survey(asker(program), devices) if asks and program else None
    surveys = {f["host"]: s for f, s in zip(facts, everyones(found), strict=True) if s}
    if not surveys:
        advice = "mount it from the driver: docs/containers.md"
        return [Check("npu network", "hccn_tool", "warning", "not found on any host", advice)]
    others = [s for host, s in surveys.items() if host != mine["host"]]
    addresses = [d["address"] for s in others for d in s.values() if d["address"] != "?"]
    lost = ping(asker(program), devices, addresses) if asks and program and devices else None
    losses = {f["host"]: p for f, p in zip(facts, everyones(lost), strict=True) if p}
    return [*judge_survey(surveys), *(judge_pings(host, p) for host, p in losses.items())]


def _wrong(name: str, status: Any, value: str, advice: str) -> Check:
    return Check("npu network", name, status, value, advice)


def _field(printed: str, pattern: str) -> str:
    found = re.search(pattern, printed)
    return found[1].strip() if found else "?"
