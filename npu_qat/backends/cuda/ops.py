"""The kernels as PyTorch operators ``torch.ops.npu_qat.*``.

As operators they have a shape function, so that ``torch.compile``, ``torch.export`` and fake
tensors know what they return without running them; in a captured graph they are opaque calls.
Calling an operator costs more host time than a small kernel takes on the device, so code that
nobody traces calls the launching function straight away (``traced``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from npu_qat.backends.cuda import elementwise, matmul, producers
from npu_qat.numerics.profiles import get_profile

_PLAIN = (Tensor, torch.nn.Parameter)


def traced(x: Tensor) -> bool:
    """Whether someone records what happens to ``x``, so that it must go through an operator."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or _len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@torch.library.custom_op("npu_qat::fake_quant", mutates_args=())
def fake_quant(
    x: Tensor,
    profile: str,
    axis: int,
    tensor_scale: Tensor | None,
    apply_tensor_scale: bool,
    rotation: float,
) -> Tensor:
    """``elementwise.fake_quant`` by the profile's name."""
    return elementwise.fake_quant(
        x, get_profile(profile), axis, tensor_scale, apply_tensor_scale, rotation
    )


@fake_quant.register_fake
def _(
    x: Tensor,
    profile: str,
    axis: int,
    tensor_scale: Tensor | None,
    apply_tensor_scale: bool,
    rotation: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("npu_qat::quantize", mutates_args=())
def quantize(
    x: Tensor, profile: str, axis: int, tensor_scale: Tensor | None, pack: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``elementwise.quantize``; level-0 scales are empty where the profile has none."""
    codes, scales, level0 = elementwise.quantize(
        x, get_profile(profile), axis, tensor_scale, pack=pack
    )
    return codes, scales, x.new_empty(0, dtype=torch.float32) if level0 is None else level0


@quantize.register_fake
def _(
    x: Tensor, profile: str, axis: int, tensor_scale: Tensor | None, pack: bool
) -> tuple[Tensor, Tensor, Tensor]:
    p, shape = get_profile(profile), list(x.shape)

    def along_axis(length: int) -> list[int]:
        return [*shape[:axis], length, *shape[axis + 1 :]]

    n = shape[axis]
    codes = x.new_empty(along_axis((n + 1) // 2 if pack else n), dtype=torch.uint8)
    scales = x.new_empty(along_axis(-(-n // p.block_size)), dtype=torch.uint8)
    groups = along_axis(-(-n // p.level0_block)) if p.level0_block else [0]
    return codes, scales, x.new_empty(groups, dtype=torch.float32)


@torch.library.custom_op("npu_qat::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scales: Tensor,
    shape: list[int],
    profile: str,
    axis: int,
    dtype: torch.dtype,
    tensor_scale: Tensor | None,
    level0_scales: Tensor | None,
    packed: bool,
) -> Tensor:
    """``elementwise.dequantize`` by the profile's name."""
    return elementwise.dequantize(
        codes,
        scales,
        tuple(shape),
        get_profile(profile),
        axis,
        dtype,
        tensor_scale,
        level0_scales,
        packed=packed,
    )


@dequantize.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    shape: list[int],
    profile: str,
    axis: int,
    dtype: torch.dtype,
    tensor_scale: Tensor | None,
    level0_scales: Tensor | None,
    packed: bool,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


@torch.library.custom_op("npu_qat::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, packed: Tensor, scales: Tensor, profile: str, bias: Tensor | None
) -> Tensor:
    """``matmul.packed_linear`` by the profile's name."""
    return matmul.packed_linear(x, packed, scales, get_profile(profile), bias)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, profile: str, bias: Tensor | None) -> Tensor:
    return x.new_empty([*x.shape[:-1], packed.shape[0]])


@torch.library.custom_op("npu_qat::rms_norm", mutates_args=())
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, profile: str, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``producers.rms_norm``; without a profile (empty name) the second result is empty."""
    return producers.rms_norm(x, weight, eps, profile, tensor_scale)


@rms_norm.register_fake
def _(
    x: Tensor, weight: Tensor, eps: float, profile: str, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y) if profile else x.new_empty(0)


@torch.library.custom_op("npu_qat::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad_y: Tensor | None,
    grad_q: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    slope: Tensor | None,
) -> Tensor:
    """``producers.rms_norm_backward``."""
    return producers.rms_norm_backward(grad_y, grad_q, x, weight, eps, slope)


@rms_norm_backward.register_fake
def _(
    grad_y: Tensor | None,
    grad_q: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    slope: Tensor | None,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("npu_qat::silu_mul", mutates_args=())
def silu_mul(
    gate: Tensor, up: Tensor, profile: str, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``producers.silu_mul``; without a profile (empty name) the second result is empty."""
    return producers.silu_mul(gate, up, profile, tensor_scale)


@silu_mul.register_fake
def _(gate: Tensor, up: Tensor, profile: str, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y) if profile else gate.new_empty(0)


@torch.library.custom_op("npu_qat::silu_mul_backward", mutates_args=())
def silu_mul_backward(
    grad_y: Tensor | None, grad_q: Tensor | None, gate: Tensor, up: Tensor, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``producers.silu_mul_backward``."""
    return producers.silu_mul_backward(grad_y, grad_q, gate, up, slope)


@silu_mul_backward.register_fake
def _(
    grad_y: Tensor | None, grad_q: Tensor | None, gate: Tensor, up: Tensor, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)
