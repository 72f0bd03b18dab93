"""``npu-qat parity device``: exit codes, the recording, the replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npu_qat.cli import main

QUICK = ["parity", "device", "--device", "cpu", "--backend", "reference", "--quick"]


def test_a_device_that_agrees_exits_with_0_and_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    command = [*QUICK, "--profile", "ascend950", "--case", "ties", "--case", "specials"]
    assert main([*command, "--record", str(path)]) == 0
    said = capsys.readouterr()
    assert "equal" in said.out and str(path.with_suffix(".safetensors")) in said.err
    content = json.loads(path.read_text())
    assert content["stubbed"] is False and content["device"] == "cpu"
    assert "torch" in content["environment"] and content["differ"] == 0
    assert {e["case"] for e in content["entries"]} == {"ties", "specials", "specials-transposed"}
    assert main(["parity", "device", "--replay", str(path)]) == 0
    assert "suite 1 on cpu" in capsys.readouterr().out


def test_a_recorded_difference_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    command = [*QUICK, "--profile", "ascend950-rint", "--case", "ties"]
    assert main([*command, "--record", str(path)]) == 0
    # As if the device had answered with these codes when it was asked for the other rounding.
    text = path.read_text().replace("ascend950-rint", "ascend950-round")
    path.write_text(text.replace("ascend950-round", "ascend950"))
    tensors = path.with_suffix(".safetensors")
    rename(tensors, path, "ascend950-rint", "ascend950")
    assert main(["parity", "device", "--replay", str(path)]) == 1
    said = capsys.readouterr().out
    assert "DIFFER" in said and "codes: tie" in said and "expected codes" in said


def rename(tensors: Path, path: Path, old: str, new: str) -> None:
    """Give the recorded tensors another profile, and the JSON their new digest."""
    import hashlib

    from safetensors.torch import load, save

    data = save({k.replace(old, new): v for k, v in load(tensors.read_bytes()).items()})
    tensors.write_bytes(data)
    content = json.loads(path.read_text())
    content["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(content))


def test_nothing_compared_is_not_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--profile", "ascend950", "--case", "exact-3d"]) == 1
    assert "refused every case" in capsys.readouterr().err
    assert main([*QUICK, "--profile", "ascend950", "--case", "no such case"]) == 2
    assert "no case" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "npu"], "npu"),
        (["--replay", "missing.json"], "missing.json"),
        (["--replay", "a.json", "--record", "b.json"], "choose one"),
        ([*QUICK[2:], "--profile", "mxfp5"], "unknown numerics profile"),
        ([*QUICK[2:], "--record", "file.txt"], ".json"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "device", *arguments]) == 2
    assert message in capsys.readouterr().err
