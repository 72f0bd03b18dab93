"""Facts of several ranks side by side: what differs is named, with the host."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_qat.cluster.agreement import compare
from npu_qat.cluster.check import Check
from npu_qat.cluster.collectives import judge_clocks
from npu_qat.cluster.facts import EDGE, collect, files_fingerprint
from npu_qat.cluster.shared_folder import judge, look, nearest
from npu_qat.config import RunConfig


def fact(rank: int, host: str, local: int) -> dict[str, Any]:
    return {
        "rank": rank,
        "local_rank": local,
        "host": host,
        "device": "npu",
        "devices": 2,
        "accelerator": "Ascend950PR",
        "versions": {"python": "3.12.1", "torch": "2.10.0", "torch-npu": "2.10.0.post4"},
        "code": "abc",
        "variables": {"HCCL_CONNECT_TIMEOUT": "600"},
        "interface": {"name": "bond1", "address": f"10.0.0.{1 + (host == 'b')}"},
        "addresses": {"bond1": [f"10.0.0.{1 + (host == 'b')}"]},
        "config": "cfg",
        **({"model": "m1", "task": "built in"} if local == 0 else {}),
    }


@pytest.fixture
def facts() -> list[dict[str, Any]]:
    return [fact(0, "a", 0), fact(1, "a", 1), fact(2, "b", 0), fact(3, "b", 1)]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_machines_that_agree_pass(facts: list[dict[str, Any]]) -> None:
    checks = compare(facts)
    assert {check.status for check in checks} == {"ok"}
    assert by_name(checks)["hosts"].value == "4 processes on 2 hosts. a: ranks 0, 1; b: ranks 2, 3"
    assert by_name(checks)["interfaces"].value == "a: bond1 10.0.0.1; b: bond1 10.0.0.2"


@pytest.mark.parametrize(
    ("change", "name", "status", "words"),
    [
        ({"code": "xyz"}, "code", "missing", "abc on a; xyz on b"),
        ({"config": "other"}, "configuration", "missing", "cfg on a; other on b"),
        ({"model": "m2"}, "model files", "missing", "m1 on a; m2 on b"),
        ({"model": "not there"}, "model files", "missing", "model.path is not there on b"),
        ({"device": "cpu"}, "device", "missing", "npu on a; cpu on b"),
        ({"accelerator": "Ascend910B3"}, "accelerator", "warning", "Ascend910B3 on b"),
        ({"devices": 1}, "a device each", "missing", "b has 1 for local rank 1"),
        ({"variables": {}}, "HCCL_CONNECT_TIMEOUT", "warning", "600 on a; not set on b"),
        (
            {"interface": {"name": "lo", "address": "127.0.0.1"}},
            "interfaces",
            "missing",
            "b would talk to itself",
        ),
        (
            {"versions": {"python": "3.12.1", "torch": "2.11.0"}},
            "torch",
            "missing",
            "2.10.0 on a; 2.11.0 on b",
        ),
        (
            {"versions": {"python": "3.12.1", "torch": "2.11.0"}},
            "torch-npu",
            "missing",
            "2.10.0.post4 on a; not installed on b",
        ),
    ],
)
def test_what_differs_is_named_with_its_host(
    facts: list[dict[str, Any]], change: dict[str, Any], name: str, status: str, words: str
) -> None:
    for f in facts[2:]:
        f.update({k: v for k, v in change.items() if k in f})
    check = by_name(compare(facts))[name]
    assert check.status == status
    assert words in check.value
    assert check.advice or status == "warning"


def test_one_rank_of_a_host_that_differs_is_named_by_its_rank(
    facts: list[dict[str, Any]],
) -> None:
    facts[3]["code"] = "old"
    value = by_name(compare(facts))["code"].value
    assert value == "differs: abc on a, b rank 2; old on b rank 3"


def test_machines_with_one_name_are_a_warning(facts: list[dict[str, Any]]) -> None:
    same = [copy.deepcopy(fact(rank, "localhost", 0)) for rank in range(2)]
    assert by_name(compare(same))["hosts"].status == "warning"


def test_a_process_knows_itself() -> None:
    found = collect(torch.device("cpu"), RunConfig())
    assert found["rank"] == 0 and found["device"] == "cpu" and found["devices"] >= 1
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["code"]) == 12 == len(found["config"])
    assert found == collect(torch.device("cpu"), RunConfig())
    assert compare([found]) != []


def test_files_are_told_apart_by_size_beginning_and_end(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    content = bytearray(3 * EDGE)
    weights.write_bytes(content)
    first = files_fingerprint(str(folder))
    assert files_fingerprint(str(folder)) == first
    (folder / "README.md").write_text("words do not count")
    assert files_fingerprint(str(folder)) == first
    content[-1] = 1
    weights.write_bytes(content)
    changed = files_fingerprint(str(folder))
    weights.write_bytes(content[:-1])
    assert len({first, changed, files_fingerprint(str(folder))}) == 3


def test_a_hidden_folder_above_a_model_hides_nothing_of_it(tmp_path: Path) -> None:
    folders = [tmp_path / ".cache" / name for name in ("one", "other")]
    for folder in folders:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "model.safetensors").write_text(folder.name)
    first, other = (files_fingerprint(str(folder)) for folder in folders)
    assert first != other
    (folders[0] / ".git" / "a" / "b" / "c").mkdir(parents=True)
    (folders[0] / ".git" / "a" / "b" / "c" / "x").touch()
    assert files_fingerprint(str(folders[0])) == first


def test_paths_that_are_no_files_stand_for_themselves() -> None:
    assert files_fingerprint("Qwen/Qwen2.5-1.5B") == "by name: Qwen/Qwen2.5-1.5B"
    assert files_fingerprint("/nowhere/at/all") == "not there"
    assert files_fingerprint(None) == "built in"


def test_clocks_apart_are_a_warning_with_the_host() -> None:
    assert judge_clocks({"a": 0.0, "b": 0.004}).status == "ok"
    late = judge_clocks({"a": 0.0, "b": -75.3})
    assert late.status == "warning" and "b is 75.3 s behind the host of rank 0" in late.value


def test_a_shared_folder_is_found_and_left_clean(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    check = look(run, [{"host": "a"}], lambda value: [value])
    assert check.status == "ok" and str(tmp_path) in check.value
    assert list(tmp_path.iterdir()) == []
    assert nearest(run) == tmp_path


def test_a_folder_that_others_do_not_see_says_what_follows(tmp_path: Path) -> None:
    facts = [{"host": "a"}, {"host": "b"}, {"host": "b"}]
    check = judge(tmp_path / "run", tmp_path, None, facts, [True, False, False])
    assert check.status == "warning" and "not seen by b" in check.value
    assert "rank 0 must be on a again" in check.advice


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    check = judge(tmp_path, tmp_path, "cannot write to x: denied", [{"host": "a"}], [False])
    assert check.status == "missing" and "denied" in check.value
