"""Inputs on which a 4-bit kernel goes wrong if it does anywhere: on and beside every decision.

One stock for the reference and all fast paths. Blocks run along the last dimension.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tests.numerics.oracle import MIDPOINTS

# Distance of the block's maximum above an element's magnitude, in units of the 8th significant
# bit: 0x80 is a factor of two. Ties and thresholds are at 0x20, 0x40, 0x60 and one beside them.
OFFSETS = (0, 1, 0x1F, 0x20, 0x3F, 0x40, 0x41, 0x60, 0x80, 0xA0, 0xE0, 0x120, 0x160, 0x1C0, 0x240)
FAR = 0x480  # nine binades

# Two-level NVFP4 depends on the tensor scale: from the tensor, and given ones of several sizes.
TENSOR_SCALES: dict[str, tuple[float | None, ...]] = {"nvfp4": (None, 0.0012345, 3e-33, 1.7e30)}
RATIOS = (0.9, -0.7, 0.3, -0.11, 0.002)


# --- 16 bits: every pattern -------------------------------------------------------------------


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65,536 numbers of a 16-bit float type."""
    return torch.arange(1 << 16).to(torch.int16).view(dtype)


def patterns_as_maximum(dtype: torch.dtype, ratios: Iterable[float] = RATIOS) -> Tensor:
    """[65536, 1 + ratios]: each 16-bit number with smaller neighbours, NaN and Inf among them."""
    x = patterns(dtype)
    return torch.stack([x, *(x * ratio for ratio in ratios)], dim=-1)


def patterns_under_maxima(dtype: torch.dtype, block: int) -> Tensor:
    """[.., block]: each 16-bit number as an element under 16 larger or equal maxima."""
    unit = 1 if dtype == torch.bfloat16 else 8  # fp16 has three mantissa bits more
    group = block // 2 - 1  # magnitudes in a block, each with both signs
    magnitudes = torch.arange(1 << 15)
    magnitudes = torch.cat((magnitudes, magnitudes[-1:].expand(-len(magnitudes) % group)))
    magnitudes = magnitudes.view(-1, group)
    maxima = torch.tensor([*OFFSETS, FAR]) * unit + magnitudes[:, -1:]
    maxima = maxima.clamp_max(0x7FFF).unsqueeze(-1)
    elements = magnitudes.unsqueeze(1).expand(-1, maxima.shape[1], -1)
    blocks = torch.cat((maxima, elements, elements - (1 << 15), maxima - (1 << 15)), dim=-1)
    x = blocks.flatten(0, 1).to(torch.int16)
    assert len(x.unique()) == 1 << 16
    return x.view(dtype)


def patterns_anywhere_under_maxima() -> Tensor:
    """[16, 65536] bf16: all patterns in order, with 1.5 * 2^k first in each block of 32, where k is
    the row's own: larger than most of them, or smaller."""
    rows = patterns(torch.bfloat16).view(-1, 32).repeat(16, 1, 1)
    rows[:, :, 0] = (1.5 * torch.exp2(torch.arange(-128.0, 128.0, 16.0)))[:, None]
    return rows.flatten(1)


def every_code_and_scale() -> tuple[Tensor, Tensor]:
    """Codes [256, 256] and scale bytes [256, 16]: row i holds all bytes of codes under scale i."""
    rows = torch.arange(256, dtype=torch.uint8)
    return rows.repeat(256, 1), rows[:, None].repeat(1, 16)


# --- fp32: every exponent ---------------------------------------------------------------------


def _beside_ties() -> tuple[Tensor, Tensor]:
    """Bits of fp32 maxima [N, 1] in every binade, with mantissas around the thresholds of the scale
    rules, and under each the elements [N, 42] on and one ulp beside every tie."""
    beside = [0, 1, 2, 0x7FFFFE, 0x7FFFFF, 0x6E0000, 0x700000]
    for threshold in (0x200000, 0x400000, 0x600000):  # 1.25, 1.5, 1.75
        beside += [threshold - 1, threshold, threshold + 1]
    maxima = ((torch.arange(256) << 23).unsqueeze(1) + torch.tensor(beside)).to(torch.int32)
    maxima = maxima.view(-1, 1)
    # Ties under the scale of the floor rule and of one binade more.
    ties = torch.tensor([*MIDPOINTS, *(2 * MIDPOINTS)]) / 4
    at = ((maxima & 0x7F800000).view(torch.float32) * ties.float()).view(torch.int32)
    return maxima, torch.cat((at - 1, at, at + 1), dim=-1)


