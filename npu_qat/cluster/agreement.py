"""What the facts of all ranks say when they are laid side by side. Nothing here communicates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from npu_qat.cluster.check import Check

Facts = dict[str, Any]


def compare(facts: Sequence[Facts]) -> list[Check]:
    """Checks of the facts of all ranks, in the order of ranks."""
    checks = [_hosts(facts), _devices(facts), _one_device_each(facts)]
    checks.append(_same(facts, "device", lambda f: f["device"], "give --device on every machine"))
    checks.append(_same(facts, "accelerator", lambda f: f["accelerator"], "", differing="warning"))
    checks += _versions(facts)
    advice = "install the same commit of npu-qat everywhere: gradients of two programs are averaged"
    checks.append(_same(facts, "code", lambda f: f["code"], advice))
    if "config" in facts[0]:
        advice = "give every machine the same CONFIG, --preset and --set"
        checks.append(_same(facts, "configuration", lambda f: f["config"], advice))
        checks += [_files(facts, "model", "model.path"), _files(facts, "task", "task.path")]
    checks += _variables(facts)
    checks.append(_interfaces(facts))
    return checks


def by_value(facts: Sequence[Facts], of: Callable[[Facts], Any]) -> dict[str, list[str]]:
    """Value -> hosts (and ranks, where a host has both) that have it, the most frequent first."""
    values = [of(f) if isinstance(of(f), str) else json.dumps(of(f)) for f in facts]
    pairs = {(f["host"], value) for f, value in zip(facts, values, strict=True)}
    mixed = Counter(host for host, _ in pairs)
    found: dict[str, list[str]] = {}
    for value, _ in Counter(values).most_common():
        places = dict.fromkeys(
            f"{f['host']} rank {f['rank']}" if mixed[f["host"]] > 1 else f["host"]
            for f, v in zip(facts, values, strict=True)
            if v == value
        )
        found[value] = list(places)
    return found


def spell(found: dict[str, list[str]]) -> str:
    """``2.13.0 on a; 2.10.0 on b, c``."""
    return "; ".join(f"{value} on {', '.join(places)}" for value, places in found.items())


def _same(
    facts: Sequence[Facts],
    name: str,
    of: Callable[[Facts], Any],
    advice: str,
    *,
    differing: Any = "missing",
    area: str = "agreement",
) -> Check:
    found = by_value(facts, of)
    if len(found) == 1:
        return Check(area, name, "ok", f"{next(iter(found))} everywhere")
    return Check(area, name, differing, f"differs: {spell(found)}", advice)


def _hosts(facts: Sequence[Facts]) -> Check:
    ranks: dict[str, list[int]] = {}
    for f in facts:
        ranks.setdefault(f["host"], []).append(f["rank"])
    value = "; ".join(f"{host}: ranks {_span(found)}" for host, found in ranks.items())
    value = f"{len(facts)} processes on {len(ranks)} hosts. {value}"
    if len(facts) > 1 and all(f["local_rank"] == 0 for f in facts) and len(ranks) == 1:
        advice = (
            "every machine says the same host name: messages cannot tell them apart, and the "
            "deepspeed launcher may take them for one. Give each a name of its own"
        )
        return Check("processes", "hosts", "warning", value, advice)
    return Check("processes", "hosts", "ok", value)


def _span(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))


def _devices(facts: Sequence[Facts]) -> Check:
    what = "CPU cores" if facts[0]["device"] == "cpu" else "devices"
    return _same(
        facts,
        f"{what} a host",
        lambda f: str(f["devices"]),
        "a machine with fewer decides the pace, or a device is not passed into its container",
        differing="warning",
        area="processes",
    )


def _one_device_each(facts: Sequence[Facts]) -> Check:
    """More processes than accelerators on a host share one, and run out of its memory."""
    crowded = {
        f["host"]: f"{f['host']} has {f['devices']} for local rank {f['local_rank']}"
        for f in facts
        if f["device"] != "cpu" and f["local_rank"] >= f["devices"]
    }
    if crowded:
        advice = "start as many processes as the machine has devices (--devices, slots=, nproc)"
        return Check("processes", "a device each", "missing", "; ".join(crowded.values()), advice)
    return Check("processes", "a device each", "ok", "no host has more processes than devices")


def _versions(facts: Sequence[Facts]) -> list[Check]:
    names = sorted({name for f in facts for name in f["versions"]})
    differing = []
    for name in names:
        found = by_value(facts, _named("versions", name, "not installed"))
        if len(found) > 1:
            differing.append(
                Check(
                    "agreement",
                    name,
                    "missing",
                    f"differs: {spell(found)}",
                    "install the same constraints file, or use the same image, on every machine",
                )
            )
    if differing:
        return differing
    shown = ", ".join(
        f"{name} {facts[0]['versions'][name]}"
        for name in ("python", "torch", "torch-npu", "transformers", "deepspeed")
        if name in facts[0]["versions"]
    )
    return [Check("agreement", "versions", "ok", f"{shown}; {len(names)} compared")]


def _files(facts: Sequence[Facts], key: str, where: str) -> Check:
    machines = [f for f in facts if key in f]
    absent = [f["host"] for f in machines if f[key] == "not there"]
    if absent:
        return Check(
            "agreement",
            f"{key} files",
            "missing",
            f"{where} is not there on {', '.join(absent)}",
            "copy it there, mount it, or use a path that every machine has",
        )
    advice = f"copy {where} from one machine to all: sizes or contents of its files differ"
    return _same(machines, f"{key} files", lambda f: f[key], advice)


def _variables(facts: Sequence[Facts]) -> list[Check]:
    names = sorted({name for f in facts for name in f["variables"]})
    advice = "set it the same on every machine (the deepspeed launcher carries few: see --env)"
    found = [
        _same(facts, n, _named("variables", n, "not set"), advice, differing="warning")
        for n in names
    ]
    return [check for check in found if check.status != "ok"]


def _named(key: str, name: str, absent: str) -> Callable[[Facts], str]:
    """Reads ``name`` in the table ``key`` of a rank's facts."""
    return lambda f: str(f[key].get(name, absent))


def _interfaces(facts: Sequence[Facts]) -> Check:
    hosts = {f["host"]: f["interface"] for f in facts}
    shown = "; ".join(f"{host}: {i['name']} {i['address']}" for host, i in hosts.items())
    loopback = [host for host, i in hosts.items() if i["address"].startswith("127.")]
    if len(hosts) > 1 and loopback:
        advice = "give a rendezvous address that the other machines reach, not localhost"
        value = f"{shown}: {', '.join(loopback)} would talk to itself"
        return Check("network", "interfaces", "missing", value, advice)
    return Check("network", "interfaces", "ok", shown)
