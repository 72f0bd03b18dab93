"""The 4-bit element, E2M1: rounding to its grid, codes, and back.

    code   0    1    2    3    4    5    6    7        8..15: the same with the sign bit set
    value  0   0.5   1   1.5   2    3    4    6        (code 8 is -0)

The grid is a floating-point format with one mantissa bit: its spacing ("step") at v is half the
power of two at or below v, and 0.5 below 1. Two tricks make it cheap with plain tensor ops.

**Rounding by adding and taking away.** fp32 has 24 significant bits, so the sum v + 2^22 * P,
with P <= v < 2 P a power of two, cannot hold anything finer than P / 2: the addition itself
rounds v to the grid (to nearest, ties to even), and subtracting 2^22 * P leaves the rounded value.
Below 1, P = 1. No comparison and no table.

**Codes by way of fp16.** E2M1 is fp16 with nine mantissa bits fewer: after multiplication by
2^-14 the value 1 is fp16's smallest normal number and 0.5 a subnormal one, so the upper bits of
the fp16 pattern are the code.

Everything here works on magnitudes in units of the block scale; signs travel separately, which
keeps -0.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MAX = 6.0

# Multiplying by scale factor * NUDGE instead of the scale factor sends exact ties up, and nothing
# else, if the value has at most 16 significant bits: its distance to a tie is 0 or far more.
NUDGE = 1.0 + 2.0**-20
SHORT_MASK = -65536  # 0xFFFF0000: keeps the 16 upper bits of an fp32 pattern

_EXPONENT_MASK = 0x7F800000  # fp32 exponent field
_ONE_BITS = 0x3F800000  # the pattern of 1.0
_CARRIER = 2.0**22  # 2^22 * P has the spacing P / 2 in fp32


def round_to_nearest_(v: Tensor, *, short: bool = False) -> Tensor:
    """Round fp32 magnitudes `v` to the grid in place, ties to even, saturating at 6.

    With `short=True` the caller states that every value has at most 16 significant bits (before a
    `NUDGE`). Then max(v, 1) itself may stand for P, which saves a pass: 2^22 * v is still a
    multiple of P / 2, and the sum stays inside its binade. NaN stays NaN, infinity becomes 6.
    """
    v.clamp_max_(MAX)
    if short:
        carrier = v.clamp_min(1.0)
    else:
        bits = v.view(torch.int32) & _EXPONENT_MASK
        carrier = bits.clamp_min_(_ONE_BITS).view(torch.float32)
    return v.add_(carrier, alpha=_CARRIER).sub_(carrier, alpha=_CARRIER)


def round_(
    v: Tensor,
    rounding: str,
    *,
    negative: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Round fp32 magnitudes `v` to the grid by any rounding of `profiles.ROUNDINGS`.

    `negative` (bool, shape of `v`) says which magnitudes belong to negative numbers; only
    `toward_minus_inf` needs it. `generator` feeds `stochastic`. Exact for every fp32 value. `v` is
    overwritten: use what is returned. Raises ValueError for an unknown rounding or a missing
    `negative`.
    """
    if rounding == "half_even":
        return round_to_nearest_(v)
    if rounding == "half_away":
        # Cutting v to 16 bits cannot carry it across a tie (ties have 3 significant bits); then a
        # low bit, set everywhere, lifts the ties themselves and nothing else.
        v.view(torch.int32).bitwise_and_(SHORT_MASK).bitwise_or_(1)
        return round_to_nearest_(v)
    v.clamp_max_(MAX)
    step = (v.view(torch.int32) & _EXPONENT_MASK).clamp_min_(_ONE_BITS).view(torch.float32)
    step.mul_(0.5)
    r = v.div_(step)  # exact: step is a power of two
    if rounding == "half_down":
        r.sub_(0.5).ceil_().abs_()  # abs: the ceiling of -0.5 is -0
    elif rounding == "toward_zero":
        r.floor_()
    elif rounding == "toward_minus_inf":
        if negative is None:
            raise ValueError("toward_minus_inf needs the signs of the values")
        r.copy_(torch.where(negative, r.ceil(), r.floor()))
    elif rounding == "stochastic":
        low = r.floor()
        chance = torch.rand(r.shape, generator=generator, dtype=r.dtype, device=r.device)
        r = low.add_(chance < r.sub_(low))
    else:
        raise ValueError(f"unknown rounding {rounding!r}")
    return r.mul_(step)


def codes_from_grid(v: Tensor) -> Tensor:
    """Codes 0..7 (uint8) of fp32 magnitudes that lie on the grid; NaN gives code 0."""
    bits = (v.nan_to_num(0.0) * 2.0**-14).to(torch.float16).view(torch.int16)
    return (bits >> 9).to(torch.uint8)


@lru_cache(maxsize=8)
def _values(device: torch.device) -> Tensor:
    return torch.tensor(GRID + tuple(-g for g in GRID), dtype=torch.float32, device=device)


def values_from_codes(codes: Tensor) -> Tensor:
    """fp32 values of E2M1 codes 0..15 (uint8), -0 included; the shape of `codes`."""
    flat = codes.reshape(-1).to(torch.int32)
    return _values(codes.device).index_select(0, flat).view(codes.shape)
