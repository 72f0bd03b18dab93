"""Every profile against the oracle: all 16-bit patterns, and a dense sweep of fp32.

For bf16 and fp16, each of the 65,536 patterns is the largest number of a block, and is an element
under 16 larger or equal maxima that lie on and beside every decision point. For fp32, each
exponent with mantissas around the rules' thresholds is a maximum, over elements on and one ulp
beside each rounding tie; then random bits, over the whole range and within a few binades.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics.compare import DTYPES, assert_as_oracle
from tests.numerics.oracle import FINITE_ONLY, MIDPOINTS, SPECS

# Distance of the block's maximum above an element's magnitude, in units of the 8th significant
# bit: 0x80 is a factor of two. Ties and thresholds are at 0x20, 0x40, 0x60 and one beside them.
OFFSETS = (0, 1, 0x1F, 0x20, 0x3F, 0x40, 0x41, 0x60, 0x80, 0xA0, 0xE0, 0x120, 0x160, 0x1C0, 0x240)
FAR = 0x480  # nine binades

# Two-level NVFP4 depends on the tensor scale: from the tensor, and given ones of several sizes.
TENSOR_SCALES: dict[str, tuple[float | None, ...]] = {"nvfp4": (None, 0.0012345, 3e-33, 1.7e30)}
RATIOS = (1.0, 0.9, -0.7, 0.3, -0.11, 0.002)


def check(x: Tensor, name: str) -> None:
    if name in FINITE_ONLY:
        x = torch.where(x.isfinite(), x, 0.0)
    for scale in TENSOR_SCALES.get(name, (None,)):
        assert_as_oracle(x, name, scale)


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65,536 numbers of a 16-bit float type."""
    return torch.arange(1 << 16).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SPECS)
def test_each_16_bit_pattern_as_the_maximum(name: str, dtype: str) -> None:
    x = patterns(DTYPES[dtype])
    check(torch.stack([x * ratio for ratio in RATIOS], dim=-1), name)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SPECS)
def test_each_16_bit_pattern_as_an_element_under_16_maxima(name: str, dtype: str) -> None:
    unit = 1 if dtype == "bf16" else 8  # fp16 has three mantissa bits more
    group = SPECS[name].block // 2 - 1  # magnitudes in a block, each with both signs
    magnitudes = torch.arange(1 << 15)
    magnitudes = torch.cat((magnitudes, magnitudes[-1:].expand(-len(magnitudes) % group)))
    magnitudes = magnitudes.view(-1, group)
    maxima = torch.tensor([*OFFSETS, FAR]) * unit + magnitudes[:, -1:]
    maxima = maxima.clamp_max(0x7FFF).unsqueeze(-1)
    elements = magnitudes.unsqueeze(1).expand(-1, maxima.shape[1], -1)
    block = torch.cat((maxima, elements, elements - (1 << 15), maxima - (1 << 15)), dim=-1)
    x = block.flatten(0, 1).to(torch.int16).view(DTYPES[dtype])
    assert len(set(x.view(torch.int16).flatten().tolist())) == 1 << 16
    check(x, name)


@pytest.mark.parametrize("name", SPECS)
def test_fp32_exponent_sweep_on_and_beside_ties(name: str) -> None:
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
    sign = torch.tensor([1.0, -1.0]).repeat(22)
    check(x * sign, name)


@pytest.mark.parametrize("name", SPECS)
def test_fp32_random_bits(name: str) -> None:
    generator = torch.Generator().manual_seed(20)
    anywhere = torch.randint(-(1 << 31), (1 << 31) - 1, (2000, 64), generator=generator)
    top = torch.randint(6, 255, (4000, 1), generator=generator)
    down = torch.randint(0, 6, (4000, 64), generator=generator)
    mantissa = torch.randint(0, 1 << 23, (4000, 64), generator=generator)
    sign = torch.randint(0, 2, (4000, 64), generator=generator)
    near = ((top - down) << 23) + mantissa - (sign << 31)
    for pattern in (anywhere, near):
        check(pattern.to(torch.int32).view(torch.float32), name)
