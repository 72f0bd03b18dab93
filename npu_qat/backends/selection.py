"""Which device a run uses, and why.

``auto`` takes the first of npu, cuda, cpu that can run a tensor operation; a named device that is
not there is an error, never a quiet fallback. The reason is part of the result, because a run that
was slow or emulated without anyone noticing is worth nothing as evidence.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from npu_qat.backends.base import Backend, BackendUnavailable
from npu_qat.backends.emulation import EmulationBackend

DEVICES = ("npu", "cuda", "cpu")


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


def select(device: str = "auto") -> Selection:
    """Choose a device and its backend.

    Args:
        device: ``auto``, ``npu``, ``cuda`` or ``cpu``.

    Raises:
        BackendUnavailable: a named device cannot be used; the message holds what was found.
        ValueError: ``device`` is none of the four names.
    """
    if device not in ("auto", *DEVICES):
        raise ValueError(f"unknown device {device!r}; choose auto, npu, cuda or cpu")
    if device != "auto":
        probe = _probe(device)
        if not probe.available:
            raise BackendUnavailable(
                f"device {device!r} is not available: {probe.detail}. "
                "Use --device auto to take what is there, or --device cpu."
            )
        return _selection(probe, f"asked for; {probe.detail}")
    passed_over: list[str] = []
    for probe in map(_probe, DEVICES):
        if probe.available:
            return _selection(probe, "; ".join([*passed_over, f"chosen: {probe.detail}"]))
        passed_over.append(f"no {probe.name}: {probe.detail}")
    raise BackendUnavailable("not even the CPU can run torch: " + "; ".join(passed_over))


def probe_devices() -> list[Probe]:
    """What is there, device by device, for ``npu-qat doctor``."""
    return [_probe(name) for name in DEVICES]


def _selection(probe: Probe, why: str) -> Selection:
    backend = EmulationBackend()
    return Selection(
        device=torch.device(probe.name),
        backend=backend,
        reason=f"{probe.name} ({why}); 4-bit numbers by {backend.name}, "
        "the reference arithmetic in plain PyTorch",
    )


def _probe(name: str) -> Probe:
    return {"npu": _probe_npu, "cuda": _probe_cuda, "cpu": _probe_cpu}[name]()


def _probe_npu() -> Probe:
    if importlib.util.find_spec("torch_npu") is None:
        return Probe("npu", False, "torch_npu is not installed (pip install 'npu-qat[npu]')")
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # the vendor package fails in many ways; each is a "not available"
        hint = " (is CANN's set_env.sh sourced?)" if "lib" in str(error) else ""
        return Probe("npu", False, f"torch_npu cannot be imported: {error}{hint}")
    missing = "torch_npu is installed but sees no NPU (driver? devices?)"
    return _try_device("npu", getattr(torch, "npu", None), missing)


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
