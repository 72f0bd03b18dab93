"""``doctor``: says what is there, fails only for what training needs, never with a traceback."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from npu_qat.backends import npu_installation
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
    # Those with a condition (numba) are not needed everywhere.
    declared = dict(re.findall(r'"([\w-]+)>=([\d.]+)[,<\d]*"', block))
    assert declared == doctor.NEEDED


@pytest.mark.parametrize(
    ("version", "key"), [("2.13.0+cpu", (2, 13, 0)), ("2.10.0.post4", (2, 10, 0)), ("x", ())]
)
def test_versions_are_compared_by_their_numbers(version: str, key: tuple[int, ...]) -> None:
    assert doctor.version_key(version) == key


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "npu"], "'device' belongs to doctor --cluster"),
        (["--preset", "demo"], "'preset' belongs to doctor --cluster"),
        (["--rendezvous", "127.0.0.1:9", "--cluster"], "--rendezvous is a test of its own"),
        (["--rendezvous", "127.0.0.1:9", "--device", "cpu"], "--rendezvous is a test of its own"),
        (["--rendezvous", "127.0.0.1:9", "my.yaml"], "--rendezvous is a test of its own"),
        (["--rendezvous", "127.0.0.1:9", "--set", "train.lr=1"], "--rendezvous is a test of its"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err


def ascend_checks(
    monkeypatch: pytest.MonkeyPatch, home: str | None, **versions: str
) -> dict[str, doctor.Check]:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("ASCEND_HOME_PATH", home)
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(doctor, "_version", named.get)
    return {check.name: check for check in doctor._ascend()}


def test_a_machine_without_ascend_software_hears_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ascend_checks(monkeypatch, None, torch="2.13.0") == {}


def test_an_ascend_machine_without_its_toolkit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ascend_checks(
        monkeypatch, "/usr/local/nowhere", torch="2.13.0", torch_npu="2.10.0.post4"
    )
    assert found["CANN"].value == "version unknown at /usr/local/nowhere"
    assert found["torch-npu"].status == "warning"
    assert "needs torch 2.10.0, not 2.13.0" in found["torch-npu"].value
    assert found["device files"].status == found["driver"].status == "warning"
    assert "set_env.sh" in found["HCCL"].advice


def test_an_environment_that_was_not_sourced_is_told_what_to_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ascend_checks(monkeypatch, None, torch="2.10.0+cpu", torch_npu="2.10.0.post4")
    assert found["CANN"].status == "warning"
    assert "source" in found["CANN"].advice and "set_env.sh" in found["CANN"].advice
    assert found["torch-npu"].status == "ok"


@pytest.mark.parametrize(
    ("driver", "status"),
    [("25.0.rc1", "warning"), ("24.1.0", "warning"), ("25.2.1", "ok"), ("26.0.rc1", "ok")],
)
def test_a_driver_that_is_too_old_for_the_toolkit_is_a_warning(
    driver: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.cfg").write_text("Version=9.1.0\n")
    monkeypatch.setattr(npu_installation, "driver_version", lambda: driver)
    found = ascend_checks(monkeypatch, str(tmp_path), torch="2.10.0", torch_npu="2.10.0.post4")
    assert found["driver"].status == status
    if status == "warning":
        assert "CANN 9.1.0 needs driver 25.2 or newer" in found["driver"].value


def test_a_toolkit_of_an_unknown_release_says_nothing_of_the_driver() -> None:
    assert npu_installation.driver_problem("24.1.0", "99.0.0") is None
    assert npu_installation.driver_problem("24.1.0", None) is None
    assert npu_installation.driver_problem("24.1.0", "9.0.0") is not None


@pytest.mark.parametrize(("version", "status"), [("8.5.0", "warning"), ("9.1.0", "ok")])
def test_a_toolkit_without_fp4_operators_is_a_warning(
    version: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.cfg").write_text(f"Version={version}\n")
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libhccl.so").touch()
    found = ascend_checks(monkeypatch, str(tmp_path), torch="2.10.0")
    assert (found["CANN"].status, version in found["CANN"].value) == (status, True)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}/lib64")
    assert {c.name: c for c in doctor._ascend()}["HCCL"].status == "ok"


def test_an_accelerator_that_contradicts_the_device_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DS_ACCELERATOR left over in a shell: DeepSpeed would train elsewhere than the model is."""
    accelerator = type("Cuda", (), {"_name": "cuda", "communication_backend_name": lambda s: "x"})
    module = type("M", (), {"get_accelerator": staticmethod(accelerator)})
    real = doctor.importlib.import_module
    monkeypatch.setattr(
        doctor.importlib,
        "import_module",
        lambda n: module if n == "deepspeed.accelerator" else real(n),
    )
    chosen = type("S", (), {"device": type("D", (), {"type": "cpu"})})
    monkeypatch.setattr("npu_qat.backends.selection.select", lambda name: chosen)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    found = doctor._deepspeed()
    assert found.status == "warning" and "a run would take cpu" in found.value
