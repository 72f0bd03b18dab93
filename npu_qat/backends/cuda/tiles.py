"""Device functions shared by all kernels: scales, rounding, codes. The arithmetic of ``numerics``.

Every function takes a tile of fp32 magnitudes, or of one number a block, and does to it what the
function of the same purpose in ``numerics.scales`` and ``numerics.e2m1`` does to a tensor, with the
same fp32 operations in the same order where one of them rounds. That is why the results are equal
bit for bit, and why kernels are launched without fused multiply-add (``enable_fp_fusion=False``):
the compiler may not merge a product and a sum that the reference rounds separately. Divisions are
IEEE (``div_rn``), and nothing is flushed to zero.

What a profile asks for arrives as compile-time constants (``Numerics``), so that a kernel contains
the instructions of one profile and no branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from npu_qat.backends.cuda.launch import interpreted
from npu_qat.numerics import e2m1, scales
from npu_qat.numerics.profiles import Profile

# Rules whose bytes one number a block decides, but that only weights use: `numerics` computes
# their bytes once, and the kernels take them as given.
GIVEN_RULES = ("mse", "msmodelslim")

INF_BITS = tl.constexpr(scales.INF_BITS)
NAN_BITS = tl.constexpr(0x7FC00000)
NUDGE = tl.constexpr(e2m1.NUDGE)
SHORT_MASK = tl.constexpr(e2m1.SHORT_MASK)
FP32_MAX = tl.constexpr(scales.FP32_MAX)
FP32_TINY = tl.constexpr(scales.FP32_TINY)
TINY_TENSOR_SCALE = tl.constexpr(scales.TINY_TENSOR_SCALE)
RESCUE = tl.constexpr(scales.RESCUE)
CARRIER = tl.constexpr(2.0**22)
E4M3_CARRIER = tl.constexpr(2.0**20)
EPSILON = tl.constexpr(9.6e-7)
ONE_BITS = tl.constexpr(0x3F800000)
SIGN_BIT = tl.constexpr(-0x80000000)
# Triton's interpreter loses subnormal numbers between bf16 and fp32; there bits are moved by hand.
BY_HAND = tl.constexpr(interpreted())


@dataclass(frozen=True)
class Numerics:
    """A profile as the compile-time constants of a kernel.

    Attributes:
        block: elements that share a scale.
        rule: ``bump`` for the rules that are one integer addition to the pattern of the largest
            magnitude (then ``bump`` and ``last`` say which), else the rule's name, or ``given``.
        bump: added to the pattern.
        last: largest biased exponent after the bump that is still a number.
        rounding: as in ``numerics.profiles``.
        flush, inf_saturates, divides, two_level: as in ``Profile``.
        e4m3_480: whether E4M3's byte 0x7F means 480.
    """

    block: int
    rule: str
    bump: int
    last: int
    rounding: str
    flush: bool
    inf_saturates: bool
    divides: bool
    two_level: bool
    e4m3_480: bool

    @property
    def e8m0(self) -> bool:
        """Whether scales are powers of two."""
        return not self.rule.startswith("e4m3")


@lru_cache(maxsize=64)
def numerics_of(profile: Profile) -> Numerics:
    """The constants of ``profile`` (one level; the outer level of dual-level MX is elsewhere)."""
    rule, bump, last = str(profile.scale_rule), 0, 0
    if rule in scales.BUMPS:
        bump = scales.BUMPS[rule]
        rule, last = "bump", min(profile.top_binade, 255 if bump else 254)
    elif rule in GIVEN_RULES:
        rule = "given"
    return Numerics(
        block=profile.block_size,
        rule=rule,
        bump=bump,
        last=last,
        rounding=profile.rounding,
        flush=profile.flush,
        inf_saturates=profile.inf == "saturate",
        divides=profile.quotient == "division",
        two_level=profile.tensor_scale,
        e4m3_480=profile.scale_format == "e4m3_480",
    )


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def bits_of(x: tl.tensor) -> tl.tensor:
    """The int32 pattern of fp32 numbers."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits: tl.tensor) -> tl.tensor:
    """The fp32 numbers of int32 patterns."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def widen(x: tl.tensor) -> tl.tensor:
    """fp32 values of fp32, bf16 or fp16 numbers."""
    if BY_HAND and x.dtype == tl.bfloat16:
        return float_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """fp32 numbers rounded to ``dtype``, ties to even."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = bits_of(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        short = tl.where((bits & 0x7FFFFFFF) > INF_BITS, 0x7FC0, rounded)
        return short.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def e8m0_value(byte: tl.tensor) -> tl.tensor:
    """2^(byte - 127) in fp32 for int32 bytes; NaN for 255. 2^-127 is subnormal."""
    bits = tl.where(byte == 0, 0x400000, byte << 23)
    return float_of(tl.where(byte == 255, NAN_BITS, bits))


