"""Inputs on which a 4-bit kernel goes wrong if it goes wrong anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

# Distance of the block's maximum above an element's magnitude, in units of the 8th significant
# bit: on and beside every tie and threshold of the scale rules.
OFFSETS = (0, 1, 0x1F, 0x20, 0x3F, 0x40, 0x41, 0x60, 0x80, 0xA0, 0xE0, 0x120, 0x160, 0x1C0, 0x240)
FAR = 0x480  # nine binades
THRESHOLDS = (0x200000, 0x400000, 0x600000)  # mantissas of 1.25, 1.5, 1.75


def every_pattern(dtype: torch.dtype, block: int) -> Tensor:
    """Each of the 65,536 patterns of a 16-bit type under 16 maxima: blocks [N, block]."""
    unit = 1 if dtype == torch.bfloat16 else 8  # fp16 has three mantissa bits more
    group = block // 2 - 1  # magnitudes in a block, each with both signs
    magnitudes = torch.arange(1 << 15)
    magnitudes = torch.cat((magnitudes, magnitudes[-1:].expand(-len(magnitudes) % group)))
    magnitudes = magnitudes.view(-1, group)
    maxima = torch.tensor([*OFFSETS, FAR]) * unit + magnitudes[:, -1:]
    maxima = maxima.clamp_max(0x7FFF).unsqueeze(-1)
    elements = magnitudes.unsqueeze(1).expand(-1, maxima.shape[1], -1)
    blocks = torch.cat((maxima, elements, elements - (1 << 15), maxima - (1 << 15)), dim=-1)
    x = blocks.flatten(0, 1).to(torch.int16).view(dtype)
    assert len(set(x.view(torch.int16).flatten().tolist())) == 1 << 16
    return x


def every_fp32_exponent(block: int) -> Tensor:
    """fp32 maxima in every binade, with elements on and one ulp beside every tie: [N, block]."""
    mantissas = torch.tensor(
        [0, 1, 0x6E0000, 0x7FFFFF, *(t + by for t in THRESHOLDS for by in (-1, 0, 1))]
    )
    maxima = ((torch.arange(256) << 23).unsqueeze(1) + mantissas).to(torch.int32).view(-1, 1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ties = torch.cat((ties, 2 * ties)) / 4
    at = ((maxima & 0x7F800000).view(torch.float32) * ties).view(torch.int32)
    x = torch.cat((at - 1, at, at + 1), dim=-1)
    x = torch.cat((x, -0x80000000 + x), dim=-1)  # both signs: 84 elements
    x = x[:, : x.shape[1] // (block - 1) * (block - 1)].reshape(len(maxima), -1, block - 1)
    x = torch.cat((maxima[:, None].expand(-1, x.shape[1], -1), x), dim=-1)
    return x.flatten(0, 1).contiguous().view(torch.float32)


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
