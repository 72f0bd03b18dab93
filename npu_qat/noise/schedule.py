"""How strong the noise is at each step: a staircase that falls exponentially.

A run of ``T`` steps is cut into ``K = num_stages`` intervals of ``T / K`` steps, and step ``t``
(counted from 0) lies in interval ``i = floor(t K / T)``. The noise is constant inside an interval.

``zero_first_stage: true``, the published code (QeRL ``trl_trainer/noise_scheduler.py``): interval
0 has no noise, so that the first updates see the model as it is. The other ``K - 1`` intervals
fall from ``sigma_start`` to ``sigma_end``, both included::

    sigma = 0                                                   i = 0
    sigma = sigma_start (sigma_end / sigma_start)^((i-1)/(K-2)) i = 1 .. K-1

``zero_first_stage: false``, the formula of the paper (arXiv 2510.11696)::

    sigma = sigma_start (sigma_end / sigma_start)^(i/(K-1))     i = 0 .. K-1

One noisy stage leaves an exponent of 0/0, which the published code turns into NaN or into no noise
at all. Here such a schedule has one value and it is ``sigma_start``: ``num_stages: 2`` with the
zero first stage, ``num_stages: 1`` without it. ``num_stages: 1`` with it has no noise and is
refused by the configuration.

``epoch_aware: true`` (the earlier experiments' "option C") divides the decay at epoch boundaries:
of ``E`` epochs, epoch ``e`` falls from ``sigma_start r^(e/E)`` to ``sigma_start r^((e+1)/E)`` with
``r = sigma_end / sigma_start``, in ``stages_per_epoch`` stages by the same rule, each epoch with
its own zero first stage. An unfinished last epoch runs the first part of its stages.

The interval is found in integers, so no step is lost to the rounding of ``T / K``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from npu_qat.config import NoiseConfig


@dataclass(frozen=True)
class Stage:
    """Steps ``first_step`` to ``last_step`` (from 0, both included) with one ``sigma``."""

    first_step: int
    last_step: int
    sigma: float


class Schedule:
    """Sigma of every step of a run.

    Args:
        config: the noise section; ``enabled`` is not looked at.
        total_steps: steps of the whole run (a step is a rollout with its updates).
        steps_per_epoch: needed if ``config.epoch_aware``.

    Raises ``ValueError`` for a run so short that every step falls in a stage without noise.
    """

    def __init__(
        self, config: NoiseConfig, total_steps: int, steps_per_epoch: int | None = None
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be 1 or more, not {total_steps}")
        if config.epoch_aware and not steps_per_epoch:
            raise ValueError(
                "noise.epoch_aware: true needs the number of steps in an epoch; "
                "pass steps_per_epoch, or set noise.epoch_aware: false"
            )
        self.config = config
        self.total_steps = total_steps
        self._period = steps_per_epoch if config.epoch_aware and steps_per_epoch else total_steps
        self._trends = self._build_trends()
        if not any(stage.sigma > 0.0 for stage in self.stages()):
            raise ValueError(
                f"all {total_steps} steps of this run fall in a stage without noise; "
                "use more steps, or noise.zero_first_stage: false"
            )

    def sigma(self, step: int) -> float:
        """Sigma of ``step``, counted from 0. Raises ``ValueError`` outside of the run."""
        if not 0 <= step < self.total_steps:
            raise ValueError(
                f"step {step} is outside of the schedule's {self.total_steps} steps, "
                f"0 to {self.total_steps - 1}"
            )
        epoch, step_in_epoch = divmod(step, self._period)
        trend = self._trends[epoch]
        return trend[step_in_epoch * len(trend) // self._period]

    def stages(self) -> list[Stage]:
        """The runs of steps with equal sigma, in order; they cover the run without gaps.

        A run with fewer steps than stages has no stage of zero steps: those are left out.
        """
        stages: list[Stage] = []
        for step in range(self.total_steps):
            sigma = self.sigma(step)
            if stages and stages[-1].sigma == sigma:
                stages[-1] = Stage(stages[-1].first_step, step, sigma)
            else:
                stages.append(Stage(step, step, sigma))
        return stages

    def _build_trends(self) -> list[list[float]]:
        """Sigmas of the intervals, one list for each epoch (one list if not epoch-aware)."""
        c = self.config
        epochs = -(-self.total_steps // self._period)
        stages = c.stages_per_epoch if c.epoch_aware else c.num_stages
        bounds = _exponential(c.sigma_start, c.sigma_end, epochs + 1)
        return [
            _intervals(start, end, stages, c.zero_first_stage) for start, end in pairwise(bounds)
        ]


def _intervals(start: float, end: float, count: int, zero_first: bool) -> list[float]:
    """Sigmas of ``count`` intervals, the first of them 0 if ``zero_first``."""
    if zero_first:
        return [0.0, *_exponential(start, end, count - 1)]
    return _exponential(start, end, count)


def _exponential(start: float, end: float, count: int) -> list[float]:
    """``count`` values in geometric progression from ``start`` to ``end``; one value: ``start``."""
    if count <= 1:
        return [start] * count
    return [start * (end / start) ** (i / (count - 1)) for i in range(count)]
