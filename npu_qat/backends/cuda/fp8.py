"""The 4-bit matmul of GPUs that have no 4-bit tensor cores: MXFP4 numbers as FP8 numbers.

An MXFP4 number is 0.5, 1, 1.5, 2, 3, 4 or 6 times a power of two, so one mantissa bit holds it, and
FP8 has two or three. What differs is the range: FP8 has no scale a block. So each row gets one
power of two for all its blocks,

    x[m, k] = 2^a[m] * x8[m, k],   w[n, k] = 2^b[n] * w8[n, k],   y[m, n] = 2^(a + b) sum_k x8 w8

with activations in E5M2 (30 octaves below the row's largest number, the last without a mantissa)
and weights in E4M3 (17). All products are exact, tensor cores make twice as many a second, and an
encoded activation is half as large as a 16-bit one. The codes are the profile's, bit for bit.

**What is given up: the sums.** Hopper's FP8 tensor cores add products with fewer bits than fp32 and
pass the sum on to fp32 every 128 products. The error is below the rounding of a bf16 result but not
zero, so this is an accumulator of its own, as an NPU's is, and not what ``matmul: auto`` takes.

Two limits. A weight row whose numbers span more than E4M3's range is refused when it is prepared.
An activation smaller than 2^-29 of its row's largest is cut to the bits that E5M2 has there, or to
zero: the row is not known before, and fp32 sums lose such numbers, too.

Rows that decode (up to ``matmul.MAX_ROWS``) read the packed weight instead and add in fp32: there
the bytes of the weight are the time, and 4 bits are fewer than 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_qat.backends.base import PackedWeight
from npu_qat.backends.cuda.elementwise import constants_of
from npu_qat.backends.cuda.launch import CachedLaunch
from npu_qat.backends.cuda.tiles import (
    BY_HAND,
    GIVEN_RULES,
    INF_BITS,
    bits_of,
    e8m0_value,
    elements_of,
    float_of,
    narrow,
    numerics_of,
    put_signs,
    scale_byte,
    to_grid,
    widen,
)
from npu_qat.numerics.profiles import Profile

# FP8 tensor cores came with Ada and Hopper.
CAPABILITY = (8, 9)
# Largest exponents of the two formats under a mantissa of 1.5.
_E4M3_TOP = 8
# Numbers of a row that a program encodes at a time, blocks that it decodes; warps of it.
CHUNK, CHUNK_WARPS = 2048, 4
DECODE_TILE, DECODE_WARPS = 128, 4
_launches: dict[tuple[Any, ...], CachedLaunch] = {}


@dataclass(frozen=True)
class Fp8Weight:
    """A packed weight [N, K] and what turns it into E4M3.

    Attributes:
        packed: codes and scale bytes.
        row_scales: fp32 [N, 1], powers of two.
        decoded: E4M3 [N, K] over the row scales, or None: decoded for each product.
    """

    packed: PackedWeight
    row_scales: Tensor
    decoded: Tensor | None = None


@triton.jit
def encode_rows_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
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
    """E5M2 bytes and the scale of one quantised row [K], which is looked at twice.

    Rounding lifts a number into the next binade at most, so the largest number of the row before
    it is quantised decides the scale: that one gets the exponent 14, and the largest exponent of
    E5M2 is 15. E5M2 is the upper byte of fp16.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * K
    column = tl.arange(0, CHUNK)
    top = tl.zeros([CHUNK], tl.int32)
    for start in range(0, K, CHUNK):
        at = start + column
        x = widen(tl.load(x_ptr + row + at, mask=at < K, other=0.0))
        bits = bits_of(x) & 0x7FFFFFFF
        top = tl.maximum(top, tl.where(bits > INF_BITS, 0, bits))
    power = tl.maximum((tl.max(top, 0) >> 23) - 14, 1)  # biased, of the row's scale
    factor = float_of((254 - power) << 23)
    for start in range(0, K, CHUNK):
        at = start + column
        x = widen(tl.load(x_ptr + row + at, mask=at < K, other=0.0))
        elements, signs, scale, _ = to_grid(
            tl.reshape(x, [CHUNK // BLOCK, BLOCK]),
            0,
            1.0,
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
        y = tl.reshape(put_signs(elements * scale, signs), [CHUNK])
        short = narrow(y * factor, tl.float16).to(tl.int16, bitcast=True)
        tl.store(codes_ptr + row + at, ((short >> 8) & 0xFF).to(tl.uint8), mask=at < K)
    tl.store(scales_ptr + tl.program_id(0), float_of(power << 23))


# Eight 4-bit codes to eight bytes: three bits of each select from a table of eight bytes (prmt
# takes nibbles as they are), the fourth becomes the sign. $2: codes, $3, $7: the table's halves.
_LOOK_UP = tl.constexpr("""
{
.reg .b32 magnitude, sign, up, next;
and.b32 magnitude, $2, 0x77777777;
shl.b32 up, $2, 4;
prmt.b32 $0, $3, $7, magnitude;
prmt.b32 sign, $2, up, 0x1504;
lop3.b32 $0, $0, sign, 0x80808080, 0xF8;
shr.u32 next, magnitude, 16;
prmt.b32 $1, $3, $7, next;
prmt.b32 sign, $2, up, 0x3726;
lop3.b32 $1, $1, sign, 0x80808080, 0xF8;
}
""")


@triton.jit
def _e4m3(value: tl.tensor) -> tl.tensor:
    """The byte (int32) of fp32 magnitudes that E4M3 holds exactly."""
    return scale_byte(value, bits_of(value), False, False)


@triton.jit(do_not_specialize=["blocks"])
def decode_weight_kernel(
    packed_ptr: tl.tensor,
    bytes_ptr: tl.tensor,
    row_scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    blocks: tl.tensor,
    BLOCKS_A_ROW: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """E4M3 bytes, two in an int16, of TILE blocks of a packed weight, over its row scales."""
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    inside = block < blocks
    at = block.to(tl.int64) * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + at, mask=inside, other=0)
    byte = tl.load(bytes_ptr + block, mask=inside, other=127).to(tl.int32)
    row_scale = tl.load(row_scales_ptr + block // BLOCKS_A_ROW, mask=inside, other=1.0)
    scale = e8m0_value(byte) / row_scale  # both are powers of two
    if BY_HAND:
        codes = packed.to(tl.int32)
        low = _e4m3(elements_of(codes & 7) * scale) | ((codes & 8) << 4)
        high = _e4m3(elements_of((codes >> 4) & 7) * scale) | (codes & 128)
        pair = (low | (high << 8)).to(tl.int16)
    else:
        small = (_e4m3(scale * 0.5) << 8) | (_e4m3(scale) << 16) | (_e4m3(scale * 1.5) << 24)
        large = (
            _e4m3(scale * 2.0)
            | (_e4m3(scale * 3.0) << 8)
            | (_e4m3(scale * 4.0) << 16)
            | (_e4m3(scale * 6.0) << 24)
        )
        pair = tl.inline_asm_elementwise(
            _LOOK_UP,
            "=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, small, large],
            dtype=tl.int16,
            is_pure=True,
            pack=4,
        )
    tl.store(out_ptr + at, pair, mask=inside)


def holds(profile: Profile) -> bool:
    """Whether numbers of ``profile`` are FP8 numbers times a power of two a row."""
    return numerics_of(profile).e8m0 and profile.block_size == 32 and not profile.level0_block


def encodes(profile: Profile) -> bool:
    """Whether ``encode_rows`` computes ``profile``: its rule looks at the largest number alone, and
    its rounding lifts nothing by more than a binade."""
    return (
        numerics_of(profile).rule not in GIVEN_RULES
        and profile.nan != "error"
        and profile.rounding != "toward_minus_inf"
    )


def encode_rows(x: Tensor, profile: Profile) -> tuple[Tensor, Tensor]:
    """(E5M2 [M, K], fp32 row scales [M, 1]) of ``x`` [.., K] quantised along K."""
    k = x.shape[-1]
    x2d = x.reshape(-1, k).contiguous()
    codes = torch.empty(x2d.shape, dtype=torch.float8_e5m2, device=x.device)
    scales = torch.empty((len(x2d), 1), dtype=torch.float32, device=x.device)
    if x2d.numel():
        device, wide = x.device.index or 0, x2d.data_ptr() % 16 == 0
        key = ("encode", profile.name, x.dtype, device, k, wide)
        launch = _launches.get(key)
        if launch is None:
            launch = _launches[key] = CachedLaunch(
                encode_rows_kernel,
                {"K": k, "CHUNK": CHUNK} | constants_of(numerics_of(profile)),
                cached=wide,
                num_warps=CHUNK_WARPS,
            )
        launch((len(x2d), 1, 1), (x2d, codes.view(torch.uint8), scales), device)
    return codes, scales


def prepare_weight(weight: PackedWeight, decoded: Tensor, resident: bool = False) -> Fp8Weight:
    """``weight`` with the scales of its rows. ``decoded``: its values [N, K] in bf16 or fp32.

    With ``resident`` its E4M3 bytes are kept: a byte a weight for the time of decoding it.

    Raises:
        ValueError: a row spans more than E4M3 holds.
    """
    exponent = torch.frexp(decoded.float().abs().amax(1, keepdim=True)).exponent - 1
    row_scales = torch.exp2((exponent - _E4M3_TOP).clamp(-126, 127).float())
    shrunk = decoded.float() / row_scales
    lost = (shrunk.to(torch.float8_e4m3fn).float() != shrunk).any(1)
    if bool(lost.any()):
        row = int(lost.nonzero()[0])
        small = decoded[row][decoded[row] != 0].abs().min().item()
        raise ValueError(
            f"row {row} of the weight holds numbers from {small:.3g} to "
            f"{decoded[row].abs().max().item():.3g}; FP8 (E4M3) holds 17 octaves in a row"
        )
    made = Fp8Weight(weight, row_scales)
    return replace(made, decoded=decode_weight(made)) if resident else made


def decode_weight(weight: Fp8Weight) -> Tensor:
    """E4M3 [N, K], contiguous, of ``weight`` over its row scales."""
    packed = weight.packed
    n, k = packed.shape
    out = torch.empty((n, k), dtype=torch.float8_e4m3fn, device=packed.packed.device)
    device = out.device.index or 0
    key = ("decode", device, k)
    launch = _launches.get(key)
    if launch is None:
        constants = {"BLOCKS_A_ROW": k // 32, "TILE": DECODE_TILE, "HALF": 16}
        launch = _launches[key] = CachedLaunch(
            decode_weight_kernel, constants, num_warps=DECODE_WARPS
        )
    blocks = n * k // 32
    args = (packed.packed, packed.scales, weight.row_scales, out.view(torch.int16), blocks)
    launch((-(-blocks // DECODE_TILE), 1, 1), args, device)
    return out


def linear(
    codes: Tensor,
    row_scales: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``x W^T + b`` [M, N] from E5M2 ``codes`` [M, K]; each 128 products are added up in fp32."""
    y: Tensor = torch._scaled_mm(
        codes,
        (decode_weight(weight) if weight.decoded is None else weight.decoded).t(),
        scale_a=row_scales,
        scale_b=weight.row_scales.t(),
        bias=bias,
        out_dtype=out_dtype,
        use_fast_accum=False,
    )
    return y
