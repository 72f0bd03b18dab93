"""The DAPO loss, token by token, against the formula written in plain Python."""

from __future__ import annotations

import math
import random

import pytest
import torch

from npu_qat.training.dapo import dapo_token_loss, group_advantages, tis_weight

LOW, HIGH = 0.2, 0.28


def oracle(
    logp: float,
    old: float,
    advantage: float,
    rollout: float,
    c: float | None = None,
    cap: float | None = None,
) -> tuple[float, float]:
    """(loss, d loss / d logp) of one token, by cases instead of minima."""
    ratio = math.exp(logp - old)
    loss, slope = -ratio * advantage, -ratio * advantage
    if advantage > 0 and ratio > 1 + HIGH:
        loss, slope = -(1 + HIGH) * advantage, 0.0
    if advantage < 0 and ratio < 1 - LOW:
        loss, slope = -(1 - LOW) * advantage, 0.0
    if c is not None and advantage < 0 and ratio > c:
        loss, slope = -c * advantage, 0.0
    weight = 1.0 if cap is None else min(math.exp(old - rollout), cap)
    return loss * weight, slope * weight


def tokens(count: int = 400) -> list[tuple[float, float, float, float]]:
    """(logp, old, advantage, rollout): ratios from 0.1 to 10, both signs, and zero advantage."""
    rng = random.Random(0)
    drawn = []
    for i in range(count):
        old = rng.uniform(-4, -0.1)
        ratio = math.exp(rng.uniform(-2.3, 2.3) if i % 2 else rng.uniform(-0.3, 0.3))
        advantage = 0.0 if i % 50 == 0 else rng.uniform(-2, 2)
        drawn.append((old + math.log(ratio), old, advantage, old + rng.uniform(-1.5, 1.5)))
    return drawn


@pytest.mark.parametrize("c", [None, 3.0])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_every_token_has_the_loss_and_the_slope_of_the_formula(
    c: float | None, cap: float | None
) -> None:
    drawn = tokens()
    logp, old, advantage, rollout = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*drawn, strict=True)
    )
    logp.requires_grad_(True)
    weight = None if cap is None else tis_weight(old, rollout, cap)
    losses = dapo_token_loss(
        logp[:, None],
        old[:, None],
        advantage[:, None],
        clip_low=LOW,
        clip_high=HIGH,
        clip_ratio_c=c,
        tis_weight=None if weight is None else weight[:, None],
    )
    (slopes,) = torch.autograd.grad(losses.sum(), logp)
    wanted = [oracle(*token, c=c, cap=cap) for token in drawn]
    torch.testing.assert_close(losses[:, 0].tolist(), [loss for loss, _ in wanted])
    torch.testing.assert_close(slopes.tolist(), [slope for _, slope in wanted])
    # The cases that the test is about did occur.
    ratios = [math.exp(new - old) for new, old, *_ in drawn]
    signs = [a for *_, a, _ in drawn]
    assert any(r > 1 + HIGH and a > 0 for r, a in zip(ratios, signs, strict=True))
    assert any(r < 1 - LOW and a < 0 for r, a in zip(ratios, signs, strict=True))
    assert any(r > 3 and a < 0 for r, a in zip(ratios, signs, strict=True))
    assert any(slope == 0.0 for _, slope in wanted)


def test_a_ratio_beyond_the_clip_on_the_harmless_side_is_not_clipped() -> None:
    """Clipping takes away gains, never losses: this is what makes it a lower bound."""
    old = torch.zeros(2, 1)
    logp = torch.tensor([[0.5], [2.0]]).log()
    losses = dapo_token_loss(logp, old, torch.tensor([[1.0], [-1.0]]), clip_low=LOW, clip_high=HIGH)
    torch.testing.assert_close(losses, torch.tensor([[-0.5], [2.0]]))


def test_the_upper_clip_is_higher_than_the_lower_one_is_low() -> None:
    logp = torch.tensor([[1.25]]).log()
    loss = dapo_token_loss(logp, torch.zeros(1, 1), torch.ones(1, 1), clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(loss, torch.tensor([[-1.25]]))
    loss = dapo_token_loss(logp, torch.zeros(1, 1), torch.ones(1, 1), clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(loss, torch.tensor([[-1.2]]))


def test_the_importance_weight_is_capped_and_carries_no_gradient() -> None:
    old = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    rollout = torch.tensor([[-1.0, -3.0, -0.5]])
    weight = tis_weight(old, rollout, 2.0)
    torch.testing.assert_close(weight, torch.tensor([[1.0, 2.0, math.exp(-0.5)]]))
    assert not weight.requires_grad


def test_old_log_probabilities_get_no_gradient_through_the_weight() -> None:
    """With one update old is logp.detach(): the ratio is 1 and its slope is that of logp."""
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old = logp.detach()
    weight = tis_weight(old, torch.tensor([[-1.5, -1.0]]), 2.0)
    loss = dapo_token_loss(
        logp, old, torch.tensor([[0.7]]), clip_low=LOW, clip_high=HIGH, tis_weight=weight
    )
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(slope, -0.7 * weight)


# --- advantages -----------------------------------------------------------------------------


def test_advantages_are_relative_to_the_group() -> None:
    # mean 0.25, unbiased deviation 0.5
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx(
        [0.75 / 0.5001, *[-0.25 / 0.5001] * 3]
    )


@pytest.mark.parametrize("rewards", [[1.0] * 8, [0.0] * 8, [0.3]])
def test_equal_rewards_have_no_advantage(rewards: list[float]) -> None:
    assert group_advantages(rewards) == [0.0] * len(rewards)


def test_advantages_equal_the_tensor_formula() -> None:
    rng = random.Random(1)
    for _ in range(20):
        rewards = [rng.choice([0.0, 1.0]) + rng.uniform(-1, 0) for _ in range(8)]
        r = torch.tensor(rewards, dtype=torch.float64)
        wanted = (r - r.mean()) / (r.std() + 1e-4)
        assert group_advantages(rewards) == pytest.approx(wanted.tolist(), rel=1e-12)
