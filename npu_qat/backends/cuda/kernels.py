"""Kernels that turn 16-bit (or fp32) numbers into 4-bit ones and back, in one pass over memory.

A tensor blocked along an axis of length n is seen as [R, n, I] (R, I: product of the dimensions
before and after; I = 1 for the last axis). A program takes one tile of whole blocks in one of three
layouts:

* ``flat``: I = 1, contiguous, n a multiple of the block: the tile [T, B] is one stretch of memory.
  This is the layout of training, and the one whose launch is cached.
* ``rows``: I = 1, any strides, any n: the tile [T, B] holds T blocks, the last of a row masked.
* ``columns``: I > 1: the tile [B, T] holds a block of each of T neighbouring columns, so that
  reading it is coalesced.

Masked elements are zeros, which change no block's largest magnitude: the zero-padded last block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from npu_qat.backends.cuda.tiles import (
    bits_of,
    codes_of,
    e8m0_value,
    elements_of,
    narrow,
    put_signs,
    rotate,
    scale_byte,
    scale_value,
    to_grid,
    widen,
)

SIXTH = tl.constexpr(0.16666667163372040)  # fp32(1/6), of dual-level MX
MIN_NORMAL = tl.constexpr(2.0**-126)
INF = tl.constexpr(float("inf"))


@triton.jit
def _tile(
    n: tl.tensor,
    inner: tl.tensor,
    blocks: tl.tensor,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(row, block of the row, place in it, inner index, mask of elements, mask of blocks)."""
    place = tl.arange(0, BLOCK)
    blocks_a_row = tl.cdiv(n, BLOCK)
    if MODE == "flat":
        index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        block = index[:, None]
        row = tl.zeros_like(block)
        place = place[None, :]
        column = tl.zeros_like(block)
        block_mask = (index < blocks)[:, None]
        mask = block_mask & (place < BLOCK)
    elif MODE == "rows":
        # 32 bits, because dividing 64-bit numbers takes longer than all the rest.
        index = tl.program_id(0) * TILE + tl.arange(0, TILE)
        row = (index // blocks_a_row).to(tl.int64)[:, None]
        block = (index % blocks_a_row)[:, None]
        place = place[None, :]
        column = tl.zeros_like(row)
        block_mask = (index < blocks)[:, None]
        mask = block_mask & (block * BLOCK + place < n)
    else:
        index = tl.program_id(0)
        row = (index // blocks_a_row).to(tl.int64)
        block = (index % blocks_a_row).to(tl.int64)
        place = place[:, None]
        column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
        block_mask = column < inner
        mask = (block * BLOCK + place < n) & block_mask
    return row, block, place, column, mask, block_mask


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["tensor_scale_ptr"])
def fake_quant_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    given_ptr: tl.tensor,
    tensor_scale_ptr: tl.tensor,
    blocks: tl.tensor,
    n: tl.tensor,
    inner: tl.tensor,
    stride_row: tl.tensor,
    stride_n: tl.tensor,
    stride_inner: tl.tensor,
    MODE: tl.constexpr,
    TILE: tl.constexpr,
    APPLY_TENSOR_SCALE: tl.constexpr,
    ROTATE: tl.constexpr,
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
    """Round ``blocks`` blocks of x to what a profile can store; out is contiguous."""
    AXIS: tl.constexpr = 0 if MODE == "columns" else 1
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row, block, place, column, mask, block_mask = _tile(n, inner, blocks, MODE, BLOCK, TILE)
    k = block * BLOCK + place
    source = row * stride_row + k * stride_n + column * stride_inner
    target = (row * n + k) * inner + column
    scale_at = (row * tl.cdiv(n, BLOCK) + block) * inner + column
    x = tl.load(x_ptr + source, mask=mask, other=0.0)
    given = 0
    if RULE == "given":
        given = tl.load(given_ptr + scale_at, mask=block_mask, other=0).to(tl.int32)
    tensor_scale = 1.0
    if TWO_LEVEL:
        tensor_scale = tl.load(tensor_scale_ptr)
    x = widen(x)
    if ROTATE != 0.0:
        tl.static_assert(MODE != "columns")
        x = widen(narrow(rotate(x, TILE * BLOCK // 32) * ROTATE, dtype))
    elements, signs, scale, _ = to_grid(
        x,
        given,
        tensor_scale,
        AXIS,
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
    if TWO_LEVEL and APPLY_TENSOR_SCALE:
        scale = scale * tensor_scale
    y = narrow(put_signs(elements * scale, signs), dtype)
    tl.store(out_ptr + target, y, mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def rotate_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    blocks: tl.tensor,
    FACTOR: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """TILE blocks of 32 that lie one behind the other, rotated and multiplied by FACTOR."""
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    at = block * 32 + tl.arange(0, 32)[None, :]
    x = widen(tl.load(x_ptr + at, mask=block < blocks, other=0.0))
    y = narrow(rotate(x, TILE) * FACTOR, out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y, mask=block < blocks)


@triton.jit
def quantize_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    given_ptr: tl.tensor,
    tensor_scale_ptr: tl.tensor,
    blocks: tl.tensor,
    n: tl.tensor,
    inner: tl.tensor,
    stride_row: tl.tensor,
    stride_n: tl.tensor,
    stride_inner: tl.tensor,
    MODE: tl.constexpr,
    TILE: tl.constexpr,
    PACK: tl.constexpr,
    E4M3_480: tl.constexpr,
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
    """Codes (one or, with ``PACK``, two a byte along the axis) and scale bytes of x."""
    AXIS: tl.constexpr = 0 if MODE == "columns" else 1
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    E8M0: tl.constexpr = RULE != "e4m3" and RULE != "e4m3_clamped_carry"
    row, block, place, column, mask, block_mask = _tile(n, inner, blocks, MODE, BLOCK, TILE)
    source = row * stride_row + (block * BLOCK + place) * stride_n + column * stride_inner
    x = tl.load(x_ptr + source, mask=mask, other=0.0)
    scale_at = (row * tl.cdiv(n, BLOCK) + block) * inner + column
    given = 0
    if RULE == "given":
        given = tl.load(given_ptr + scale_at, mask=block_mask, other=0).to(tl.int32)
    tensor_scale = 1.0
    if TWO_LEVEL:
        tensor_scale = tl.load(tensor_scale_ptr)
    elements, signs, scale, byte = to_grid(
        widen(x),
        given,
        tensor_scale,
        AXIS,
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
    byte = scale_byte(scale, byte, E8M0, E4M3_480)
    tl.store(scales_ptr + scale_at, byte.to(tl.uint8), mask=block_mask)
    codes = codes_of(elements, signs, scale)
    if PACK:
        HALF: tl.constexpr = BLOCK // 2
        if MODE == "columns":
            pairs = tl.permute(tl.reshape(codes, [HALF, 2, TILE]), [0, 2, 1])
            at = block * HALF + tl.arange(0, HALF)[:, None]
        else:
            pairs = tl.reshape(codes, [TILE, HALF, 2])
            at = block * HALF + tl.arange(0, HALF)[None, :]
        low, high = tl.split(pairs)
        codes = low | (high << 4)
        length = (n + 1) // 2
        mask = block_mask if MODE == "flat" else block_mask & (at < length)
    else:
        at = block * BLOCK + place
        length = n
    target = (row * length + at) * inner + column
    tl.store(codes_ptr + target, codes.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["tensor_scale_ptr"])
def dequantize_kernel(
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    tensor_scale_ptr: tl.tensor,
    level0_ptr: tl.tensor,
    out_ptr: tl.tensor,
    blocks: tl.tensor,
    n: tl.tensor,
    inner: tl.tensor,
    MODE: tl.constexpr,
    TILE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    E8M0: tl.constexpr,
    E4M3_480: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    LEVEL0_BLOCKS: tl.constexpr,
) -> None:
    """element * scale (* tensor scale or level-0 scale) in fp32, cast to out's dtype."""
    row, block, place, column, mask, block_mask = _tile(n, inner, blocks, MODE, BLOCK, TILE)
    k = block * BLOCK + place
    HALF: tl.constexpr = BLOCK // 2
    if PACKED:
        half = tl.arange(0, HALF)
        half = half[:, None] if MODE == "columns" else half[None, :]
        byte_at = block * HALF + half
        length = (n + 1) // 2
        # Whole blocks need no look at the length, which would keep the loads narrow.
        byte_mask = block_mask if MODE == "flat" else block_mask & (byte_at < length)
        pairs = tl.load(
            codes_ptr + (row * length + byte_at) * inner + column, mask=byte_mask, other=0
        ).to(tl.int32)
        if MODE == "columns":
            codes = tl.permute(tl.join(pairs & 15, pairs >> 4), [0, 2, 1])
            codes = tl.reshape(codes, [BLOCK, TILE])
        else:
            codes = tl.reshape(tl.join(pairs & 15, pairs >> 4), [TILE, BLOCK])
    else:
        codes = tl.load(codes_ptr + (row * n + k) * inner + column, mask=mask, other=0).to(tl.int32)
    blocks_a_row = tl.cdiv(n, BLOCK)
    scale_at = (row * blocks_a_row + block) * inner + column
    byte = tl.load(scales_ptr + scale_at, mask=block_mask, other=0).to(tl.int32)
    scale = scale_value(byte, E8M0, E4M3_480)
    if TWO_LEVEL:
        scale = scale * tl.load(tensor_scale_ptr)
    value = elements_of(codes) * scale
    if LEVEL0_BLOCKS > 0:
        level0_at = row * tl.cdiv(blocks_a_row, LEVEL0_BLOCKS) + block // LEVEL0_BLOCKS
        value = value * tl.load(level0_ptr + level0_at, mask=block_mask, other=0.0)
    target = (row * n + k) * inner + column
    tl.store(out_ptr + target, narrow(value, out_ptr.dtype.element_ty), mask=mask)


# Eight 4-bit codes to eight bf16 numbers. Three bits of a code select the two bytes of its
# magnitude from tables (prmt takes nibbles as they are), the fourth becomes the sign; then the
# bytes are put together. $4: codes, $5, $9: lower bytes of the magnitudes, $13, $17: upper ones.
_LOOK_UP = tl.constexpr("""
{
.reg .b32 magnitude, up, lower, upper, sign;
and.b32 magnitude, $4, 0x77777777;
shl.b32 up, $4, 4;
prmt.b32 lower, $5, $9, magnitude;
prmt.b32 upper, $13, $17, magnitude;
prmt.b32 sign, $4, up, 0x1504;
lop3.b32 upper, upper, sign, 0x80808080, 0xF8;
prmt.b32 $0, lower, upper, 0x5140;
prmt.b32 $1, lower, upper, 0x7362;
shr.u32 magnitude, magnitude, 16;
prmt.b32 lower, $5, $9, magnitude;
prmt.b32 upper, $13, $17, magnitude;
prmt.b32 sign, $4, up, 0x3726;
lop3.b32 upper, upper, sign, 0x80808080, 0xF8;
prmt.b32 $2, lower, upper, 0x5140;
prmt.b32 $3, lower, upper, 0x7362;
}
""")


@triton.jit
def _four_bytes(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """The lowest bytes of four int32 numbers as one."""
    return (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24)


@triton.jit(do_not_specialize=["blocks"])
def unpack_kernel(
    packed_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    blocks: tl.tensor,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """bf16 numbers, two in an int32, of packed MXFP4 blocks that lie one behind the other."""
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    inside = block < blocks
    at = block * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + at, mask=inside, other=0)
    scale = e8m0_value(tl.load(scales_ptr + block, mask=inside, other=127).to(tl.int32))
    # bf16 is the upper half of fp32, and an element times a power of two is exact in it.
    m0, m1 = bits_of(scale * 0.0) >> 16, bits_of(scale * 0.5) >> 16
    m2, m3 = bits_of(scale) >> 16, bits_of(scale * 1.5) >> 16
    m4, m5 = bits_of(scale * 2.0) >> 16, bits_of(scale * 3.0) >> 16
    m6, m7 = bits_of(scale * 4.0) >> 16, bits_of(scale * 6.0) >> 16
    pairs = tl.inline_asm_elementwise(
        _LOOK_UP,
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [
            packed,
            _four_bytes(m0, m1, m2, m3),
            _four_bytes(m4, m5, m6, m7),
            _four_bytes(m0 >> 8, m1 >> 8, m2 >> 8, m3 >> 8),
            _four_bytes(m4 >> 8, m5 >> 8, m6 >> 8, m7 >> 8),
        ],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )
    tl.store(out_ptr + at, pairs, mask=inside)


@triton.jit
def dual_level_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    level0_ptr: tl.tensor,
    n: tl.tensor,
    stride_row: tl.tensor,
    stride_n: tl.tensor,
    FAKE: tl.constexpr,
    PACK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    BUMP: tl.constexpr,
    LAST: tl.constexpr,
    ROUNDING: tl.constexpr,
    FLUSH: tl.constexpr,
    INF_SATURATES: tl.constexpr,
) -> None:
    """One group (512 numbers, 16 blocks) of dual-level MX: ``numerics.dual_level`` has the idea.

    With ``FAKE`` out gets the rounded numbers, else codes, scale bytes and level-0 scales.
    """
    BLOCKS: tl.constexpr = GROUP // BLOCK
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    groups = tl.cdiv(n, GROUP)
    index = tl.program_id(0).to(tl.int64)
    row = index // groups
    group = index % groups
    block = group * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    k = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = k < n
    x = widen(tl.load(x_ptr + row * stride_row + k * stride_n, mask=mask, other=0.0))
    a = tl.abs(x)
    amax = tl.max(tl.max(tl.where(a < INF, a, 0.0), 1), 0)
    s0 = amax * SIXTH
    s0 = tl.where(s0 < MIN_NORMAL, 0.0, s0)
    SHORT: tl.constexpr = tl.float16 if dtype == tl.float16 else tl.bfloat16
    t = widen(narrow(tl.math.div_rn(x, tl.zeros_like(x) + s0), SHORT))
    t = tl.where(x == 0.0, x, t)
    elements, signs, scale, byte = to_grid(
        t,
        0,
        1.0,
        1,
        SHORT,
        RULE,
        BUMP,
        LAST,
        ROUNDING,
        FLUSH,
        INF_SATURATES,
        False,
        False,
    )
    if FAKE:
        y = narrow(put_signs((elements * scale) * s0, signs), dtype)
        tl.store(out_ptr + row * n + k, y, mask=mask)
    else:
        blocks_a_row = tl.cdiv(n, BLOCK)
        inside = block < blocks_a_row
        tl.store(scales_ptr + row * blocks_a_row + block, byte.to(tl.uint8), mask=inside)
        tl.store(level0_ptr + row * groups + group, s0)
        codes = codes_of(elements, signs, scale)
        if PACK:
            HALF: tl.constexpr = BLOCK // 2
            low, high = tl.split(tl.reshape(codes, [BLOCKS, HALF, 2]))
            codes = low | (high << 4)
            at = block * HALF + tl.arange(0, HALF)[None, :]
            length = (n + 1) // 2
            tl.store(codes_ptr + row * length + at, codes.to(tl.uint8), mask=at < length)
        else:
            tl.store(codes_ptr + row * n + k, codes.to(tl.uint8), mask=mask)
