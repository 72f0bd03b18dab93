"""Every recording in this folder replays: what was once measured stays true."""

from __future__ import annotations

from pathlib import Path

import pytest

from npu_qat.cli import main
from npu_qat.parity.device import judge, passed, report
from npu_qat.parity.device_recording import read_recording

HERE = Path(__file__).parent
RECORDINGS = sorted(path.stem for path in HERE.glob("*.json"))
# name -> the profiles in which this device is known to compute other numbers
KNOWN_TO_DIFFER: dict[str, set[str]] = {}


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recording_replays(name: str) -> None:
    recording = read_recording(HERE / f"{name}.json")
    verdicts = judge(recording)
    differing = {v.entry.profile for v in verdicts if not v.equal and not v.refused}
    assert differing == KNOWN_TO_DIFFER.get(name, set()), report(recording, verdicts)
    assert differing or passed(verdicts)


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recording_is_complete_and_listed(name: str) -> None:
    assert (HERE / f"{name}.safetensors").is_file()
    assert f"`{name}`" in (HERE / "README.md").read_text(encoding="utf-8")
    assert read_recording(HERE / f"{name}.json").stubbed is name.startswith("stubbed-")


def test_there_is_a_recording_and_the_command_replays_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert RECORDINGS, "at least the stubbed one"
    assert main(["parity", "device", "--replay", str(HERE / "stubbed-torch-npu-2.13.0.json")]) == 0
    said = capsys.readouterr().out
    assert "STUBBED" in said and "ascend950 " in said and "equal" in said
