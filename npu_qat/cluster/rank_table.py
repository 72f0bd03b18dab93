"""HCCL's rank table (``hccl.json``): who has which rank and network card.

With torch's launchers HCCL needs none. Where an operator writes one (``RANK_TABLE_FILE``), a table
of an earlier job, or one that was read before it was complete, makes every rank wait for ever.
Three layouts are known (Ascend/mind-cluster, ascend-operator; read): 1.0 lists servers and devices,
1.2 adds super pods, 2.0 (Ascend 950) lists ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npu_qat.cluster.check import Check

VERSIONS = ("1.0", "1.2", "2.0")


def examine(path: Path, world_size: int, addresses: Sequence[str] = ()) -> list[Check]:
    """Checks of the table at ``path``.

    Args:
        path: the file.
        world_size: number of processes that were started.
        addresses: of the hosts that take part; empty if not known.
    """
    try:
        table = json.loads(path.read_text("utf-8"))
    except OSError as error:
        return [_bad(f"{path}: {error.strerror}", "mount it, or unset RANK_TABLE_FILE")]
    except ValueError as error:
        return [_bad(f"{path} is no JSON: {error}", "it may still be being written; start again")]
    if not isinstance(table, dict):
        return [_bad(f"{path} holds no table", "let the operator write it anew")]
    problems = list(_problems(table, world_size, addresses))
    if problems:
        return [_bad(f"{path}: {text}", advice) for text, advice in problems]
    value = f"{path}: version {table['version']}, {world_size} ranks, complete"
    return [Check("npu network", "rank table", "ok", value)]


def _problems(
    table: dict[str, Any], world_size: int, addresses: Sequence[str]
) -> list[tuple[str, str]]:
    anew = "delete it and let the operator write it for this job"
    if table.get("status") != "completed":
        return [(f"status is {table.get('status')!r}, not 'completed'", "wait for the operator")]
    version = str(table.get("version"))
    if version not in VERSIONS:
        return [(f"version {version!r} is none of {', '.join(VERSIONS)}", "see docs/clusters.md")]
    servers = table.get("server_list") or []
    devices = [device for server in servers for device in server.get("device", [])]
    if version == "2.0":
        devices = table.get("rank_list") or []
    found = []
    ranks = Counter(str(device.get("rank_id")) for device in devices)
    wanted = {str(rank) for rank in range(world_size)}
    if len(devices) != world_size or set(ranks) != wanted:
        found.append(
            (
                f"ranks {', '.join(sorted(ranks, key=str)) or 'none'}, but {world_size} processes "
                f"(0 to {world_size - 1}) were started",
                anew,
            )
        )
    count = "rank_count" if version == "2.0" else "server_count"
    listed = devices if version == "2.0" else servers
    if str(table.get(count)) != str(len(listed)):
        found.append((f"{count} is {table.get(count)}, but {len(listed)} are listed", anew))
    cards = Counter(device["device_ip"] for device in devices if device.get("device_ip"))
    if twice := [address for address, n in cards.items() if n > 1]:
        found.append((f"device_ip {', '.join(twice)} is given twice", anew))
    hosts = [str(server.get("host_ip") or server.get("server_id")) for server in servers]
    numeric = [host for host in hosts if host.replace(".", "").isdigit()]
    if addresses and (strange := [host for host in numeric if host not in addresses]):
        found.append((f"servers {', '.join(strange)} take no part in this launch", anew))
    if version == "1.2":
        pods = table.get("super_pod_list") or []
        members = {str(s.get("server_id")) for pod in pods for s in pod.get("server_list", [])}
        if members != {str(server.get("server_id")) for server in servers}:
            found.append(("super_pod_list and server_list name different servers", anew))
    return found


def _bad(value: str, advice: str) -> Check:
    return Check("npu network", "rank table", "missing", value, advice)
