"""Inputs on and beside every decision of a 4-bit format; for the reference and all fast paths."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.numerics.oracle import MIDPOINTS

# Distance of the block's maximum above an element's magnitude, in units of the 8th significant
# bit: 0x80 is a factor of two. Ties and thresholds are at 0x20, 0x40, 0x60 and one beside them.
OFFSETS = (0, 1, 0x1F, 0x20, 0x3F, 0x40, 0x41, 0x60, 0x80, 0xA0, 0xE0, 0x120, 0x160, 0x1C0, 0x240)
FAR = 0x480  # nine binades

# Two-level NVFP4 depends on the tensor scale: from the tensor, and given ones of several sizes.
TENSOR_SCALES: dict[str, tuple[float | None, ...]] = {"nvfp4": (None, 0.0012345, 3e-33, 1.7e30)}
RATIOS = (1.0, 0.9, -0.7, 0.3, -0.11, 0.002)


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65,536 numbers of a 16-bit float type."""
    return torch.arange(1 << 16).to(torch.int16).view(dtype)


def patterns_as_maximum(dtype: torch.dtype) -> Tensor:
    """[65536, 6]: each 16-bit number with smaller neighbours, NaN and Inf among them."""
    x = patterns(dtype)
    return torch.stack([x * ratio for ratio in RATIOS], dim=-1)


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
    return blocks.flatten(0, 1).to(torch.int16).view(dtype)


def fp32_sweep() -> Tensor:
    """[.., 44]: every exponent with mantissas around the thresholds, over elements beside ties."""
    beside = [0, 1, 2, 0x7FFFFE, 0x7FFFFF, 0x6E0000, 0x700000]
    for threshold in (0x200000, 0x400000, 0x600000):  # 1.25, 1.5, 1.75
        beside += [threshold - 1, threshold, threshold + 1]
    mantissas = torch.tensor(beside)
    maxima = ((torch.arange(256) << 23).unsqueeze(1) + mantissas).to(torch.int32).view(-1, 1)
    # Ties under the scale of the floor rule and of one binade more, and their fp32 neighbours.
    ties = torch.tensor([*MIDPOINTS, *(2 * MIDPOINTS)]) / 4
    unit = (maxima & 0x7F800000).view(torch.float32)
    at = (unit * ties.float()).view(torch.int32)
    x = torch.cat((maxima, at - 1, at, at + 1), dim=-1).view(torch.float32)
    x = torch.cat((x[:, :22], maxima.view(torch.float32), x[:, 22:]), dim=-1)
    return x * torch.tensor([1.0, -1.0]).repeat(22)


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
