"""The staircase of sigma: the published values, the corners, and no silent absence of noise."""

from __future__ import annotations

from itertools import pairwise

import pytest

from npu_qat.config import NoiseConfig
from npu_qat.noise.schedule import Schedule, Stage

# The published 29-step schedule, .05 -> .0005 in 10 stages: first step of a stage -> sigma.
PUBLISHED_29 = {
    0: 0.0,
    3: 0.05,
    6: 0.02812,
    9: 0.01581,
    12: 0.00889,
    15: 0.005,
    18: 0.00281,
    21: 0.00158,
    24: 0.00089,
    27: 0.0005,
}


def config(**changes: object) -> NoiseConfig:
    values = {"enabled": True, "sigma_start": 0.05, "sigma_end": 0.0005, **changes}
    return NoiseConfig.model_validate(values)


def test_published_29_step_table() -> None:
    schedule = Schedule(config(num_stages=10), 29)
    expected = 0.0
    for step in range(29):
        expected = PUBLISHED_29.get(step, expected)
        assert schedule.sigma(step) == pytest.approx(expected, abs=5.1e-6)
    assert [stage.first_step for stage in schedule.stages()] == list(PUBLISHED_29)


def test_first_and_last_sigma_are_exact() -> None:
    schedule = Schedule(config(sigma_start=0.01, sigma_end=0.0001), 100)
    assert schedule.sigma(9) == 0.0
    assert schedule.sigma(10) == 0.01
    assert schedule.sigma(99) == pytest.approx(0.0001, rel=1e-12)


def test_two_stages_are_one_clean_and_one_at_sigma_start() -> None:
    stages = Schedule(config(num_stages=2), 10).stages()
    assert stages == [Stage(0, 4, 0.0), Stage(5, 9, 0.05)]


def test_without_zero_first_stage_all_k_stages_have_noise() -> None:
    stages = Schedule(config(num_stages=3, zero_first_stage=False), 9).stages()
    assert [s.first_step for s in stages] == [0, 3, 6]
    assert [s.sigma for s in stages] == pytest.approx([0.05, 0.005, 0.0005])


def test_one_stage_without_zero_first_stage_is_constant() -> None:
    assert Schedule(config(num_stages=1, zero_first_stage=False), 7).stages() == [Stage(0, 6, 0.05)]


@pytest.mark.parametrize("total", [2, 3, 7, 29, 64, 116, 1000])
@pytest.mark.parametrize("num_stages", [2, 3, 10, 50])
@pytest.mark.parametrize("zero_first", [True, False])
def test_stages_cover_the_run_and_never_rise(total: int, num_stages: int, zero_first: bool) -> None:
    schedule = Schedule(config(num_stages=num_stages, zero_first_stage=zero_first), total)
    stages = schedule.stages()
    assert stages[0].first_step == 0
    assert stages[-1].last_step == total - 1
    for before, after in pairwise(stages):
        assert after.first_step == before.last_step + 1
    noisy = [s.sigma for s in stages if s.sigma > 0]
    assert noisy == sorted(noisy, reverse=True)
    assert (stages[0].sigma == 0.0) is zero_first


def test_epoch_aware_restarts_in_each_epoch() -> None:
    """Two epochs, .05 -> .005 and .005 -> .0005, each beginning with a clean stage."""
    schedule = Schedule(config(epoch_aware=True, stages_per_epoch=3), 18, steps_per_epoch=9)
    stages = schedule.stages()
    assert [s.first_step for s in stages] == [0, 3, 6, 9, 12, 15]
    assert [s.sigma for s in stages] == pytest.approx([0, 0.05, 0.005, 0, 0.005, 0.0005])


def test_epoch_aware_cuts_an_unfinished_last_epoch() -> None:
    schedule = Schedule(config(epoch_aware=True, stages_per_epoch=3), 14, steps_per_epoch=9)
    assert schedule.sigma(13) == pytest.approx(0.005)
    assert schedule.stages()[-1].last_step == 13


def test_epoch_aware_needs_the_length_of_an_epoch() -> None:
    with pytest.raises(ValueError, match="steps_per_epoch"):
        Schedule(config(epoch_aware=True), 18)


@pytest.mark.parametrize("step", [-1, 29])
def test_a_step_outside_of_the_run_is_an_error(step: int) -> None:
    with pytest.raises(ValueError, match="0 to 28"):
        Schedule(config(), 29).sigma(step)


def test_a_run_too_short_for_any_noise_is_an_error() -> None:
    with pytest.raises(ValueError, match="without noise"):
        Schedule(config(), 1)
    with pytest.raises(ValueError, match="without noise"):
        Schedule(config(epoch_aware=True), 4, steps_per_epoch=1)
