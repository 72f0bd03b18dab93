"""Block scales: from a block's largest magnitude to its scale byte and its value.

**E8M0** (MX formats): the byte b stands for 2^(b - 127), 0xFF for NaN. A rule that looks at the
largest magnitude alone is "the exponent of amax, one more if the mantissa is large enough, minus
2" (E2M1's largest power of two is 4 = 2^2). On the bit pattern of amax that is one integer
addition which carries into the exponent field, so such a rule is a number:

    rule         bump       one binade up if amax is
    floor        0          (never)
    even         0x200000   >= 1.75 * 2^e
    above_1.75   0x1FFFFF   >  1.75 * 2^e
    rceil        0x3FFFFF   >  1.5  * 2^e      (that is 2^ceil(log2(amax / 6)))
    ceil         0x7FFFFF   >  1    * 2^e

The exponent comes from the bits of the exact input. A float logarithm errs one ulp beside a power
of two; in bf16 it gives the wrong scale in 1-2 % of all blocks.

**E4M3** (NVFP4): the byte is an OCP FP8 number near amax / 6, relative to a tensor scale g:

    g = amax(tensor) / 2688           2688 = 6 * 448, so the largest block gets the largest scale
    s = E4M3(amax / (6 g))            all in fp32
    element = E2M1(x * (1 / (s * (1 / (1 / g)))))
    value   = element * (s * g)

The reciprocals are those of the reference code that serving kernels follow (encode scale 1 / g,
decode scale its reciprocal); they decide ties that an exact quotient would decide otherwise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from npu_qat.numerics import e2m1
from npu_qat.numerics.profiles import Profile

INF_BITS = 0x7F800000
BUMPS = {"floor": 0, "even": 0x200000, "above_1.75": 0x1FFFFF, "rceil": 0x3FFFFF, "ceil": 0x7FFFFF}
# Rules whose answer does not change when amax is cut to its 16 upper bits.
TRUNCATION_SAFE = ("floor", "even")

FP32_MAX = torch.finfo(torch.float32).max
FP32_TINY = torch.finfo(torch.float32).tiny  # smallest normal number, 2^-126

E4M3_MAX = 448.0
NVFP4_RANGE = e2m1.MAX * E4M3_MAX
# Below this tensor scale fp32 reciprocals overflow; the tensor is then scaled up by 2^64 first.
TINY_TENSOR_SCALE = 2.0**-100
RESCUE = 2.0**64

_NAN_INDEX = 256  # table index of a block whose scale is NaN
_INF_INDEX = 257  # table index of a block with Inf under a profile that saturates
_MIN_NORMAL_E4M3_BITS = 0x3C800000  # the pattern of 2^-6
_E4M3_CARRIER = 2.0**20  # 2^20 * P has the spacing P / 8 in fp32
EPSILON = 9.6e-7  # of msmodelslim and quant_compute
_PATTERNS = {
    torch.float32: (torch.int32, 1 << 23),
    torch.bfloat16: (torch.int16, 1 << 7),
    torch.float16: (torch.int16, 1 << 10),
}


class BlockScales(NamedTuple):
    """What the blocks need, each of shape [R, 1, I].

    Attributes:
        factor: multiplies (or, if `divides`, divides) magnitudes to give element units.
        value: multiplies elements to give numbers.
        key: from which `scale_bytes` makes the bytes.
        divides: whether `factor` is a divisor.
    """

    factor: Tensor
    value: Tensor
    key: Tensor
    divides: bool = False


def block_scales(
    profile: Profile,
    magnitudes: Tensor,
    amax_bits: Tensor,
    dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
    rescue: Tensor | None = None,
) -> BlockScales:
    """Scales of blocks under `profile`.

    `magnitudes` [R, B, I] fp32; `amax_bits` [R, 1, I] int32, the pattern of the largest of them
    (NaN sorts above Inf); `dtype`: the input's own; `tensor_scale`: fp32 scalar or None;
    `rescue`: the power of two by which a tiny tensor is to be lifted, or None. The factor is then
    one for lifted magnitudes.
    """
    rule = profile.scale_rule
    if rule == "e4m3":
        return _e4m3_scales(profile, amax_bits, tensor_scale, rescue)
    if rule == "e4m3_clamped_carry":
        s = _clamped_carry_scale(amax_bits.view(torch.float32))
        return BlockScales(s, s, s, divides=True)
    if rule == "mse":
        key = _mse_bytes(magnitudes, amax_bits)
    elif rule == "msmodelslim":
        key = msmodelslim_bytes(amax_bits, dtype)
    elif rule == "quant_compute":
        key = _quant_compute_bytes(amax_bits)
    else:
        key = binade_index(amax_bits, BUMPS[rule], inf_saturates=profile.inf == "saturate")
    factor, value, _ = e8m0_tables(profile, key.device)
    flat, shape = key.view(-1), key.shape
    return BlockScales(
        factor.index_select(0, flat).view(shape), value.index_select(0, flat).view(shape), key
    )


def scale_bytes(block: BlockScales, profile: Profile) -> Tensor:
    """The uint8 scale bytes of blocks, shape [R, 1, I]."""
    if profile.scale_format == "e8m0":
        _, _, byte = e8m0_tables(profile, block.key.device)
        return byte.index_select(0, block.key.view(-1)).view(block.key.shape)
    if profile.scale_format == "e4m3_480":
        # The pattern of 480 is E4M3's NaN, so the bits are put together by hand.
        byte = ((block.key.view(torch.int32) >> 20) - (120 << 3)).to(torch.uint8)
        return byte.masked_fill_(block.key.isnan(), 0xFF)
    byte = block.key.to(torch.float8_e4m3fn).view(torch.uint8)
    return byte.masked_fill_(block.key.isnan(), 0x7F)  # E4M3 has a negative NaN too


def values_from_bytes(byte: Tensor, profile: Profile) -> Tensor:
    """fp32 values of uint8 scale bytes in the profile's scale format."""
    if profile.scale_format == "e8m0":
        return e8m0_values(byte)
    value = byte.view(torch.float8_e4m3fn).float()
    if profile.scale_format == "e4m3_480":
        value = value.masked_fill(byte == 0x7F, 480.0)
    return value


