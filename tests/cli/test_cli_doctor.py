"""``doctor``: says what is there, fails only for what training needs, never with a traceback."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from npu_qat.cli import doctor, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checks() -> dict[str, doctor.Check]:
    return {f"{check.area}/{check.name}": check for check in doctor.examine()}


def test_this_environment_is_healthy(checks: dict[str, doctor.Check]) -> None:
    assert [check for check in checks.values() if check.status == "missing"] == []
    assert checks["packages/torch"].value.startswith("2.")
    assert checks["devices/cpu"].status == "ok"
    assert "chosen" in checks["devices/auto"].value
    assert checks["files/demo model"].status == "ok"
    assert checks["machine/disk"].value.split()[1] == "GiB"


def test_the_accelerator_is_the_one_a_run_would_set(checks: dict[str, doctor.Check]) -> None:
    found = checks["training/DeepSpeed accelerator"]
    assert found.status == "ok"
    chosen = checks["devices/auto"].value.split()[0]
    assert found.value.startswith({"cpu": "cpu with gloo"}.get(chosen, chosen))


def test_looking_leaves_the_environment_alone() -> None:
    before = dict(os.environ)
    doctor.examine()
    assert dict(os.environ) == before


def test_json_holds_the_same_checks(
    checks: dict[str, doctor.Check], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert [f"{c['area']}/{c['name']}" for c in report["checks"]] == list(checks)


def test_what_is_needed_and_missing_fails_and_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: None if n == "peft" else version(n))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "missing: peft" in out and "pip install 'peft>=" in out


def test_a_version_that_is_too_old_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "5.4.9")
    check = doctor._package("transformers", "5.5")
    assert (check.status, check.value) == ("missing", "5.4.9 is older than 5.5")


def test_without_torch_the_rest_is_still_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: None if n == "torch" else version(n))
    found = {check.name: check for check in doctor.examine()}
    assert found["torch"].status == found["DeepSpeed accelerator"].status == "missing"
    assert "bootstrap" in found["torch"].advice
    assert found["disk"].status == "ok"


def test_what_is_needed_is_what_the_package_declares() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("\ndependencies = [")[1].split("]")[0]
    declared = dict(re.findall(r'"([\w-]+)>=([\d.]+)', block))
    assert declared == doctor.NEEDED


@pytest.mark.parametrize(
    ("version", "key"), [("2.13.0+cpu", (2, 13, 0)), ("2.10.0.post4", (2, 10, 0)), ("x", ())]
)
def test_versions_are_compared_by_their_numbers(version: str, key: tuple[int, ...]) -> None:
    assert doctor.version_key(version) == key


def test_an_ascend_machine_without_its_toolkit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", "/usr/local/nowhere")
    versions = {"torch": "2.13.0", "torch-npu": "2.10.0.post4"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = {check.name: check for check in doctor._ascend()}
    assert found["CANN"].value == "version unknown at /usr/local/nowhere"
    assert found["torch-npu"].status == "warning"


def test_the_toolkits_version_is_read_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "version.cfg").write_text("# x\nVersion=9.1.0\n")
    assert doctor._cann_version(tmp_path) == "9.1.0"
