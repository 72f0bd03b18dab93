"""The reference backend: the arithmetic of ``numerics/`` in plain PyTorch, on any torch device."""

from __future__ import annotations

import torch

from npu_qat.numerics import QuantizedTensor, dequantize, fake_quant, quantize


class EmulationBackend:
    """Exact and portable. Fused kernels for a device are backends of their own."""

    name = "emulation"

    def fake_quant(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return fake_quant(x, profile, axis, tensor_scale=tensor_scale)

    def quantize(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
    ) -> QuantizedTensor:
        return quantize(x, profile, axis, tensor_scale=tensor_scale)

    def dequantize(self, q: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
        return dequantize(q, dtype)
