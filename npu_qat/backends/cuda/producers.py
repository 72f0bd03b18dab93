"""What produces a linear's input, fused with quantising it: RMSNorm, and SiLU(gate) * up.

Both kernels read their inputs once and write two tensors: ``y`` in 16 bits (LoRA reads it) and
``Q(y)`` (the quantised linears read it). Roundings are those of the modules they stand for, which
compute ``y`` in two steps with a 16-bit tensor between them; ``Q(y)`` is quantised from ``y``'s
16-bit bits, so it equals ``numerics`` on ``y`` exactly. What may differ from the modules is the
order of the sum of squares and the last bit of ``rsqrt`` and ``exp``. That moves one element of
thousands of the tensor between the steps by one ulp, and ``y`` there by one or two.

The sum over a row is one tree over one tile, in the same order on every run.

    y  = w * 16bit(x r),   r = 1 / sqrt(mean(x^2) + eps)
    dx = r (g w - x r mean(g w x r)),   g = dy + slope * dq

    y  = 16bit(gate s) * up,   s = sigmoid(gate)
    d_up = g 16bit(gate s),   d_gate = g up s (1 + gate (1 - s))

where dq is the gradient of Q(y), which the straight-through estimator hands to y; ``slope`` is 1
over the tensor scale for profiles that have one, else 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_qat.backends.cuda.elementwise import constants_of
from npu_qat.backends.cuda.launch import CachedLaunch
from npu_qat.backends.cuda.tiles import narrow, numerics_of, put_signs, to_grid, widen
from npu_qat.numerics.profiles import get_profile

# Longest row of a norm that fits one tile; longer ones are left to PyTorch.
MAX_ROW = 16384
_SILU_TILE = 2048
_launches: dict[tuple[Any, ...], CachedLaunch] = {}


@triton.jit
def _store_quantized(
    q_ptr: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    y: tl.tensor,
    tensor_scale_ptr: tl.tensor,
    BLOCKS: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    BUMP: tl.constexpr,
    LAST: tl.constexpr,
    ROUNDING: tl.constexpr,
    FLUSH: tl.constexpr,
    INF_SATURATES: tl.constexpr,
    DIVIDES: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
) -> None:
    """Q(y) of a tile of whole blocks, without a tensor scale, to where ``y`` went in ``q_ptr``."""
    tensor_scale = 1.0
    if TWO_LEVEL:
        tensor_scale = tl.load(tensor_scale_ptr)
    elements, signs, scale, _ = to_grid(
        tl.reshape(y, [BLOCKS, BLOCK]),
        0,
        tensor_scale,
        1,
        dtype,
        RULE,
        BUMP,
        LAST,
        ROUNDING,
        FLUSH,
        INF_SATURATES,
        DIVIDES,
        TWO_LEVEL,
    )
    q = tl.reshape(put_signs(elements * scale, signs), y.shape)
    tl.store(q_ptr + at, narrow(q, dtype), mask=mask)


@triton.jit(do_not_specialize=["rows", "eps"], do_not_specialize_on_alignment=["tensor_scale_ptr"])
def rms_norm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    q_ptr: tl.tensor,
    tensor_scale_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    BUMP: tl.constexpr,
    LAST: tl.constexpr,
    ROUNDING: tl.constexpr,
    FLUSH: tl.constexpr,
    INF_SATURATES: tl.constexpr,
    DIVIDES: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
) -> None:
    """y and Q(y) of ROWS rows [K]; WIDTH is K rounded up to a power of two."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, WIDTH)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    at = first * K + row * K + column
    mask = (row < rows - first) & (column < K)
    x = widen(tl.load(x_ptr + at, mask=mask, other=0.0))
    weight = widen(tl.load(weight_ptr + column, mask=column < K, other=0.0))
    mean = tl.sum(x * x, 1)[:, None] / K
    h = widen(narrow(x * tl.rsqrt(mean + eps), dtype))
    y = narrow(weight * h, dtype)
    tl.store(y_ptr + at, y, mask=mask)
    if QUANTIZE:
        _store_quantized(
            q_ptr,
            at,
            mask,
            widen(y),
            tensor_scale_ptr,
            ROWS * WIDTH // BLOCK,
            dtype,
            BLOCK,
            RULE,
            BUMP,
            LAST,
            ROUNDING,
            FLUSH,
            INF_SATURATES,
            DIVIDES,
            TWO_LEVEL,
        )


