"""The backend protocol on the operators of the AscendC kernels."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch

from npu_qat.backends.ascendc.rules import kernel_profiles, kernel_rule
from npu_qat.backends.base import PackedWeight
from npu_qat.backends.emulation import EmulationBackend
from npu_qat.numerics import QuantizedTensor, get_profile

_VALUES = (torch.bfloat16, torch.float16, torch.float32)
LONGEST_NORM = 8192  # values of a row, kLongestRow of the kernel


class AscendcBackend(EmulationBackend):
    """Fake-quantisation, encoding and decoding by the kernels; the matmul in 16 bits.

    Args:
        ops: has ``mxfp4_fake_quant``, ``mxfp4_pack``, ``mxfp4_dequant`` and
            ``rms_norm_mxfp4_fake_quant``; ``torch.ops.npu_qat``.
        library: where they come from, for the record.
    """

    name = "ascendc"

    def __init__(self, ops: Any, library: str) -> None:
        self._ops = ops
        self._library = library

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "library": self._library}

    def check_profile(self, profile: str) -> None:
        kernel_rule(profile)

    def fake_quant(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
        apply_tensor_scale: bool = True,
    ) -> torch.Tensor:
        """By the kernel along the last dimension; elsewhere as the reference.

        Raises BackendUnavailable for a profile that the kernels do not compute.
        """
        rule = kernel_rule(profile)
        if not _last(axis, x.dim()):
            return super().fake_quant(x, profile, axis)
        result: torch.Tensor = self._ops.mxfp4_fake_quant(x, list(astuple(rule)))
        return result

    def quantize(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
    ) -> QuantizedTensor:
        by_kernel = profile in kernel_profiles() and _last(axis, x.dim()) and x.dtype in _VALUES
        if not by_kernel:
            return super().quantize(x, profile, axis, tensor_scale=tensor_scale)
        codes, scales = self._ops.mxfp4_pack(x, list(astuple(kernel_rule(profile))))
        return QuantizedTensor.from_packed(
            codes, scales, shape=x.shape, profile=get_profile(profile), axis=-1
        )

    def dequantize(self, q: QuantizedTensor | PackedWeight, dtype: torch.dtype) -> torch.Tensor:
        packed = isinstance(q, PackedWeight) and q.profile in kernel_profiles() and q.axis == 1
        if not packed or dtype not in (torch.bfloat16, torch.float16):
            return super().dequantize(q, dtype)
        assert isinstance(q, PackedWeight)
        values: torch.Tensor = self._ops.mxfp4_dequant(q.packed, q.scales, q.shape[1], dtype)
        return values

    # --- RMSNorm with its quantisation (layers/fusion.py) ---------------------------------------

    def fuses(self, x: torch.Tensor, profile: str | None, *, row: bool) -> bool:
        """Whether ``rms_norm`` (``row``) takes ``x``; there is no kernel for SiLU * up."""
        return (
            row
            and profile in kernel_profiles()
            and x.dtype in (torch.bfloat16, torch.float16)
            and 0 < x.shape[-1] <= LONGEST_NORM
        )

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        profile: str | None = None,
        tensor_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(y, Q(y)) of y = RMSNorm(x) * weight, both in the shape [.., n] and dtype of ``x``."""
        assert profile is not None and tensor_scale is None  # what ``fuses`` allows
        rule = list(astuple(kernel_rule(profile)))
        y, q = self._ops.rms_norm_mxfp4_fake_quant(x, weight, eps, rule)
        return y, q

    def rms_norm_backward(
        self,
        grad_y: torch.Tensor | None,
        grad_q: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        slope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """dx from dy + dq, in plain PyTorch and fp32.

        With r = 1 / sqrt(mean(x^2) + eps), n = x r and h = (dy + dq) weight:
        dx = r (h - n mean(h n)).
        """
        assert slope is None  # only profiles with a tensor scale have one
        h = sum(g.float() for g in (grad_y, grad_q) if g is not None) * weight.float()
        wide = x.float()
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        n = wide * r
        dx: torch.Tensor = r * (h - n * (h * n).mean(-1, keepdim=True))
        return dx.to(x.dtype)


def _last(axis: int, dimensions: int) -> bool:
    return axis in (-1, dimensions - 1)
