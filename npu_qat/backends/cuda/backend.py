"""``Backend`` by Triton kernels, for tensors on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from npu_qat import numerics
from npu_qat.backends.base import BackendUnavailable, EncodedInput, FusedBackend, PackedWeight
from npu_qat.backends.cuda import elementwise, fp8, matmul, ops, producers
from npu_qat.backends.cuda.launch import interpreted
from npu_qat.numerics import QuantizedTensor, get_profile
from npu_qat.numerics.codec import INPUT_DTYPES
from npu_qat.numerics.profiles import Profile
from npu_qat.numerics.scales import largest_finite, nvfp4_tensor_scale


class CudaBackend:
    """The numbers of ``numerics``, bit for bit, at the speed of the device's memory.

    What the kernels do not take goes to ``numerics``: tensors on another device, and arguments that
    it refuses. (The result is the same; the message is its own.)
    """

    name = "cuda"

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "kernels": f"triton {triton.__version__}"}

    def check_profile(self, profile: str) -> None:
        get_profile(profile)  # it computes all there are

    def fake_quant(
        self,
        x: Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: Tensor | None = None,
        apply_tensor_scale: bool = True,
        rotation: float = 0.0,
    ) -> Tensor:
        """As ``Backend.fake_quant``; a ``rotation`` turns blocks of 32 along the last axis by
        ``layers.rotation.rotate_blocks(x, rotation)`` first, in the same pass."""
        p = get_profile(profile)
        at = _kernel_axis(x, p, axis, tensor_scale)
        if at is None or (rotation and (at != x.dim() - 1 or x.shape[-1] % 32 or p.level0_block)):
            if rotation:
                raise ValueError("rotation needs blocks of 32 along the last axis, on this device")
            return _reference_fake_quant(x, p, axis, tensor_scale, apply_tensor_scale)
        call: Callable[..., Tensor] = elementwise.fake_quant
        scale = _scale(x, p, tensor_scale)
        if ops.traced(x):
            return ops.fake_quant(x, profile, at, scale, apply_tensor_scale, rotation)
        return call(x, p, at, scale, apply_tensor_scale, rotation)

    def quantize(
        self,
        x: Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: Tensor | None = None,
    ) -> QuantizedTensor:
        p = get_profile(profile)
        at = _kernel_axis(x, p, axis, tensor_scale)
        if at is None:
            return numerics.quantize(x, p, axis, tensor_scale=tensor_scale)
        scale = _scale(x, p, tensor_scale)
        codes, scales, level0 = self._encode(x, p, at, scale, pack=False)
        return QuantizedTensor(codes, scales, p, at, scale, level0)

    def quantize_packed(
        self,
        weight: Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: Tensor | None = None,
    ) -> PackedWeight:
        """``PackedWeight.of(quantize(weight))`` [N, K] in one pass."""
        p = get_profile(profile)
        at = _kernel_axis(weight, p, axis, tensor_scale)
        if at is None:
            return PackedWeight.of(numerics.quantize(weight, p, axis, tensor_scale=tensor_scale))
        scale = _scale(weight, p, tensor_scale)
        codes, scales, level0 = self._encode(weight, p, at, scale, pack=True)
        rows, columns = weight.shape
        return PackedWeight(codes, scales, (rows, columns), profile, at, scale, level0)

    def _encode(
        self, x: Tensor, p: Profile, axis: int, scale: Tensor | None, *, pack: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not ops.traced(x):
            return elementwise.quantize(x.detach(), p, axis, scale, pack=pack)
        codes, scales, level0 = ops.quantize(x, p.name, axis, scale, pack)
        return codes, scales, level0 if p.level0_block else None

    def dequantize(
        self,
        q: QuantizedTensor | PackedWeight,
        dtype: torch.dtype,
        *,
        apply_tensor_scale: bool = True,
    ) -> Tensor:
        packed = isinstance(q, PackedWeight)
        codes = q.packed if isinstance(q, PackedWeight) else q.codes
        if not _on_device(codes) or dtype not in INPUT_DTYPES:
            whole = q.unpack() if isinstance(q, PackedWeight) else q
            return numerics.dequantize(whole, dtype, apply_tensor_scale=apply_tensor_scale)
        p = get_profile(q.profile) if isinstance(q.profile, str) else q.profile
        scale = q.tensor_scale if apply_tensor_scale else None
        shape = list(q.shape)
        if ops.traced(codes):
            return ops.dequantize(
                codes, q.scales, shape, p.name, q.axis, dtype, scale, q.level0_scales, packed
            )
        return elementwise.dequantize(
            codes,
            q.scales,
            tuple(shape),
            p,
            q.axis,
            dtype,
            scale,
            q.level0_scales,
            packed=packed,
        )

    def linear(
        self,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As ``Backend.linear``; up to ``matmul.MAX_ROWS`` rows read the packed bytes."""
        p = get_profile(weight.profile)
        y: Tensor
        if (
            _on_device(x)
            and matmul.takes(x, p, weight.axis, weight.shape)
            and weight.tensor_scale is None
        ):
            if ops.traced(x):
                y = ops.packed_linear(x, weight.packed, weight.scales, weight.profile, bias)
            else:
                y = matmul.packed_linear(x.detach(), weight.packed, weight.scales, p, bias)
        else:
            y = F.linear(x, self.dequantize(weight, x.dtype), bias)
        return y if out_dtype is None else y.to(out_dtype)

    # --- rotation before quantising (layers/rotation.py) ---------------------------------------

    def rotates(self, x: Tensor, profile: str) -> bool:
        """Whether ``quantize_rotated`` and ``rotate`` take ``x``; profiles without tensor scale."""
        p = get_profile(profile)
        return (
            _on_device(x)
            and x.dtype in INPUT_DTYPES
            and x.shape[-1] % 32 == 0
            and not (p.level0_block or p.tensor_scale or p.nan == "error")
            and not ops.traced(x)
        )

    def quantize_rotated(self, x: Tensor, profile: str, factor: float) -> Tensor:
        """``fake_quant`` of blocks of 32 along the last axis that are rotated in the same pass."""
        return self.fake_quant(x, profile, rotation=factor)

    def rotate(self, x: Tensor, factor: float) -> Tensor:
        """``layers.rotation.rotate_blocks``, in one pass."""
        return elementwise.rotate(x, factor)

    def fused(self) -> FusedBackend:
        """As ``FusedOnRequest.fused``: products on FP8 tensor cores."""
        return Fp8Backend()

    # --- producers of a linear's input (layers/fusion.py) --------------------------------------

    def fuses(self, x: Tensor, profile: str | None, *, row: bool) -> bool:
        """Whether ``rms_norm`` (``row``) or ``silu_mul`` take ``x`` with this profile."""
        block = get_profile(profile).block_size if profile else 16
        return (
            _on_device(x)
            and x.dtype in INPUT_DTYPES
            and x.shape[-1] % block == 0
            and x.shape[-1] <= (producers.MAX_ROW if row else x.shape[-1])
            and not (profile and get_profile(profile).level0_block)
        )

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        profile: str | None = None,
        tensor_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(y, Q(y) without a tensor scale, or None without a profile); no gradient."""
        call: Any = ops.rms_norm if ops.traced(x) else producers.rms_norm
        y, q = call(x, weight, eps, profile or "", tensor_scale)
        return y, q if profile else None

    def rms_norm_backward(
        self,
        grad_y: Tensor | None,
        grad_q: Tensor | None,
        x: Tensor,
        weight: Tensor,
        eps: float,
        slope: Tensor | None = None,
    ) -> Tensor:
        """dx from the gradients of both results of ``rms_norm``; ``slope``: dQ/dy, default 1."""
        call: Any = ops.rms_norm_backward if ops.traced(x) else producers.rms_norm_backward
        dx: Tensor = call(grad_y, grad_q, x, weight, eps, slope)
        return dx

    def silu_mul(
        self,
        gate: Tensor,
        up: Tensor,
        profile: str | None = None,
        tensor_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(y, Q(y)) of y = SiLU(gate) * up, as ``rms_norm``."""
        call: Any = ops.silu_mul if ops.traced(gate) else producers.silu_mul
        y, q = call(gate, up, profile or "", tensor_scale)
        return y, q if profile else None

    def silu_mul_backward(
        self,
        grad_y: Tensor | None,
        grad_q: Tensor | None,
        gate: Tensor,
        up: Tensor,
        slope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(d_gate, d_up), as ``rms_norm_backward``."""
        call: Any = ops.silu_mul_backward if ops.traced(gate) else producers.silu_mul_backward
        d_gate, d_up = call(grad_y, grad_q, gate, up, slope)
        return d_gate, d_up


class Fp8Backend(CudaBackend):
    """The same with a matmul of codes, which ``fp8`` describes: a ``FusedBackend``."""

    def check_fused(
        self, weight_profile: str, activation_profile: str, in_features: int, out_features: int
    ) -> None:
        """As ``FusedBackend.check_fused``: MXFP4 on GPUs with FP8 tensor cores."""
        if not interpreted() and torch.cuda.get_device_capability() < fp8.CAPABILITY:
            raise BackendUnavailable(
                "this GPU has no FP8 tensor cores (compute capability 8.9 or newer)"
            )
        for name in (weight_profile, activation_profile):
            if not fp8.holds(get_profile(name)):
                raise BackendUnavailable(
                    f"numbers of profile {name!r} do not fit into FP8: one mantissa bit and powers "
                    "of two as scales (MXFP4 of one level) do"
                )
        if not fp8.encodes(get_profile(activation_profile)):
            raise BackendUnavailable(
                f"profile {activation_profile!r} is one for weights; inputs need another"
            )
        if in_features % 32 or out_features % 16:
            raise BackendUnavailable(
                "the FP8 matmul takes a multiple of 32 inputs and a multiple of 16 outputs, not "
                f"{in_features} and {out_features}"
            )

    def encode_input(self, x: Tensor, profile: str) -> EncodedInput:
        """E5M2 bytes and row scales; for few rows the numbers themselves, in 16 bits."""
        if x.dtype != torch.bfloat16:
            raise BackendUnavailable(
                f"the FP8 matmul returns bf16, not {x.dtype}: set model.dtype: bf16, or "
                "quant.matmul: auto"
            )
        if matmul.few_rows(x):
            values, scales = self.fake_quant(x.detach(), profile), x.new_empty(0)
            return EncodedInput(values, scales, x.shape, x.dtype, profile)
        codes, scales = fp8.encode_rows(x.detach(), get_profile(profile))
        return EncodedInput(codes, scales, x.shape, x.dtype, profile)

    def decode_input(self, encoded: EncodedInput) -> Tensor:
        if encoded.codes.dtype == encoded.dtype:
            return encoded.codes
        values = (encoded.codes.float() * encoded.scales).to(encoded.dtype)
        return values.view(encoded.shape)

    def prepare_weight(self, weight: PackedWeight, *, resident: bool = False) -> object:
        """The scales of its rows, and its E4M3 bytes if they are to stay; else they are decoded for
        each product. ValueError: a row spans too much."""
        return fp8.prepare_weight(weight, self.dequantize(weight, torch.float32), resident)

    def fused_linear(
        self,
        x: EncodedInput,
        weight: object,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``x W^T + b``: exact products, added up by FP8 tensor cores; few rows in fp32."""
        assert isinstance(weight, fp8.Fp8Weight)
        if x.codes.dtype == x.dtype:
            return self.linear(x.codes, weight.packed, bias, out_dtype=out_dtype)
        y = fp8.linear(x.codes, x.scales, weight, bias, out_dtype or x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


def _on_device(x: Tensor) -> bool:
    return x.device.type == "cuda" or interpreted()


def _kernel_axis(x: Tensor, profile: Profile, axis: int, tensor_scale: Tensor | None) -> int | None:
    """The blocked axis from 0, or None where ``numerics`` shall compute it, or refuse it."""
    rank = x.dim()
    if not _on_device(x) or x.dtype not in INPUT_DTYPES or not -rank <= axis < rank:
        return None
    axis %= rank
    if profile.forced_axis is not None and axis != profile.forced_axis % rank:
        return None
    if tensor_scale is not None and (not profile.tensor_scale or tensor_scale.numel() != 1):
        return None
    if profile.nan == "error" and not bool(torch.isfinite(x).all()):
        return None
    return axis


def _scale(x: Tensor, profile: Profile, given: Tensor | None) -> Tensor | None:
    """The fp32 tensor scale on ``x``'s device: the given one, or from ``x``; None without any."""
    if not profile.tensor_scale:
        return None
    if given is None:
        return nvfp4_tensor_scale(largest_finite(x))
    if given.dtype == torch.float32 and given.device == x.device and given.dim() == 0:
        return given
    return given.detach().to(device=x.device, dtype=torch.float32).reshape(())


def _reference_fake_quant(
    x: Tensor, profile: Profile, axis: int, tensor_scale: Tensor | None, apply: bool
) -> Tensor:
    if apply or not profile.tensor_scale:
        return numerics.fake_quant(x, profile, axis, tensor_scale=tensor_scale)
    q = numerics.quantize(x, profile, axis, tensor_scale=tensor_scale)
    return numerics.dequantize(q, x.dtype, apply_tensor_scale=False)
