"""Which chip is what, and what each may do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from npu_qat.backends import BackendUnavailable, selection
from npu_qat.backends import npu as npu_backend
from npu_qat.backends.npu import current_soc, identify
from npu_qat.backends.selection import Probe


@pytest.mark.parametrize(
    ("name", "number", "family"),
    [
        ("Ascend950PR", 260, "950"),
        ("Ascend950DT_9582", None, "950"),
        ("Ascend910_9589", None, "950"),
        ("Ascend910B1", 220, "A2"),
        ("Ascend910B4-1", None, "A2"),
        ("Ascend910", 225, "A2"),
        ("Ascend910", 250, "A3"),  # what npu-smi prints for an A3
        ("Ascend910_9391", None, "A3"),
        ("Ascend910_9363", 256, "A3"),
        ("Ascend310P3", 202, "310P"),
        ("Ascend310B4", 243, "310B"),
        ("Ascend910B", 104, "910A"),  # the first generation's own "910B"
        ("Ascend910B", None, "910A"),
        ("Ascend910ProA", None, "910A"),
        ("Ascend910", None, "unknown"),
        ("Ascend999", 999, "unknown"),
        ("Ascend950X", 999, "950"),  # a number that is new, a name that is known
    ],
)
def test_a_chip_is_known_by_its_number_then_by_its_name(
    name: str, number: int | None, family: str
) -> None:
    assert identify(name, number).family == family


def test_only_the_950_multiplies_codes() -> None:
    families = {identify("", n).family: identify("", n).fused for n in (202, 222, 243, 252, 260)}
    assert families == {"310P": False, "A2": False, "310B": False, "A3": False, "950": True}


@pytest.mark.parametrize("number", [101, 202, 242, 7])
def test_chips_that_cannot_train_are_refused_with_the_reason(number: int) -> None:
    soc = identify("AscendX", number)
    assert soc.refusal is not None and "AscendX" in soc.refusal
    assert "bf16" in soc.refusal or "Ascend 950, A3 and A2" in soc.refusal


def npu(name: str, number: int | Exception) -> SimpleNamespace:
    def get_soc_version() -> int:
        if isinstance(number, Exception):
            raise number
        return number

    return SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 8,
        get_device_name=lambda index: name,
        get_soc_version=get_soc_version,
    )


def test_a_build_that_does_not_tell_its_number_is_known_by_its_name() -> None:
    soc = current_soc(npu("Ascend950PR", RuntimeError("not initialised")))
    assert (soc.number, soc.family) == (None, "950")


@pytest.mark.parametrize(
    ("name", "number", "available", "detail"),
    [
        ("Ascend950PR", 260, True, "8 x Ascend950PR, 950: MXFP4 operators and matmul"),
        ("Ascend910B3", 223, True, "no FP4 operators: MXFP4 is emulated"),
        ("Ascend310P3", 202, False, "an inference chip without bf16"),
        ("Ascend777", 777, False, "not a chip that this version knows"),
    ],
)
def test_the_probe_says_what_the_chip_can_do(
    name: str,
    number: int,
    available: bool,
    detail: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "npu", npu(name, number), raising=False)
    monkeypatch.setattr(selection.npu_installation, "is_installed", lambda: True)
    monkeypatch.setattr(selection.npu_installation, "device_nodes", lambda: ["/dev/davinci0"])
    monkeypatch.setattr(selection.npu_installation, "import_torch_npu", lambda: None)
    monkeypatch.setattr(selection, "_try_tensor", lambda name, detail: Probe(name, True, detail))
    found = selection._probe("npu")
    assert found.available is available and detail in found.detail


def test_without_fp4_operators_the_npu_backend_gives_way_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "npu", npu("Ascend910B3", 223), raising=False)
    with pytest.raises(BackendUnavailable, match=r"Ascend910B3.*A2.*no FP4 operators"):
        npu_backend.load(torch.device("cpu"))
    backend, how = selection._backend("auto", "npu", torch.device("cpu"))
    assert backend.name != "npu" and "not npu: Ascend910B3" in how


def test_a_named_backend_of_another_device_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="'npu' does not run on cpu, which has"):
        selection.select("cpu", "npu")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        selection.select("cpu", "fast")
    assert selection.select("cpu", "reference").backend.name == "emulation"
