"""Rewards: the strict form earns, the soft overlong penalty follows its formula."""

from __future__ import annotations

import pytest

from npu_qat.tasks import Problem, accuracy_reward, flexible_reward, soft_overlong_penalty

PROBLEM = Problem("p", "How many?", "9*2=18\n#### 18", "18", 1)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (PROBLEM.solution, 1.0, 1.0),
        ("#### 18.0", 1.0, 1.0),
        ("it is 18", 0.0, 1.0),
        ("#### 18 or 19", 1.0, 0.0),
        ("#### 19", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_strict_and_flexible_rewards(text: str, strict: float, flexible: float) -> None:
    assert accuracy_reward(text, PROBLEM) == strict
    assert flexible_reward(text, PROBLEM) == flexible


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(1, 0.0), (768, 0.0), (769, -0.5 / 256), (896, -0.25), (1024, -0.5), (2000, -0.5)],
)
def test_overlong_penalty_of_the_published_runs(length: int, penalty: float) -> None:
    assert soft_overlong_penalty(length, 1024, 256, 0.5) == pytest.approx(penalty)


def test_no_buffer_means_no_penalty() -> None:
    assert soft_overlong_penalty(5000, 1024, 0) == 0.0


@pytest.mark.parametrize(("buffer", "factor"), [(-1, 1.0), (2000, 1.0), (10, -1.0)])
def test_impossible_penalties_are_refused(buffer: int, factor: float) -> None:
    with pytest.raises(ValueError, match="overlong"):
        soft_overlong_penalty(10, 1024, buffer, factor)
