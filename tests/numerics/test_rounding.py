"""Element rounding beyond what the named profiles use: truncation, stochastic rounding."""

from __future__ import annotations

import pytest
import torch

from npu_qat.numerics import dequantize, fake_quant, get_profile, quantize
from npu_qat.numerics.e2m1 import (
    GRID,
    codes_from_grid,
    round_,
    round_to_nearest_,
    values_from_codes,
)

OCP = get_profile("ocp")


def all_quotients() -> torch.Tensor:
    """Every multiple of 1/256 from 0 to 8, and its fp32 neighbours."""
    v = torch.arange(8 * 256 + 1) / 256
    neighbours = [v.nextafter(torch.tensor(limit)) for limit in (-1.0, 9.0)]
    return torch.cat((v, *neighbours)).clamp_min(0)


def test_codes_and_values_are_inverse() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = values_from_codes(codes)
    assert torch.equal(values[:8], torch.tensor(GRID))
    assert torch.equal(values.signbit(), codes >= 8)
    assert torch.equal(codes_from_grid(values[:8]), codes[:8])


def test_truncation_is_the_largest_grid_point_not_above() -> None:
    v = all_quotients()
    got = round_(v.clone(), "toward_zero")
    grid = torch.tensor(GRID)
    want = torch.stack([grid[grid <= value].max() for value in v])
    assert torch.equal(got, want)


def test_truncation_through_a_profile_never_grows_a_number() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    y = fake_quant(x, OCP.with_rounding("toward_zero"))
    assert (y.abs() <= x.abs()).all() and ((y == 0) | (y.sign() == x.sign())).all()


def test_the_short_path_rounds_16_bit_numbers_like_the_general_one() -> None:
    v = all_quotients().bfloat16().float()
    assert torch.equal(round_to_nearest_(v.clone(), short=True), round_to_nearest_(v.clone()))


def test_rounding_downwards_needs_signs_and_names_must_exist() -> None:
    with pytest.raises(ValueError, match="signs"):
        round_(torch.ones(2), "toward_minus_inf")
    with pytest.raises(ValueError, match="unknown rounding"):
        round_(torch.ones(2), "nearest")
    with pytest.raises(ValueError, match="unknown rounding"):
        OCP.with_rounding("nearest")  # type: ignore[arg-type]


def stochastic(x: torch.Tensor, seed: int) -> torch.Tensor:
    profile = OCP.with_rounding("stochastic")
    return fake_quant(x, profile, generator=torch.Generator().manual_seed(seed))


def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour() -> None:
    values = torch.tensor([0.1, 0.25, 0.7, 1.2, 1.75, 2.1, 3.3, 5.5])
    x = torch.cat((values.repeat(20000, 1), torch.full((20000, 1), 6.0)), dim=1)
    y = stochastic(x, 1)[:, :-1]
    grid = torch.tensor(GRID)
    low = torch.stack([grid[grid <= value].max() for value in values])
    high = torch.stack([grid[grid >= value].min() for value in values])
    assert ((y == low) | (y == high)).all()
    spread = (high - low) / 2 / 20000**0.5  # standard error of the mean, at most
    assert ((y.mean(0) - values).abs() < 5 * spread).all()


def test_stochastic_rounding_keeps_grid_points_and_saturates() -> None:
    x = torch.tensor([6.0, 4.0, -3.0, 2.0, 1.5, -1.0, 0.5, 0.0, 7.5])
    for seed in range(20):
        assert torch.equal(stochastic(x, seed), x.clamp(-6, 6))


def test_stochastic_rounding_depends_on_its_generator_alone() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    profile = OCP.with_rounding("stochastic")
    state = torch.random.get_rng_state()
    assert torch.equal(stochastic(x, 3), stochastic(x, 3))
    assert not torch.equal(stochastic(x, 3), stochastic(x, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    q = quantize(x, profile, generator=torch.Generator().manual_seed(3))
    assert torch.equal(dequantize(q), stochastic(x, 3))
