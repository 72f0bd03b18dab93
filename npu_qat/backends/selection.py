"""Which device a run uses, which backend computes on it, and why.

``auto`` takes the first of npu, cuda, cpu that can run a tensor operation, and on it the first
backend that can be had; a named device or backend that is not there is an error, never a quiet
fallback. The reason is part of the result, because a run that was slow or emulated without anyone
noticing is worth nothing as evidence.

A backend is a module with ``load(device) -> Backend``, which raises ``BackendUnavailable`` where it
cannot run.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

import torch

from npu_qat.backends import npu_installation
from npu_qat.backends.base import Backend, BackendUnavailable

DEVICES = ("npu", "cuda", "cpu")
# By name, the module of each backend; and for each device those that run on it, the best first.
MODULES = {
    "reference": "npu_qat.backends.emulation",
    "npu": "npu_qat.backends.npu",
    "ascendc": "npu_qat.backends.ascendc",
    "cpu": "npu_qat.backends.cpu",
    "cuda": "npu_qat.backends.cuda",
}
ON_DEVICE = {
    "npu": ("npu", "ascendc", "reference"),
    "cuda": ("cuda", "reference"),
    "cpu": ("cpu", "reference"),
}


@dataclass(frozen=True)
class Selection:
    """The device of a run, the backend that computes on it, and the reason for both."""

    device: torch.device
    backend: Backend
    reason: str


@dataclass(frozen=True)
class Probe:
    """What one look at a device found."""

    name: str
    available: bool
    detail: str


def select(device: str = "auto", backend: str = "auto") -> Selection:
    """Choose a device and who computes on it.

    Args:
        device: ``auto``, ``npu``, ``cuda`` or ``cpu``.
        backend: ``auto`` or a key of ``MODULES``; ``reference`` is plain PyTorch.

    Raises:
        BackendUnavailable: a named device or backend cannot be used; the message holds what was
            found.
        ValueError: ``device`` or ``backend`` is no such name.
    """
    if device not in ("auto", *DEVICES):
        raise ValueError(f"unknown device {device!r}; choose auto, npu, cuda or cpu")
    if backend not in ("auto", *MODULES):
        raise ValueError(f"unknown backend {backend!r}; choose auto, {', '.join(MODULES)}")
    if device != "auto":
        probe = _probe(device)
        if not probe.available:
            raise BackendUnavailable(
                f"device {device!r} is not available: {probe.detail}. "
                "Use --device auto to take what is there, or --device cpu."
            )
        if device != "npu":
            npu_installation.hide_torch_npu()
        return _selection(probe, f"asked for; {probe.detail}", backend)
    passed_over: list[str] = []
    for probe in map(_probe, DEVICES):
        if probe.available:
            if probe.name != "npu":
                npu_installation.hide_torch_npu()
            why = "; ".join([*passed_over, f"chosen: {probe.detail}"])
            return _selection(probe, why, backend)
        passed_over.append(f"no {probe.name}: {probe.detail}")
    raise BackendUnavailable("not even the CPU can run torch: " + "; ".join(passed_over))


def probe_devices() -> list[Probe]:
    """What is there, device by device, for ``npu-qat doctor``."""
    return [_probe(name) for name in DEVICES]


def _selection(probe: Probe, why: str, wanted: str) -> Selection:
    device = torch.device(probe.name)
    backend, how = _backend(wanted, probe.name, device)
    described = ", ".join(f"{key} {value}" for key, value in backend.describe().items())
    return Selection(
        device=device,
        backend=backend,
        reason=f"{probe.name} ({why}); 4-bit numbers by {described.removeprefix('name ')} ({how})",
    )


def _backend(wanted: str, device_name: str, device: torch.device) -> tuple[Backend, str]:
    """The backend called ``wanted``, or the first that can be had, and how it was chosen."""
    offered = ON_DEVICE[device_name]
    if wanted != "auto":
        if wanted not in offered:
            raise BackendUnavailable(
                f"backend {wanted!r} does not run on {device_name}, which has {', '.join(offered)}"
            )
        return _load(wanted, device), "asked for"
    passed_over: list[str] = []
    for name in offered:
        try:
            backend = _load(name, device)
        except BackendUnavailable as error:
            passed_over.append(f"not {name}: {error}")
        else:
            return backend, "; ".join(passed_over) or "the first choice there"
    raise BackendUnavailable(f"nothing computes on {device_name}: " + "; ".join(passed_over))


def _load(name: str, device: torch.device) -> Backend:
    backend: Backend = importlib.import_module(MODULES[name]).load(device)
    return backend


def _probe(name: str) -> Probe:
    return {"npu": _probe_npu, "cuda": _probe_cuda, "cpu": _probe_cpu}[name]()


def _probe_npu() -> Probe:
    if not npu_installation.is_installed():
        return Probe("npu", False, "torch_npu is not installed (pip install 'npu-qat[npu]')")
    if "torch_npu" not in sys.modules and not npu_installation.device_nodes():
        # Not even imported: without a device it breaks optimisers on the CPU.
        return Probe(
            "npu",
            False,
            "torch_npu is installed but there is no NPU: no /dev/davinci* (is the driver loaded? "
            "was the container started with --device /dev/davinci0?)",
        )
    try:
        npu_installation.import_torch_npu()
    except Exception as error:  # the vendor package fails in many ways; each is a "not available"
        return Probe("npu", False, npu_installation.explain_import_error(error))
    missing = (
        "torch_npu is installed but sees no NPU (is the driver loaded? does "
        "ASCEND_RT_VISIBLE_DEVICES name one?)"
    )
    probe = _try_device("npu", getattr(torch, "npu", None), missing)
    return probe if not probe.available else _check_chip(probe)


def _check_chip(probe: Probe) -> Probe:
    from npu_qat.backends.npu.soc import current_soc

    soc = current_soc(torch.npu)  # type: ignore[attr-defined]
    if soc.refusal is not None:
        return Probe("npu", False, soc.refusal)
    return Probe("npu", True, f"{probe.detail}, {soc.family}: {soc.capability}")


def _probe_cuda() -> Probe:
    if torch.version.cuda is None and torch.version.hip is None:
        return Probe("cuda", False, f"torch {torch.__version__} is a build without CUDA")
    missing = "torch sees no CUDA device (driver? CUDA_VISIBLE_DEVICES?)"
    return _try_device("cuda", torch.cuda, missing)


def _probe_cpu() -> Probe:
    return _try_tensor("cpu", f"{torch.get_num_threads()} threads")


def _try_device(name: str, module: Any, missing: str) -> Probe:
    """Ask ``torch.<name>`` for its devices; a driver may fail at any of these questions."""
    try:
        if module is None or not module.is_available():
            return Probe(name, False, missing)
        detail = f"{module.device_count()} x {module.get_device_name(0)}"
    except RuntimeError as error:
        return Probe(name, False, f"its driver fails: {str(error).splitlines()[0]}")
    return _try_tensor(name, detail)


def _try_tensor(name: str, detail: str) -> Probe:
    try:
        (torch.ones(2, device=name) + 1).sum().item()
    except RuntimeError as error:
        return Probe(name, False, f"a first addition failed: {str(error).splitlines()[0]}")
    return Probe(name, True, detail)