# --- E8M0 -----------------------------------------------------------------------------------------


def e8m0_values(byte: Tensor) -> Tensor:
    """fp32 values 2^(byte - 127) of E8M0 bytes (uint8); NaN for 0xFF. 2^-127 is subnormal."""
    bits = byte.to(torch.int32) << 23
    bits = bits.masked_fill_(byte == 0, 0x400000).masked_fill_(byte == 255, 0x7FC00000)
    return bits.view(torch.float32)


def binade_index(amax_bits: Tensor, bump: int, *, inf_saturates: bool = False) -> Tensor:
    """Biased exponent (0..255) of amax after the rule's bump, int32; 256 if amax is Inf or NaN.

    Without a bump 255 itself means Inf or NaN, which saves three operations in the most common
    case. With `inf_saturates` an infinity gives 257.
    """
    if bump == 0 and not inf_saturates:
        return amax_bits >> 23
    bits = amax_bits.clamp_max(INF_BITS)
    not_finite = bits == INF_BITS
    index = bits.add_(bump).bitwise_right_shift_(23).masked_fill_(not_finite, _NAN_INDEX)
    return index.masked_fill_(amax_bits == INF_BITS, _INF_INDEX) if inf_saturates else index


@lru_cache(maxsize=256)
def e8m0_tables(profile: Profile, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(factor, value, byte) by binade index 0..257, or by byte for rules that give the byte."""
    byte = torch.arange(258, device="cpu")
    if profile.scale_rule in BUMPS:
        last = min(profile.top_binade, 255 if BUMPS[profile.scale_rule] else 254)
        byte = (byte - 2).clamp_min(0)
        byte[last + 1 :] = 255
        byte[_INF_INDEX] = 254
    else:
        byte = byte.clamp_max(255)
    byte = byte.to(torch.uint8)
    value = e8m0_values(byte)
    factor = e8m0_values(254 - byte).masked_fill_(byte == 255, torch.nan)
    if profile.rounding == "half_away":
        factor *= e2m1.NUDGE
    if profile.flush:
        factor[byte == 0] = 0.0
    return factor.to(device), value.to(device), byte.to(device)


def _mse_bytes(magnitudes: Tensor, amax_bits: Tensor) -> Tensor:
    """Bytes (int32) of the `mse` rule for finite blocks; 0 for blocks that the op flushes.

    The squared errors are summed one element after the other, so that the choice between two
    nearly equal candidates is the same on every machine.
    """
    floor_byte = (amax_bits >> 23) - 2
    best_byte = torch.zeros_like(floor_byte)
    best_error = torch.full(
        floor_byte.shape, torch.inf, dtype=torch.float64, device=best_byte.device
    )
    exact = magnitudes.double()
    for candidate in (-1, 0, 1):
        byte = floor_byte + candidate
        allowed = (floor_byte > 0) & (byte >= 1) & (byte <= 254)
        byte = byte.clamp(1, 254)
        element = e2m1.round_(magnitudes * e8m0_values((254 - byte).to(torch.uint8)), "half_away")
        error = exact - element.double() * e8m0_values(byte.to(torch.uint8)).double()
        error = error.square_()
        total = torch.zeros_like(best_error)
        for i in range(error.shape[1]):
            total += error[:, i : i + 1]
        better = allowed & (total < best_error)
        best_error = torch.where(better, total, best_error)
        best_byte = torch.where(better, byte, best_byte)
    return best_byte


def msmodelslim_bytes(amax_bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (int32) of msmodelslim's weight rule for finite blocks, in the arithmetic of `dtype`.

    floor(log2(amax / 0.875 + 9.6e-7)) - 2, clipped to [-129, 125]. In bf16 the logarithm itself
    rounds, which moves 1.3 % of the scales of Gaussian weights; that is what the exporter writes.
    """
    amax = amax_bits.view(torch.float32).to(dtype)
    epsilon = amax.new_tensor(EPSILON)  # rounded to the dtype first, as eager CPU code does
    with torch.autocast(amax.device.type, enabled=False):  # which would take log2 in fp32
        exponent = torch.floor(torch.log2(amax / 0.875 + epsilon)) - 2
    return exponent.clamp(-129, 125).to(torch.int32) + 127


def _quant_compute_bytes(amax_bits: Tensor) -> Tensor:
    """Bytes (int32) of quant_compute's rule: floor scale of fp32(amax + 9.6e-7), at most 252."""
    shifted = amax_bits.view(torch.float32) + EPSILON
    byte = ((shifted.view(torch.int32) >> 23) - 2).clamp_max_(252)
    return byte.masked_fill_(amax_bits > INF_BITS, 255)


# --- E4M3 -----------------------------------------------------------------------------------------


def nvfp4_tensor_scale(amax: Tensor | float) -> Tensor:
    """fp32 tensor scale amax / 2688 of NVFP4; `amax`: largest finite magnitude of the tensor."""
    return _divide(torch.as_tensor(amax, dtype=torch.float32), NVFP4_RANGE)


def _divide(x: Tensor, divisor: float) -> Tensor:
    """The correctly rounded quotient on every device.

    On CUDA torch computes `x / 6.0` as `x * (1 / 6.0)`, which rounds twice; by a tensor it divides.
    """
    return x / x.new_full((), divisor)


def largest_finite(x: Tensor) -> Tensor:
    """fp32 scalar: the largest finite magnitude in `x`, 0 if there is none.

    Adding the lowest exponent bit to a pattern makes exactly those of Inf and NaN wrap around to
    negative integers, so they lose against every finite number.
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    a = x.abs()
    integer, lowest_exponent_bit = _PATTERNS[x.dtype]
    bits = a.view(integer).add_(lowest_exponent_bit).amax().clamp_min_(lowest_exponent_bit)
    return bits.sub_(lowest_exponent_bit).view(x.dtype).float()


def round_to_e4m3_(s: Tensor) -> Tensor:
    """Round fp32 magnitudes to E4M3 in place: ties to even, subnormals kept, saturating at 448."""
    s.clamp_max_(E4M3_MAX)
    carrier = (s.view(torch.int32) & INF_BITS).clamp_min_(_MIN_NORMAL_E4M3_BITS).view(torch.float32)
    return s.add_(carrier, alpha=_E4M3_CARRIER).sub_(carrier, alpha=_E4M3_CARRIER)


def _e4m3_scales(
    profile: Profile, amax_bits: Tensor, tensor_scale: Tensor | None, rescue: Tensor | None
) -> BlockScales:
    """E4M3 scales and, under a tensor scale, the two-level factors (module docstring)."""
    amax = amax_bits.view(torch.float32)
    if tensor_scale is None:
        s = _divide(amax, e2m1.MAX)
    else:
        g, lifted = tensor_scale, amax
        if rescue is not None:
            g, lifted = g * rescue, (amax * rescue).clamp_max_(FP32_MAX)
        s = lifted / (g * e2m1.MAX).clamp_min_(FP32_TINY)  # an all-zero tensor has g = 0
    round_to_e4m3_(s)
    if profile.inf == "nan":
        s.add_(amax, alpha=0.0)  # 0 * Inf is NaN
    value = divisor = s
    if tensor_scale is not None:
        value = s * tensor_scale
        divisor = s * g.reciprocal().reciprocal()
    if profile.quotient == "division":
        return BlockScales(divisor.masked_fill(divisor == 0, torch.inf), value, s, divides=True)
    factor = divisor.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)
    return BlockScales(factor, value, s)


def _clamped_carry_scale(amax: Tensor) -> Tensor:
    """amax / 6 as the earlier public code stores it: 1.000 to 1.875 times 2^-6 to 2^8; NaN kept."""
    raw = _divide(amax.clamp_min(1e-10), e2m1.MAX)
    exponent = ((raw.view(torch.int32) >> 23) - 127).clamp_(-6, 8)
    binade = ((exponent + 127) << 23).view(torch.float32)
    mantissa = (raw / binade * 8).round_().div_(8).clamp_(1.0, 1.875)
    return mantissa.mul_(binade)