@triton.jit
def _gradient(
    grad_y_ptr: tl.tensor,
    grad_q_ptr: tl.tensor,
    slope_ptr: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    like: tl.tensor,
) -> tl.tensor:
    """dy + slope * dq in fp32; a pointer that is None stands for zeros, or for the slope 1."""
    g = tl.zeros_like(like)
    if grad_q_ptr is not None:
        g = widen(tl.load(grad_q_ptr + at, mask=mask, other=0.0))
        if slope_ptr is not None:
            g = g * tl.load(slope_ptr)
    if grad_y_ptr is not None:
        g = g + widen(tl.load(grad_y_ptr + at, mask=mask, other=0.0))
    return g


@triton.jit(do_not_specialize=["rows", "eps"], do_not_specialize_on_alignment=["slope_ptr"])
def rms_norm_backward_kernel(
    grad_y_ptr: tl.tensor,
    grad_q_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    slope_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """dx of ROWS rows; 1 / rms is computed anew, so that nothing but x need be kept."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, WIDTH)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    at = first * K + row * K + column
    mask = (row < rows - first) & (column < K)
    x = widen(tl.load(x_ptr + at, mask=mask, other=0.0))
    weight = widen(tl.load(weight_ptr + column, mask=column < K, other=0.0))
    g = _gradient(grad_y_ptr, grad_q_ptr, slope_ptr, at, mask, x) * weight
    r = tl.rsqrt(tl.sum(x * x, 1)[:, None] / K + eps)
    h = x * r
    dx = r * (g - h * (tl.sum(g * h, 1)[:, None] / K))
    tl.store(dx_ptr + at, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    return tl.math.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))


@triton.jit
def _silu(x: tl.tensor) -> tl.tensor:
    return tl.math.div_rn(x, 1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["elements"], do_not_specialize_on_alignment=["tensor_scale_ptr"])
def silu_mul_kernel(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    y_ptr: tl.tensor,
    q_ptr: tl.tensor,
    tensor_scale_ptr: tl.tensor,
    elements: tl.tensor,
    TILE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    BUMP: tl.constexpr,
    LAST: tl.constexpr,
    ROUNDING: tl.constexpr,
    FLUSH: tl.constexpr,
    INF_SATURATES: tl.constexpr,
    DIVIDES: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
) -> None:
    """y and Q(y) of one stretch of memory."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * TILE
    at = first + tl.arange(0, TILE // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # Whole blocks are inside or outside, which keeps the loads wide.
    mask = tl.arange(0, TILE // BLOCK)[:, None] * BLOCK < elements - first
    gate = widen(tl.load(gate_ptr + at, mask=mask, other=0.0))
    up = widen(tl.load(up_ptr + at, mask=mask, other=0.0))
    y = narrow(widen(narrow(_silu(gate), dtype)) * up, dtype)
    tl.store(y_ptr + at, y, mask=mask)
    if QUANTIZE:
        _store_quantized(
            q_ptr,
            at,
            mask,
            widen(y),
            tensor_scale_ptr,
            TILE // BLOCK,
            dtype,
            BLOCK,
            RULE,
            BUMP,
            LAST,
            ROUNDING,
            FLUSH,
            INF_SATURATES,
            DIVIDES,
            TWO_LEVEL,
        )


@triton.jit(do_not_specialize=["elements"], do_not_specialize_on_alignment=["slope_ptr"])
def silu_mul_backward_kernel(
    grad_y_ptr: tl.tensor,
    grad_q_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    d_gate_ptr: tl.tensor,
    d_up_ptr: tl.tensor,
    slope_ptr: tl.tensor,
    elements: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Gradients of gate and up from those of y and Q(y)."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * TILE
    at = first + tl.arange(0, TILE // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = tl.arange(0, TILE // 16)[:, None] * 16 < elements - first
    gate = widen(tl.load(gate_ptr + at, mask=mask, other=0.0))
    up = widen(tl.load(up_ptr + at, mask=mask, other=0.0))
    g = _gradient(grad_y_ptr, grad_q_ptr, slope_ptr, at, mask, gate)
    s = _sigmoid(gate)
    silu = widen(narrow(_silu(gate), dtype))
    tl.store(d_up_ptr + at, narrow(g * silu, dtype), mask=mask)
    d_gate = g * up * s * (1.0 + gate * (1.0 - s))
    tl.store(d_gate_ptr + at, narrow(d_gate, dtype), mask=mask)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, profile: str, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, Q(y)) of ``x`` [.., K], K a multiple of the profile's block; weight [K], any dtype.

    Without a profile (empty name) the second result is empty. Under a tensor scale Q(y) comes
    without it.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    q = torch.empty_like(x) if profile else x.new_empty(0)
    args = (x, weight, y, q if profile else None, _scale(profile, tensor_scale))
    _launch(rms_norm_kernel, x, (*args, x.numel() // x.shape[-1], eps), profile, (weight.dtype,))
    return y, q


def rms_norm_backward(
    grad_y: Tensor | None,
    grad_q: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    slope: Tensor | None,
) -> Tensor:
    """dx of ``rms_norm``; at least one gradient is given, each in the shape and dtype of ``x``."""
    x, dx = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    grads = _contiguous(grad_y, grad_q)
    args = (*grads, x, weight, dx, slope, x.numel() // x.shape[-1], eps)
    present = (grad_y is None, grad_q is None, slope is None, weight.dtype)
    _launch(rms_norm_backward_kernel, x, args, None, present)
    return dx


def silu_mul(
    gate: Tensor, up: Tensor, profile: str, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, Q(y)) of gate and up [.., N], N a multiple of the profile's block (16 without one)."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    q = torch.empty_like(gate) if profile else gate.new_empty(0)
    args = (gate, up, y, q if profile else None, _scale(profile, tensor_scale), gate.numel())
    _launch(silu_mul_kernel, gate, args, profile, ())
    return y, q


def silu_mul_backward(
    grad_y: Tensor | None, grad_q: Tensor | None, gate: Tensor, up: Tensor, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(d_gate, d_up) of ``silu_mul``; at least one gradient is given."""
    gate, up = gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    grads = _contiguous(grad_y, grad_q)
    args = (*grads, gate, up, d_gate, d_up, slope, gate.numel())
    present = (grad_y is None, grad_q is None, slope is None)
    _launch(silu_mul_backward_kernel, gate, args, None, present)
    return d_gate, d_up


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _scale(profile: str, tensor_scale: Tensor | None) -> Tensor | None:
    return tensor_scale if profile and get_profile(profile).tensor_scale else None


def _launch(
    kernel: Any, x: Tensor, args: tuple[Any, ...], profile: str | None, variant: tuple[Any, ...]
) -> None:
    """Start ``kernel`` on rows (norms) or on one stretch (SiLU) of contiguous ``x``.

    ``profile`` None: the kernel quantises nothing and takes no constants of a profile.
    """
    if x.numel() == 0:
        return
    norm = kernel in (rms_norm_kernel, rms_norm_backward_kernel)
    k = x.shape[-1]
    wide = all(a.data_ptr() % 16 == 0 for a in args if isinstance(a, Tensor) and a.dim() > 0)
    key = (kernel.__name__, profile, x.dtype, x.device.index or 0, k if norm else 0, wide, *variant)
    launch = _launches.get(key)
    if launch is None:
        launch = _launches[key] = _compile(kernel, k if norm else None, profile, cached=wide)
    count = x.numel() // k if norm else x.numel()
    share = launch.constants["ROWS" if norm else "TILE"]
    launch((-(-count // share), 1, 1), args, x.device.index or 0)


def _compile(kernel: Any, k: int | None, profile: str | None, *, cached: bool) -> CachedLaunch:
    constants: dict[str, Any]
    if k is None:
        constants, warps = {"TILE": _SILU_TILE}, 4
    else:
        width = max(32, triton.next_power_of_2(k))
        rows = max(1, 1024 // width)
        constants = {"K": k, "WIDTH": width, "ROWS": rows}
        warps = min(16, max(4, width // 512))
    if profile is not None:
        constants["QUANTIZE"] = bool(profile)
        constants |= constants_of(numerics_of(get_profile(profile or "ocp")))
    return CachedLaunch(kernel, constants, cached=cached, num_warps=warps)
