"""Ascend NPUs: torch_npu's MX operators on the 950, and what the other chips can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npu_qat.backends.base import BackendUnavailable
from npu_qat.backends.npu.backend import NpuBackend
from npu_qat.backends.npu.ops import NpuOps
from npu_qat.backends.npu.soc import Soc, current_soc, identify

if TYPE_CHECKING:
    import torch

__all__ = ["NpuBackend", "NpuOps", "Soc", "current_soc", "identify", "load"]


def load(device: torch.device) -> NpuBackend:
    """The backend on ``device``; BackendUnavailable for a chip or torch_npu without MX
    operators."""
    import torch

    npu: Any = getattr(torch, "npu", None)  # exists once torch_npu is imported
    if npu is None:
        raise BackendUnavailable("torch_npu is not imported")
    soc = current_soc(npu)
    if not soc.fused:
        raise BackendUnavailable(f"{soc} has {soc.capability}")
    return NpuBackend(NpuOps.loaded(), str(soc), device)
