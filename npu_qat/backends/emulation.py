"""The reference backend: the arithmetic of ``numerics/`` in plain PyTorch, on any torch device."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from npu_qat.backends.base import PackedWeight
from npu_qat.numerics import QuantizedTensor, dequantize, fake_quant, get_profile, quantize


class EmulationBackend:
    """Exact and portable. Fused kernels for a device are backends of their own."""

    name = "emulation"

    def describe(self) -> dict[str, str]:
        return {"name": self.name}

    def check_profile(self, profile: str) -> None:
        get_profile(profile)  # it computes all there are

    def fake_quant(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
        apply_tensor_scale: bool = True,
    ) -> torch.Tensor:
        if apply_tensor_scale or not get_profile(profile).tensor_scale:
            return fake_quant(x, profile, axis, tensor_scale=tensor_scale)
        q = quantize(x, profile, axis, tensor_scale=tensor_scale)
        return dequantize(q, x.dtype, apply_tensor_scale=False)

    def quantize(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
    ) -> QuantizedTensor:
        return quantize(x, profile, axis, tensor_scale=tensor_scale)

    def dequantize(self, q: QuantizedTensor | PackedWeight, dtype: torch.dtype) -> torch.Tensor:
        return dequantize(q.unpack() if isinstance(q, PackedWeight) else q, dtype)

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        y = F.linear(x, self.dequantize(weight, x.dtype), bias)
        return y if out_dtype is None else y.to(out_dtype)


def load(device: torch.device) -> EmulationBackend:
    """The backend for ``device``; works on all of them."""
    return EmulationBackend()
