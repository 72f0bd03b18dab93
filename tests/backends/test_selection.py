"""Which device is chosen, why, and what is said when a named one is missing."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from npu_qat.backends import BackendUnavailable, EmulationBackend, probe_devices, select, selection
from npu_qat.backends.selection import Probe


def pretend(monkeypatch: pytest.MonkeyPatch, **found: Probe) -> None:
    """Replace the probes of the named devices."""
    real = selection._probe
    monkeypatch.setattr(
        selection, "_probe", lambda name: found[name] if name in found else real(name)
    )


NONE = {
    "npu": Probe("npu", False, "torch_npu is not installed"),
    "cuda": Probe("cuda", False, "a build without CUDA"),
}


def test_the_cpu_is_always_there() -> None:
    chosen = select("cpu")
    assert chosen.device == torch.device("cpu")
    assert chosen.backend.name == ("cpu" if importlib.util.find_spec("numba") else "emulation")
    assert "cpu (asked for; " in chosen.reason and f"by {chosen.backend.name}" in chosen.reason


def test_auto_says_what_it_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **NONE)
    chosen = select("auto")
    assert chosen.device.type == "cpu"
    assert "no npu: torch_npu is not installed; no cuda: a build without CUDA" in chosen.reason
    assert "threads" in chosen.reason


@pytest.mark.parametrize(
    ("there", "wanted"), [({"npu", "cuda"}, "npu"), ({"cuda"}, "cuda"), ({"npu"}, "npu")]
)
def test_auto_takes_the_first_that_works(
    there: set[str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {n: Probe(n, True, f"1 x {n}") if n in there else NONE[n] for n in NONE}
    pretend(monkeypatch, **found)
    # torch knows the name "npu" only with torch_npu.
    monkeypatch.setattr(selection.torch, "device", lambda name: SimpleNamespace(type=name))
    chosen = select("auto")
    assert chosen.device.type == wanted
    assert f"chosen: 1 x {wanted}" in chosen.reason


@pytest.mark.parametrize("device", ["npu", "cuda"])
def test_a_named_device_that_is_missing_is_an_error_not_a_fallback(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **NONE)
    with pytest.raises(BackendUnavailable) as caught:
        select(device)
    text = str(caught.value)
    assert f"device '{device}' is not available: {NONE[device].detail}" in text
    assert "--device cpu" in text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("device", ["gpu", "CPU", "cuda:0", ""])
def test_an_unknown_name_is_an_error(device: str) -> None:
    with pytest.raises(ValueError, match="choose auto, npu, cuda or cpu"):
        select(device)


def test_nothing_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **NONE, cpu=Probe("cpu", False, "broken"))
    with pytest.raises(BackendUnavailable, match=r"not even the CPU.*no cpu: broken"):
        select("auto")


# --- probes ---------------------------------------------------------------------------------


def test_every_device_is_probed_in_the_order_of_preference() -> None:
    probes = probe_devices()
    assert [probe.name for probe in probes] == ["npu", "cuda", "cpu"]
    assert all(probe.detail for probe in probes)
    assert probes[2].available and probes[2].detail == f"{torch.get_num_threads()} threads"


def npu_stack(
    monkeypatch: pytest.MonkeyPatch,
    *,
    import_error: Exception | None = None,
    npu: object | None = None,
) -> None:
    """Pretend that torch_npu is installed; its import fails or gives torch a ``torch.npu``."""
    find, load = importlib.util.find_spec, importlib.import_module

    def find_spec(name: str, *args: object) -> object:
        return object() if name == "torch_npu" else find(name, *args)

    def import_module(name: str, *args: object) -> object:
        if name != "torch_npu":
            return load(name, *args)
        if import_error is not None:
            raise import_error
        return SimpleNamespace()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(selection.npu_installation, "device_nodes", lambda: ["/dev/davinci0"])
    if npu is not None:
        monkeypatch.setattr(torch, "npu", npu, raising=False)


def probe(name: str) -> Probe:
    return selection._probe(name)


def test_no_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert probe("npu") == Probe(
        "npu", False, "torch_npu is not installed (pip install 'npu-qat[npu]')"
    )


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ImportError("libhccl.so: cannot open shared object file"), "CANN's environment is not"),
        (RuntimeError("version mismatch"), "torch_npu cannot be imported: version mismatch"),
        (AttributeError("torch has no attribute x"), "no attribute x"),
    ],
)
def test_torch_npu_that_cannot_be_imported(
    error: Exception, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu_stack(monkeypatch, import_error=error)
    found = probe("npu")
    assert not found.available
    assert hint in found.detail


def test_torch_npu_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container image with CANN but no device: DeepSpeed would pick the NPU here."""
    npu_stack(monkeypatch, npu=SimpleNamespace(is_available=lambda: False))
    found = probe("npu")
    assert not found.available
    assert "torch_npu is installed but sees no NPU" in found.detail
    assert "ASCEND_RT_VISIBLE_DEVICES" in found.detail


def test_torch_npu_is_not_even_imported_where_there_is_no_device_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Importing it would break the optimisers of a run on the CPU."""
    npu_stack(monkeypatch, import_error=AssertionError("imported"))
    monkeypatch.setattr(selection.npu_installation, "device_nodes", list)
    found = probe("npu")
    assert not found.available
    assert "no /dev/davinci*" in found.detail and "--device" in found.detail


def raising(error: Exception) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        raise error

    return call


@pytest.mark.parametrize("attribute", ["is_available", "device_count", "get_device_name"])
def test_a_driver_that_fails_while_it_is_asked_is_no_device(
    attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1, get_device_name=lambda i: "Ascend950"
    )
    setattr(npu, attribute, raising(RuntimeError("aclInit failed\nlong trace")))
    npu_stack(monkeypatch, npu=npu)
    found = probe("npu")
    assert not found.available
    assert "aclInit failed" in found.detail and "long trace" not in found.detail


def test_a_device_that_cannot_add_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    npu = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda i: "Ascend950"
    )
    npu_stack(monkeypatch, npu=npu)
    monkeypatch.setattr(torch, "ones", raising(RuntimeError("507899 at stream\nlong trace")))
    assert probe("npu") == Probe("npu", False, "a first addition failed: 507899 at stream")


def test_a_build_without_cuda_and_a_machine_without_cuda_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    assert "is a build without CUDA" in probe("cuda").detail
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = probe("cuda")
    assert not found.available and "sees no CUDA device" in found.detail


# --- the emulation --------------------------------------------------------------------------


def test_the_emulation_is_the_arithmetic_of_numerics() -> None:
    from npu_qat.numerics import dequantize, fake_quant, quantize

    backend, x = EmulationBackend(), torch.randn(4, 80).bfloat16()
    scale = torch.tensor(0.01)
    for profile, extra in (("ascend950", {}), ("nvfp4", {"tensor_scale": scale})):
        q, wanted = backend.quantize(x, profile, -1, **extra), quantize(x, profile, -1, **extra)
        assert torch.equal(q.codes, wanted.codes) and torch.equal(q.scales, wanted.scales)
        values = backend.fake_quant(x, profile, -1, **extra)
        assert torch.equal(values, fake_quant(x, profile, -1, **extra))
        assert torch.equal(values, backend.dequantize(q, torch.bfloat16))
        assert torch.equal(backend.dequantize(q, torch.float32), dequantize(wanted, torch.float32))


def test_selection_imports_no_vendor_package_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    real = builtins.__import__

    def watch(name: str, *args: object, **kwargs: object) -> object:
        imported.append(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", watch)
    select("cpu")
    assert "torch_npu" not in imported and "torch_npu" not in sys.modules
