"""Inputs on which a wrong kernel shows: every bf16 pattern, ties, special values, odd tails."""

from __future__ import annotations

import torch

ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def ordinary(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose blocks differ by many binades, with negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-10, 10, shape, generator=generator).float()
    x = (torch.randn(shape, generator=generator) * torch.exp2(exponents)).to(dtype)
    x.view(-1)[::7] = -0.0
    return x


def every_pattern_as_maximum() -> torch.Tensor:
    """[65536, 32] bf16: row i holds pattern i and fractions k / 32 of it with changing signs."""
    fractions = torch.arange(1, 32) / 32 * torch.where(torch.arange(31) % 2 == 0, 1.0, -1.0)
    others = (ALL_BF16.float()[:, None] * fractions).bfloat16()
    return torch.cat((ALL_BF16[:, None], others), dim=1).contiguous()


def every_pattern_as_element() -> torch.Tensor:
    """[16, 65536] bf16: all patterns in order, each row times another maximum in each block."""
    rows = []
    for exponent in range(-128, 128, 16):
        row = ALL_BF16.clone().view(-1, 32)
        row[:, 0] = 1.5 * 2.0**exponent
        rows.append(row.view(-1))
    return torch.stack(rows)


def ties(dtype: torch.dtype) -> torch.Tensor:
    """All ties of E2M1 with both signs under a maximum of 6, in the binades of `dtype`."""
    lowest, highest = (-20, 12) if dtype == torch.float16 else (-120, 120)
    block = torch.zeros(32)
    block[: len(TIES)] = torch.tensor(TIES)
    block[len(TIES) : 2 * len(TIES)] = -torch.tensor(TIES)
    block[-1] = 6.0
    scales = torch.exp2(torch.arange(lowest, highest).float())
    return (block * scales[:, None]).to(dtype)


def special(dtype: torch.dtype) -> torch.Tensor:
    """Blocks with NaN, infinities, zeros of both signs, subnormals, the largest numbers."""
    info = torch.finfo(dtype)
    heads = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, info.tiny, -info.tiny / 2]
    heads += [info.smallest_normal, info.max, info.min, 2.0**-14, 1.0]
    x = torch.zeros(len(heads), 64, dtype=dtype)
    x[:, 0] = torch.tensor(heads, dtype=dtype)
    x[:, 1::3] = -0.0
    x[:, 33] = 1.0  # the second block of each row is an ordinary one
    return x


def every_code_and_scale() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [256, 256] and scale bytes [256, 16]: row i holds all bytes of codes under scale i."""
    rows = torch.arange(256, dtype=torch.uint8)
    return rows.repeat(256, 1), rows[:, None].repeat(1, 16)


def rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> torch.Tensor:
    """As the reference models compute it: fp32 inside, rounded before the weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return gamma * normed.to(x.dtype)


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance of 16-bit floats of the same sign, in units of the last place."""
    return int((a.view(torch.int16).int() - b.view(torch.int16).int()).abs().max())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit, where a NaN is equal to any NaN."""
    assert a.shape == b.shape and a.dtype == b.dtype
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(bits)[~nan], b.view(bits)[~nan])
