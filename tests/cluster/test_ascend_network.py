"""Cards of NPUs and rank tables, with a stand-in for the driver's tool: no NPU is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npu_qat.cluster import hccn, rank_table
from npu_qat.cluster.check import Check

TOOL = """#!/bin/sh
device=$2; shift 2
case "$*" in
  "-link -g") [ "$device" = {down} ] && echo "link status: DOWN" || echo "link status: UP" ;;
  "-net_health -g")
    [ "$device" = {sick} ] && word=Fault || word=Success; echo "net health status: $word" ;;
  "-ip -g") echo "ipaddr:192.168.{subnet}.$device"; echo "netmask:255.255.255.0" ;;
  "-ping -g address 192.168.2.1")
    echo "device $device PING 192.168.2.1"; echo "recv time out seq=0"
    echo "3 packets transmitted, 0 received, 100.00% packet loss" ;;
  "-ping -g address "*)
    echo "recv seq=0,time=0.054000ms"
    echo "3 packets transmitted, 3 received, 0.00% packet loss" ;;
  *) echo "usage" >&2; exit 1 ;;
esac
"""


def tool(folder: Path, down: str = "none", sick: str = "none", subnet: int = 1) -> hccn.Ask:
    folder.mkdir(exist_ok=True)
    program = folder / "hccn_tool"
    program.write_text(TOOL.format(down=down, sick=sick, subnet=subnet))
    program.chmod(0o755)
    return hccn.asker(str(program))


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_healthy_cards_pass(tmp_path: Path) -> None:
    found = hccn.survey(tool(tmp_path / "a"), range(8))
    assert found["7"] == {"link": "UP", "health": "Success", "address": "192.168.1.7"}
    (check,) = hccn.judge_survey({"a": found})
    assert check.status == "ok" and check.value == "8 cards up and healthy"


def test_a_card_that_is_down_is_named_with_its_host(tmp_path: Path) -> None:
    hosts = {
        "a": hccn.survey(tool(tmp_path / "a"), range(2)),
        "b": hccn.survey(tool(tmp_path / "b", down="1", sick="0", subnet=2), range(2)),
    }
    checks = by_name(hccn.judge_survey(hosts))
    assert checks["link"].status == "missing" and checks["link"].value == "down: b NPU 1 (DOWN)"
    assert checks["health"].status == "warning" and "b NPU 0 (Fault)" in checks["health"].value


def test_an_address_that_two_cards_have_fails(tmp_path: Path) -> None:
    found = hccn.survey(tool(tmp_path / "a"), [0])
    check = by_name(hccn.judge_survey({"a": found, "b": found}))["addresses"]
    assert check.status == "missing" and "192.168.1.0 on a NPU 0 and b NPU 0" in check.value


def test_a_tool_that_says_nothing_is_a_warning() -> None:
    found = hccn.survey(hccn.asker("/nowhere/hccn_tool"), [0])
    assert found["0"] == {"link": "?", "health": "?", "address": "?"}
    assert hccn.judge_survey({"a": found})[0].status == "warning"


def test_all_lost_is_not_taken_for_none_lost(tmp_path: Path) -> None:
    """The words "0.00% packet loss" are part of "100.00% packet loss"."""
    lost = hccn.ping(tool(tmp_path / "a"), [0], ["192.168.2.0", "192.168.2.1"])
    assert lost == {"192.168.2.0": 0.0, "192.168.2.1": 100.0}
    check = hccn.judge_pings("a", lost)
    assert check.status == "warning" and check.value == "from a: 192.168.2.1 (100 % lost)"
    assert hccn.judge_pings("a", {"192.168.2.0": 0.0}).status == "ok"
    assert hccn.packet_loss("usage: hccn_tool") is None


def test_one_process_a_host_asks_and_all_get_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path / "a")
    monkeypatch.setattr(hccn, "tool", lambda: str(tmp_path / "a" / "hccn_tool"))
    monkeypatch.setattr(hccn, "device_ids", lambda: [0, 1])
    other = hccn.survey(tool(tmp_path / "b", subnet=2), [1])
    facts = [{"host": "a", "local_rank": 0}, {"host": "b", "local_rank": 0}]
    answers = iter([other, None])

    def everyones(mine: Any) -> list[Any]:
        return [mine, next(answers)]

    checks = by_name(hccn.examine(facts, facts[0], everyones))
    assert checks["links"].value == "3 cards up and healthy"
    assert checks["ping"].status == "warning" and "192.168.2.1" in checks["ping"].value


def test_a_host_without_the_tool_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hccn, "tool", lambda: None)
    facts = [{"host": "a", "local_rank": 0}]
    (check,) = hccn.examine(facts, facts[0], lambda mine: [mine])
    assert check.status == "warning" and "docs/containers.md" in check.advice


# --- rank tables ----------------------------------------------------------------------------


def table(version: str = "1.0") -> dict[str, Any]:
    if version == "2.0":
        ranks = [{"rank_id": r, "local_id": r % 2, "device_id": r % 2} for r in range(4)]
        return {"status": "completed", "version": "2.0", "rank_count": 4, "rank_list": ranks}
    servers = [
        {
            "server_id": f"10.0.0.{s + 1}",
            "device": [
                {"device_id": str(d), "device_ip": f"192.168.{s}.{d}", "rank_id": str(2 * s + d)}
                for d in range(2)
            ],
        }
        for s in range(2)
    ]
    found: dict[str, Any] = {
        "status": "completed",
        "version": version,
        "server_count": "2",
        "server_list": servers,
    }
    if version == "1.2":
        members = [{"server_id": s["server_id"]} for s in servers]
        found["super_pod_list"] = [{"super_pod_id": "0", "server_list": members}]
    return found


def examine(content: Any, path: Path, world: int = 4) -> list[Check]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return rank_table.examine(path, world, ["10.0.0.1", "10.0.0.2"])


@pytest.mark.parametrize("version", rank_table.VERSIONS)
def test_a_complete_table_passes(version: str, tmp_path: Path) -> None:
    (check,) = examine(table(version), tmp_path / "hccl.json")
    assert check.status == "ok" and f"version {version}, 4 ranks" in check.value


@pytest.mark.parametrize("version", rank_table.VERSIONS)
def test_a_table_of_another_job_is_found(version: str, tmp_path: Path) -> None:
    checks = examine(table(version), tmp_path / "hccl.json", world=8)
    assert checks[0].status == "missing" and "8 processes (0 to 7)" in checks[0].value


def test_every_contradiction_is_told(tmp_path: Path) -> None:
    wrong = table("1.2")
    wrong["server_count"] = "3"
    wrong["server_list"][1]["server_id"] = "10.0.0.9"
    wrong["server_list"][1]["device"][0]["device_ip"] = "192.168.0.0"
    wrong["server_list"][1]["device"][1]["rank_id"] = "0"
    told = "\n".join(check.value for check in examine(wrong, tmp_path / "hccl.json"))
    for words in (
        "server_count is 3, but 2 are listed",
        "device_ip 192.168.0.0 is given twice",
        "servers 10.0.0.9 take no part in this launch",
        "ranks 0, 1, 2, but 4 processes",
        "super_pod_list and server_list name different servers",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"status": "initializing"}, "status is 'initializing'"),
        ("{half", "is no JSON"),
        ("[]", "holds no table"),
        ({**table(), "version": "9"}, "version '9' is none of"),
    ],
)
def test_a_table_that_is_not_ready_says_so(content: Any, words: str, tmp_path: Path) -> None:
    (check,) = examine(content, tmp_path / "hccl.json")
    assert check.status == "missing" and words in check.value and check.advice


def test_a_table_that_is_not_there_says_so(tmp_path: Path) -> None:
    (check,) = rank_table.examine(tmp_path / "none.json", 2)
    assert check.status == "missing" and "RANK_TABLE_FILE" in check.advice