@triton.jit
def e4m3_value(byte: tl.tensor, E4M3_480: tl.constexpr) -> tl.tensor:
    """fp32 values of E4M3 bytes (int32): its pattern, moved to fp32's place, times 2^120."""
    value = float_of((byte & 0x7F) << 20) * 1.329227995784916e36
    value = float_of(bits_of(value) | ((byte & 0x80) << 24))
    if E4M3_480:
        nan = byte == 255
    else:
        nan = (byte & 0x7F) == 0x7F
    return tl.where(nan, float("nan"), value)


@triton.jit
def scale_value(byte: tl.tensor, E8M0: tl.constexpr, E4M3_480: tl.constexpr) -> tl.tensor:
    """fp32 values of scale bytes (int32) of any scale format."""
    if E8M0:
        return e8m0_value(byte)
    else:
        return e4m3_value(byte, E4M3_480)


@triton.jit
def _e8m0_byte(
    amax_bits: tl.tensor,
    given: tl.tensor,
    RULE: tl.constexpr,
    BUMP: tl.constexpr,
    LAST: tl.constexpr,
    INF_SATURATES: tl.constexpr,
) -> tl.tensor:
    if RULE == "given":
        byte = given
    elif RULE == "quant_compute":
        shifted = bits_of(float_of(amax_bits) + EPSILON)
        byte = tl.minimum((shifted >> 23) - 2, 252)
        byte = tl.where(amax_bits > INF_BITS, 255, byte)
    else:
        # INF_BITS is the smallest pattern that is no number.
        index = (tl.minimum(amax_bits, INF_BITS) + BUMP) >> 23
        byte = tl.maximum(index - 2, 0)
        byte = tl.where((index > LAST) | (amax_bits >= INF_BITS), 255, byte)
        if INF_SATURATES:
            byte = tl.where(amax_bits == INF_BITS, 254, byte)
    return byte


@triton.jit
def _round_to_e4m3(s: tl.tensor) -> tl.tensor:
    s = tl.minimum(s, 448.0)
    carrier = float_of(tl.maximum(bits_of(s) & INF_BITS, 0x3C800000)) * E4M3_CARRIER
    return (s + carrier) - carrier


@triton.jit
def _clamped_carry(amax: tl.tensor) -> tl.tensor:
    raw = tl.math.div_rn(tl.maximum(amax, 1e-10), tl.full(amax.shape, 6.0, tl.float32))
    exponent = tl.minimum(tl.maximum((bits_of(raw) >> 23) - 127, -6), 8)
    binade = float_of((exponent + 127) << 23)
    inverse = float_of((127 - exponent) << 23)
    # Half to even on the mantissa in eighths: 2^23 has the spacing 1; what is larger than 15 is
    # cut to 1.875 all the same.
    eighths = tl.minimum(raw * inverse * 8.0, 64.0)
    mantissa = ((eighths + 8388608.0) - 8388608.0) * 0.125
    return tl.minimum(tl.maximum(mantissa, 1.0), 1.875) * binade


