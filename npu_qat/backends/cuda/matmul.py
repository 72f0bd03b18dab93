"""``y = x W^T + b`` for a small batch, straight from packed 4-bit weights.

Decoding a token multiplies a few rows with every weight of the model, so its time is that of
reading the weights: a quarter of the bytes is a quarter of the time, if unpacking keeps up. A
program takes a tile [BN, BK] of the weight, turns each byte into two numbers in registers and
multiplies them on tensor cores; the even and the odd columns go through two products, so that no
element has to change its place. Accumulation is in fp32.

**Unpacking.** An E2M1 pattern moved to bits 15 and 8..6 is a bf16 pattern of the same number times
2^-126; one multiplication brings it back and another one applies the block scale, both exact where
the dequantised weight is. Two elements share a register: about two instructions an element.

**Splitting K.** A small weight has too few row tiles to fill the device, so several programs share
one and each sums a part of K. Whoever finishes last adds the parts in their order, so the result is
the same on every run. The counters for that lie in a region for each stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_qat.backends.cuda.launch import CachedLaunch, interpreted
from npu_qat.backends.cuda.tiles import (
    BY_HAND,
    elements_of,
    narrow,
    numerics_of,
    scale_value,
    widen,
)
from npu_qat.numerics.profiles import Profile

MAX_ROWS = 64
_STREAMS, _COUNTERS = 64, 4096
_launches: dict[tuple[object, ...], CachedLaunch] = {}
_counters: dict[int, Tensor] = {}
_regions: dict[tuple[int, int], int] = {}

# Bytes b0..b3 to bf16 pairs: spread two bytes to halves of a register, move the nibbles' bits to
# their places by a multiplication (n * 0x1040 = n << 12 | n << 6), then the factors 2^126, scale.
_UNPACK = tl.constexpr("""
{
.reg .b32 t, u;
.reg .b32 big, zero;
mov.b32 big, 0x7E807E80;
mov.b32 zero, 0x80008000;
prmt.b32 t, $4, 0, 0x4140;
and.b32 u, t, 0x000F000F;
mul.lo.u32 u, u, 0x1040;
and.b32 u, u, 0x81C081C0;
fma.rn.bf16x2 u, u, big, zero;
fma.rn.bf16x2 $0, u, $5, zero;
and.b32 u, t, 0x00F000F0;
mul.lo.u32 u, u, 0x104;
and.b32 u, u, 0x81C081C0;
fma.rn.bf16x2 u, u, big, zero;
fma.rn.bf16x2 $2, u, $5, zero;
prmt.b32 t, $4, 0, 0x4342;
and.b32 u, t, 0x000F000F;
mul.lo.u32 u, u, 0x1040;
and.b32 u, u, 0x81C081C0;
fma.rn.bf16x2 u, u, big, zero;
fma.rn.bf16x2 $1, u, $6, zero;
and.b32 u, t, 0x00F000F0;
mul.lo.u32 u, u, 0x104;
and.b32 u, u, 0x81C081C0;
fma.rn.bf16x2 u, u, big, zero;
fma.rn.bf16x2 $3, u, $6, zero;
}
""")


@triton.jit
def _unpack(
    packed: tl.tensor,
    byte: tl.tensor,
    dtype: tl.constexpr,
    E8M0: tl.constexpr,
    E4M3_480: tl.constexpr,
    BLOCKS: tl.constexpr,
    HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(even, odd) columns [BN, BK / 2] in dtype, from bytes [BN, BK / 2] and [BN, BLOCKS]."""
    BN: tl.constexpr = packed.shape[0]
    scale = scale_value(byte.to(tl.int32), E8M0, E4M3_480)
    if dtype == tl.bfloat16 and not BY_HAND:
        short = narrow(scale, tl.bfloat16)[:, :, None]
        spread = tl.reshape(tl.broadcast_to(short, [BN, BLOCKS, HALF]), [BN, BLOCKS * HALF])
        return tl.inline_asm_elementwise(
            _UNPACK,
            "=r,=r,=r,=r,r,r,r",
            [packed, spread],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        spread = tl.reshape(
            tl.broadcast_to(scale[:, :, None], [BN, BLOCKS, HALF]), [BN, BLOCKS * HALF]
        )
        codes = packed.to(tl.int32)
        low = narrow(elements_of(codes & 15) * spread, dtype)
        return low, narrow(elements_of(codes >> 4) * spread, dtype)


@triton.jit(do_not_specialize=["rows"])
def packed_linear_kernel(
    x_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    rows: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    E8M0: tl.constexpr,
    E4M3_480: tl.constexpr,
) -> None:
    """out [rows, N] from x [rows, K] and weight bytes [N, K / 2], [N, K / BLOCK]."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BLOCKS: tl.constexpr = BK // BLOCK
    HALF: tl.constexpr = BLOCK // 2
    TILES: tl.constexpr = (K + BK - 1) // BK
    EACH: tl.constexpr = (TILES + SPLIT - 1) // SPLIT
    tile = tl.program_id(0)
    part = tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    acc = tl.zeros([BN, BM], tl.float32)
    for j in range(EACH):
        i = part * EACH + j  # what lies behind K is masked
        at = i * (BK // 2) + tl.arange(0, BK // 2)
        block = i * BLOCKS + tl.arange(0, BLOCKS)
        k = i * BK + tl.arange(0, BK)
        inside = (n < N)[:, None]
        packed = tl.load(
            packed_ptr + n[:, None] * (K // 2) + at[None, :],
            mask=inside & (at < K // 2)[None, :],
            other=0,
        )
        byte = tl.load(
            scales_ptr + n[:, None] * (K // BLOCK) + block[None, :],
            mask=inside & (block < K // BLOCK)[None, :],
            other=0,
        )
        x = tl.load(
            x_ptr + m[:, None] * K + k[None, :],
            mask=(m < rows)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        even, odd = tl.split(tl.reshape(x, [BM, BK // 2, 2]))
        low, high = _unpack(packed, byte, dtype, E8M0, E4M3_480, BLOCKS, HALF)
        if BY_HAND:  # the interpreter multiplies bf16 numbers as integers
            low, high, even, odd = widen(low), widen(high), widen(even), widen(odd)
        acc = tl.dot(low, tl.trans(even), acc)
        acc = tl.dot(high, tl.trans(odd), acc)
    inside = (n < N)[:, None] & (m < rows)[None, :]
    at = m[None, :] * N + n[:, None]
    if SPLIT > 1:
        tl.store(partial_ptr + part * rows * N + at, acc, mask=inside)
        tl.debug_barrier()
        done = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if done == SPLIT - 1:
            acc = tl.zeros([BN, BM], tl.float32)
            for other_part in range(SPLIT):
                acc += tl.load(
                    partial_ptr + other_part * rows * N + at,
                    mask=inside,
                    other=0.0,
                    cache_modifier=".cg",
                )
            if bias_ptr is not None:
                acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
            tl.store(out_ptr + at, narrow(acc, dtype), mask=inside)
            tl.store(counter_ptr + tile, 0)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at, narrow(acc, dtype), mask=inside)


def few_rows(x: Tensor) -> bool:
    """Whether ``x`` [.., K] has so few rows that reading the weight is what takes the time."""
    return 0 < x.numel() <= MAX_ROWS * x.shape[-1]


def takes(x: Tensor, profile: Profile, axis: int, shape: tuple[int, int]) -> bool:
    """Whether ``packed_linear`` computes this product (others are dequantised first)."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and few_rows(x)
        and axis == 1
        and shape[1] % profile.block_size == 0
        and not profile.level0_block
    )


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    profile: Profile,
    bias: Tensor | None = None,
    config: tuple[int, int, int, int, int] | None = None,
) -> Tensor:
    """``x W^T + b`` [.., N] in ``x``'s dtype.

    ``x``: [.., K], bf16 or fp16, at most ``MAX_ROWS`` rows. ``packed``: [N, K / 2], ``scales``:
    [N, K / block], both uint8. ``config``: (BN, BK, SPLIT, warps, stages), for benchmarks.
    """
    k, n = x.shape[-1], packed.shape[0]
    x2d = x.reshape(-1, k).contiguous()
    rows, device = x2d.shape[0], x.device.index or 0
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    tiling = config or choose(rows, n, k)
    region = _region(x.device) if tiling[2] > 1 else None
    if region is None or -(-n // tiling[0]) > _COUNTERS:
        tiling, region = (*tiling[:2], 1, *tiling[3:]), None
    bn, bk, split, warps, stages = tiling
    bm = max(16, triton.next_power_of_2(rows))
    given = (x2d, packed, scales) if bias is None else (x2d, packed, scales, bias)
    aligned = all(t.data_ptr() % 16 == 0 for t in given)
    key = (profile.name, x.dtype, device, n, k, bm, bias is None, aligned, tiling)
    launch = _launches.get(key)
    if launch is None:
        numerics = numerics_of(profile)
        constants = {"N": n, "K": k, "BM": bm, "BN": bn, "BK": bk, "SPLIT": split}
        constants |= {"BLOCK": numerics.block, "E8M0": numerics.e8m0}
        constants["E4M3_480"] = numerics.e4m3_480
        launch = CachedLaunch(
            packed_linear_kernel, constants, cached=aligned, num_warps=warps, num_stages=stages
        )
        _launches[key] = launch
    partial = None
    if split > 1:
        partial = torch.empty((split, rows, n), dtype=torch.float32, device=x.device)
    args = (x2d, packed, scales, bias, out, partial, region, rows)
    launch((-(-n // bn), split, 1), args, device)
    return out


def choose(rows: int, n: int, k: int) -> tuple[int, int, int, int, int]:
    """(BN, BK, SPLIT, warps, stages) for ``rows`` rows and a weight [n, k].

    Small programs and many: of 150 settings, the best or nearly so at the four weight shapes of
    Qwen2.5-1.5B with 8 rows on an H100.
    """
    large = n * k >= 1 << 22
    bn, bk = 32, 256 if large and rows <= 16 else 128
    programs, most = (512, 16) if large else (160, 8)
    split = 1
    while -(-n // bn) * split < programs and 2 * split * bk <= k and split < most:
        split *= 2
    return bn, bk, split, 2, 4 if rows <= 16 else 3


def prepare(device: torch.device) -> None:
    """Make the counters of ``device``, before any capture of a graph needs them."""
    index = device.index or 0
    if index not in _counters:
        _counters[index] = torch.zeros((_STREAMS, _COUNTERS), dtype=torch.int32, device=device)


def _region(device: torch.device) -> Tensor | None:
    """Counters of the current stream, all zero between launches; None if all regions are taken."""
    index = device.index or 0
    stream = 0 if interpreted() else torch._C._cuda_getCurrentRawStream(index)
    place = _regions.setdefault((index, stream), sum(d == index for d, _ in _regions))
    if place >= _STREAMS:
        return None
    prepare(device)
    return _counters[index][place]