def fp32_sweep() -> Tensor:
    """[.., 44]: a maximum, 21 elements beside ties, the maximum again, 21 more; signs alternate."""
    maxima, x = _beside_ties()
    x = torch.cat((maxima, x[:, :21], maxima, x[:, 21:]), dim=-1).view(torch.float32)
    return x * torch.tensor([1.0, -1.0]).repeat(22)


def fp32_blocks(block: int) -> Tensor:
    """[.., block]: the same elements with both signs, each block under its maximum."""
    maxima, x = _beside_ties()
    x = torch.cat((x, -0x80000000 + x), dim=-1)
    x = x[:, : x.shape[1] // (block - 1) * (block - 1)].reshape(len(maxima), -1, block - 1)
    x = torch.cat((maxima[:, None].expand(-1, x.shape[1], -1), x), dim=-1)
    return x.flatten(0, 1).contiguous().view(torch.float32)


def fp32_random_bits() -> tuple[Tensor, Tensor]:
    """Random patterns [.., 64] over the whole range, and within a few binades of each other."""
    generator = torch.Generator().manual_seed(20)
    anywhere = torch.randint(-(1 << 31), (1 << 31) - 1, (2000, 64), generator=generator)
    top = torch.randint(6, 255, (4000, 1), generator=generator)
    down = torch.randint(0, 6, (4000, 64), generator=generator)
    mantissa = torch.randint(0, 1 << 23, (4000, 64), generator=generator)
    sign = torch.randint(0, 2, (4000, 64), generator=generator)
    near = ((top - down) << 23) + mantissa - (sign << 31)
    return (
        anywhere.to(torch.int32).view(torch.float32),
        near.to(torch.int32).view(torch.float32),
    )


# --- any dtype and shape ----------------------------------------------------------------------


def anything(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A third random bits, a third Gaussian, a third tie-rich numbers; one row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, shape, generator=generator)
    gaussian = torch.randn(shape, generator=generator)
    ties = (torch.randn(shape, generator=generator) * 16).round() / 4
    third = (shape[0] + 2) // 3
    parts = (bits.to(torch.int32).view(torch.float32)[:third], gaussian[:third], ties[:third])
    x = torch.cat(parts)[: shape[0]].clone()
    x[-1] = 0.0
    return x.to(dtype)


def ordinary(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers whose blocks differ by many binades, with negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-10, 10, shape, generator=generator).float()
    x = (torch.randn(shape, generator=generator) * torch.exp2(exponents)).to(dtype)
    x.view(-1)[::7] = -0.0
    return x


def ties(dtype: torch.dtype) -> Tensor:
    """[.., 32]: all ties of E2M1 with both signs under a maximum of 6, in `dtype`'s binades."""
    lowest, highest = (-20, 12) if dtype == torch.float16 else (-120, 120)
    midpoints = torch.tensor(MIDPOINTS).float()
    block = torch.cat((midpoints, -midpoints, torch.zeros(17), torch.tensor([6.0])))
    return (block * torch.exp2(torch.arange(lowest, highest).float())[:, None]).to(dtype)


def special(dtype: torch.dtype) -> Tensor:
    """[12, 64]: NaN, infinities, zeros of both signs, subnormals, the largest numbers."""
    info = torch.finfo(dtype)
    heads = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, info.tiny, -info.tiny / 2]
    heads += [info.smallest_normal, info.max, info.min, 2.0**-14, 1.0]
    x = torch.zeros(len(heads), 64, dtype=dtype)
    x[:, 0] = torch.tensor(heads, dtype=dtype)
    x[:, 1::3] = -0.0
    x[:, 33] = 1.0  # the second block of each row is an ordinary one
    return x