@triton.jit
def block_scale(
    amax_bits: tl.tensor,
    given: tl.tensor,
    tensor_scale: tl.tensor,
    RULE: tl.constexpr,
    BUMP: tl.constexpr,
    LAST: tl.constexpr,
    ROUNDING: tl.constexpr,
    FLUSH: tl.constexpr,
    INF_SATURATES: tl.constexpr,
    DIVIDES: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(factor, scale, byte) of blocks whose largest magnitudes have the patterns ``amax_bits``.

    ``factor`` multiplies magnitudes (or divides them, under ``DIVIDES``) to give element units;
    ``scale`` is the block scale without the tensor scale, NaN where the block is NaN. ``byte`` is
    the E8M0 byte (int32), or the pattern of ``scale`` for E4M3.
    """
    if RULE == "e4m3":
        amax = float_of(amax_bits)
        if TWO_LEVEL:
            rescue = tl.where(tensor_scale < TINY_TENSOR_SCALE, RESCUE, 1.0)
            g = tensor_scale * rescue
            lifted = tl.minimum(amax * rescue, FP32_MAX)
            s = tl.math.div_rn(lifted, tl.maximum(g * 6.0, FP32_TINY) + tl.zeros_like(lifted))
        else:
            s = tl.math.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32))
        s = _round_to_e4m3(s)
        if INF_SATURATES:
            nan = amax_bits > INF_BITS
        else:
            nan = amax_bits >= INF_BITS
        s = tl.where(nan, float("nan"), s)
        divisor = s
        if TWO_LEVEL:
            one = tl.full(amax.shape, 1.0, tl.float32)
            divisor = s * tl.math.div_rn(one, tl.math.div_rn(one, g + tl.zeros_like(one)))
        if DIVIDES:
            factor = tl.where(divisor == 0.0, float("inf"), divisor)
        else:
            ones = tl.full(divisor.shape, 1.0, tl.float32)
            factor = tl.math.div_rn(ones, divisor)
            factor = tl.where(factor == float("inf"), 0.0, factor)
        return factor, s, bits_of(s)
    elif RULE == "e4m3_clamped_carry":
        s = _clamped_carry(float_of(amax_bits))
        s = tl.where(amax_bits > INF_BITS, float("nan"), s)
        return s, s, bits_of(s)
    else:
        byte = _e8m0_byte(amax_bits, given, RULE, BUMP, LAST, INF_SATURATES)
        # Byte 255 makes the scale NaN, so its factor may be anything.
        factor_bits = (254 - byte) << 23
        factor = float_of(tl.where(byte == 254, 0x400000, factor_bits))
        if ROUNDING == "half_away":
            factor = factor * NUDGE
        if FLUSH:
            factor = tl.where(byte == 0, 0.0, factor)
        return factor, e8m0_value(byte), byte


@triton.jit
def scale_byte(
    scale: tl.tensor, byte: tl.tensor, E8M0: tl.constexpr, E4M3_480: tl.constexpr
) -> tl.tensor:
    """The stored byte (int32) from what ``block_scale`` returned."""
    if E8M0:
        return byte
    elif E4M3_480:
        return tl.where(scale != scale, 255, (byte >> 20) - 960)
    else:
        small = (scale * 512.0).to(tl.int32)  # a subnormal E4M3 number counts 2^-9
        normal = (byte >> 20) - 960
        return tl.where(scale != scale, 0x7F, tl.where(scale < 0.015625, small, normal))


@triton.jit
def round_to_grid(
    v: tl.tensor, negative: tl.tensor, ROUNDING: tl.constexpr, SHORT: tl.constexpr
) -> tl.tensor:
    """Magnitudes in units of the scale to the E2M1 grid; ``numerics.e2m1`` explains the sums."""
    v = tl.minimum(v, 6.0)
    if ROUNDING == "half_even" or ROUNDING == "half_away":
        if SHORT:
            carrier = tl.maximum(v, 1.0) * CARRIER
        else:
            carrier = float_of(tl.maximum(bits_of(v) & INF_BITS, ONE_BITS)) * CARRIER
        return (v + carrier) - carrier
    else:
        power = tl.maximum(bits_of(v) & INF_BITS, ONE_BITS)  # of the largest power of two <= v
        step = float_of(power) * 0.5
        r = v * float_of(0x7F800000 - power)  # / step, exact
        if ROUNDING == "half_down":
            r = tl.abs(tl.ceil(r - 0.5))
        elif ROUNDING == "toward_zero":
            r = tl.floor(r)
        else:
            tl.static_assert(ROUNDING == "toward_minus_inf")
            r = tl.where(negative, tl.ceil(r), tl.floor(r))
        return r * step


@triton.jit
def to_grid(
    x: tl.tensor,
    given: tl.tensor,
    tensor_scale: tl.tensor,
    AXIS: tl.constexpr,
    dtype: tl.constexpr,
    RULE: tl.constexpr,
    BUMP: tl.constexpr,
    LAST: tl.constexpr,
    ROUNDING: tl.constexpr,
    FLUSH: tl.constexpr,
    INF_SATURATES: tl.constexpr,
    DIVIDES: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Blocks along ``AXIS`` of a 2-D tile to (elements, signs, scale, byte).

    ``x``: the tile in fp32, of numbers that are exact in ``dtype``. ``elements``: magnitudes on the
    E2M1 grid, fp32. ``signs``: int32, the sign bits in place. ``scale``, ``byte``: as from
    ``block_scale``, with the blocked axis of length 1.
    """
    E8M0: tl.constexpr = RULE != "e4m3" and RULE != "e4m3_clamped_carry"
    pattern = bits_of(x)
    signs = pattern & SIGN_BIT
    bits = pattern & 0x7FFFFFFF
    amax_bits = tl.expand_dims(tl.max(bits, AXIS), AXIS)
    factor, scale, byte = block_scale(
        amax_bits,
        given,
        tensor_scale,
        RULE,
        BUMP,
        LAST,
        ROUNDING,
        FLUSH,
        INF_SATURATES,
        DIVIDES,
        TWO_LEVEL,
    )
    NUDGED: tl.constexpr = E8M0 and ROUNDING == "half_away"
    if TWO_LEVEL:
        rescue = tl.where(tensor_scale < TINY_TENSOR_SCALE, RESCUE, 1.0)
        a = tl.minimum(float_of(bits) * rescue, FP32_MAX)
    elif NUDGED and dtype == tl.float32:
        a = float_of(bits & SHORT_MASK)
    else:
        a = float_of(bits)
    if RULE == "e4m3_clamped_carry" or DIVIDES:
        v = tl.math.div_rn(a, factor + tl.zeros_like(a))
    else:
        v = a * factor
    if ROUNDING == "toward_minus_inf":
        # Even the tiniest negative quotient counts. What is far below the grid is lifted, since
        # the device's ceil() takes a subnormal number for zero.
        if dtype == tl.bfloat16:
            counts = v > 4.591774807899561e-41  # 2^-134: as a bf16 quotient it is zero
        else:
            counts = (a != 0.0) & (factor != 0.0)
        v = tl.where(counts, tl.maximum(v, 9.5367431640625e-07), 0.0)
    SHORT: tl.constexpr = E8M0 and (NUDGED or dtype != tl.float32)
    return round_to_grid(v, signs != 0, ROUNDING, SHORT), signs, scale, byte


@triton.jit
def put_signs(magnitude: tl.tensor, signs: tl.tensor) -> tl.tensor:
    """fp32 ``magnitude`` with sign bits, -0 included."""
    return float_of(bits_of(magnitude) | signs)


@triton.jit
def codes_of(elements: tl.tensor, signs: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """E2M1 codes (int32) of grid magnitudes; 0 in a NaN block.

    Times 2^-126 the element 1 becomes the smallest normal number, 0.5 a subnormal one: the upper
    bits of the pattern are the code.
    """
    code = (bits_of(elements * 1.1754943508222875e-38) >> 22) | ((signs >> 28) & 8)
    return tl.where(scale != scale, 0, code)


@triton.jit
def elements_of(codes: tl.tensor) -> tl.tensor:
    """Signed fp32 values of E2M1 codes (int32), -0 included: the way back of ``codes_of``."""
    magnitude = float_of((codes & 7) << 22) * 8.507059173023462e37
    return float_of(bits_of(magnitude) | ((codes & 8) << 28))


@triton.jit
def _butterfly(x: tl.tensor, BLOCKS: tl.constexpr, DISTANCE: tl.constexpr) -> tl.tensor:
    """One stage on [BLOCKS, 32]: partners ``DISTANCE`` apart become their sum and difference."""
    pairs = tl.reshape(x, [BLOCKS * 16 // DISTANCE, 2, DISTANCE])
    a, b = tl.split(tl.permute(pairs, [0, 2, 1]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [BLOCKS, 32])


@triton.jit
def rotate(x: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """Hadamard transform of fp32 blocks of 32 along the last axis, unscaled, in the shape of ``x``.

    The sums of ``layers.rotation``, stage by stage: the same bits.
    """
    y = tl.reshape(x, [BLOCKS, 32])
    y = _butterfly(y, BLOCKS, 1)
    y = _butterfly(y, BLOCKS, 2)
    y = _butterfly(y, BLOCKS, 4)
    y = _butterfly(y, BLOCKS, 8)
    y = _butterfly(y, BLOCKS, 16)
    return tl.reshape(y, x.shape)
