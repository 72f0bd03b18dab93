"""AQN: Gaussian noise on the RMSNorm weights while a rollout is sampled, and none afterwards.

A quantized model explores little: rounding makes nearby policies equal. AQN (QeRL, arXiv
2510.11696) adds ``N(0, sigma^2)`` to the weights of the RMSNorms. A norm's weight multiplies the
input of the linears behind it, so ``w + z`` is multiplicative noise on a column of q, k and v (or
gate and up) at the price of one small vector. The 4-bit base stays as it is.

**When.** The noise is drawn once a step, in parameter space, and the weights stay constant until
the ``with`` block ends. Noise inside ``forward`` would be drawn again when gradient checkpointing
recomputes a layer: same loss, 10 % wrong gradients, no warning. For the same reason a backward
pass belongs in the same block as its forward pass.

**The same everywhere.** Each norm's draw is seeded by (seed, step, path of the norm), in fp32 on
the CPU. It does not depend on the rank, the device, the order of calls or how often a step is
repeated after a resume, and rollout and training of one step see the same noise.

**In which dtype.** The norms of real models lie near 1, where bf16 has a resolution of 1/128 above
and 1/256 below: a sigma of 5e-4 vanishes and of 1e-3 some 3 % survive. ``norm_dtype: fp32`` holds
the weights in fp32 (``norms.py``). With ``norm_dtype: model`` a stage in which fewer than 5 % of
the elements change is reported as inert, and if all noisy stages are, ``AQN.check`` refuses.

**Measured.** After each change the weights are read back and compared with the draw and with the
schedule (``measurement.py``). On exit the weights are restored and their digests compared with
those taken at the start. Earlier public code logged its sigma and changed no weight for months.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from npu_qat.config import NoiseConfig
from npu_qat.config.paths import layer_index
from npu_qat.noise.measurement import INERT_BELOW, SAMPLING_BOUND, Change, measure, verify
from npu_qat.noise.multipliers import LayerMultipliers
from npu_qat.noise.norms import (
    NoiseError,
    Norm,
    digest,
    find_rms_norms,
    on_cpu,
    take_norms,
    write,
)
from npu_qat.noise.schedule import Schedule, Stage

__all__ = ["AQN", "PHASES", "MultiplierCheck", "NoiseError", "NoiseRecord", "StageCheck"]

PHASES = ("rollout", "training", "evaluation")

# Norms whose weights carry noise now, over all AQN objects: noise never stacks.
_IN_USE: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class NoiseRecord:
    """What one ``applied`` block did to the weights, measured from the weights.

    Attributes:
        step, phase: the arguments of ``applied``.
        sigma: the schedule's sigma at this step; 0 if this block is clean.
        reason: why the block is clean, or "" if it has noise.
        norms_total: RMSNorms under control of the noise.
        norms_expected: those with a multiplier above 0 at this step.
        norms_changed: those of which at least one element differs from its clean value.
        elements_changed_fraction: share of differing elements, of the ``norms_expected``.
        sigma_realized: standard deviation of the differences, each divided by its multiplier.
        rms_expected, rms_realized: root mean square of the differences, multipliers included.
        inert: noise is on, but changes fewer than 5 % of the elements.
        norm_dtype: dtype that holds the weights, e.g. "float32".
    """

    step: int
    phase: str
    sigma: float
    reason: str
    norms_total: int
    norms_expected: int = 0
    norms_changed: int = 0
    elements_changed_fraction: float = 0.0
    sigma_realized: float = 0.0
    rms_expected: float = 0.0
    rms_realized: float = 0.0
    inert: bool = False
    norm_dtype: str = ""


@dataclass(frozen=True)
class StageCheck:
    """What a stage of the schedule does to the weights, found by a draw that is not kept."""

    first_step: int
    last_step: int
    sigma: float
    elements_changed_fraction: float = 0.0
    sigma_realized: float = 0.0
    inert: bool = False


@dataclass(frozen=True)
class MultiplierCheck:
    """Multipliers from ``first_step`` on, by decoder layer ("other": norms outside of the layers).

    ``measured`` is the root mean square of a draw's differences over sigma, and ``tolerance`` how
    far it may lie from ``expected``.
    """

    first_step: int
    expected: dict[str, float]
    measured: dict[str, float]
    tolerance: dict[str, float]

    @property
    def off(self) -> list[str]:
        """The layers whose noise is not what was asked for."""
        return [
            name
            for name, multiplier in self.expected.items()
            if abs(self.measured[name] - multiplier) > self.tolerance[name]
        ]


class AQN:
    """Adaptive quantization noise on the RMSNorms of ``model``.

    Make it after the base is frozen (and after PEFT has wrapped it) and before
    ``deepspeed.initialize``. With ``config.enabled`` false the model is not touched and every
    ``applied`` block is clean, so that callers need no branch of their own.

    Args:
        model: any module whose norms have a class name ending in ``RMSNorm`` and a 1-D ``weight``;
            the final norm and q_norm/k_norm count, the latter with their layer's multiplier.
        config: the ``noise`` section.
        total_steps: steps of the run.
        seed: seed of all draws.
        steps_per_epoch: needed if ``config.epoch_aware``.

    Raises:
        NoiseError: no RMSNorm is found or chosen, a norm's weight is trainable, partitioned or
            not loaded, or a pattern of the configuration selects nothing.
        ValueError: schedule or multipliers do not fit this run or this model.

    Example::

        aqn = AQN(model, config.noise, total_steps=29, seed=0)
        aqn.check()
        with aqn.applied(step, "rollout") as record:
            completions = generate(model, prompts)
    """

    def __init__(
        self,
        model: nn.Module,
        config: NoiseConfig,
        *,
        total_steps: int,
        seed: int,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.seed = seed
        self.norms: list[Norm] = []
        self.schedule: Schedule | None = None
        self._open = False
        if config.enabled:
            self.schedule = Schedule(config, total_steps, steps_per_epoch)
            indices = (layer_index(path) for path in find_rms_norms(model))
            layers = [index for index in indices if index is not None]
            self._multipliers = LayerMultipliers(config.layers, layers)
            self.norms = take_norms(model, config)
            self._refuse_silence()

    @property
    def active(self) -> bool:
        """Whether an ``applied`` block is open now, noisy or clean."""
        return self._open

    @contextmanager
    def applied(self, step: int, phase: str = "rollout") -> Iterator[NoiseRecord]:
        """Noise on the weights inside the ``with`` block; the exact clean weights after it.

        Args:
            step: step of the run, from 0.
            phase: "rollout", "training" or "evaluation" (which is always clean).

        Yields the measured ``NoiseRecord``. Raises ``NoiseError`` if another block is open, if
        the weights are not the clean ones on entry or after the restore, or if the measurement
        contradicts the draw. The weights are restored in any case, also after an exception.
        """
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, not {phase!r}")
        if self._open or any(norm.module in _IN_USE for norm in self.norms):
            raise NoiseError(
                f"applied({step}, {phase!r}) was called inside another applied() block, whose "
                "noise would still be on the weights; leave that block first"
            )
        self._open = True
        try:
            if reason := self._why_clean(step, phase):
                yield NoiseRecord(step, phase, 0.0, reason, len(self.norms))
            else:
                with self._noisy(step, phase) as record:
                    yield record
        finally:
            self._open = False

    def check(self) -> list[StageCheck]:
        """What each stage of the schedule does to these weights; nothing is changed.

        Call it before training. Raises ``NoiseError`` if every noisy stage is inert.
        """
        if self.schedule is None:
            return []
        checks = [self._check_stage(stage) for stage in self.schedule.stages()]
        noisy = [check for check in checks if check.sigma > 0.0]
        if all(check.inert for check in noisy):
            self._refuse_inert(max(noisy, key=lambda check: check.elements_changed_fraction))
        return checks

    def check_multipliers(self) -> list[MultiplierCheck]:
        """The multiplier of each decoder layer, as configured and as a draw realises it in the
        norms' dtype; one entry for each change in time. Nothing is changed."""
        found: list[MultiplierCheck] = []
        for step in range(self.total_steps if self.schedule is not None else 0):
            if not self.due(step):
                continue
            expected = {_layer_name(norm): self._multiplier(norm, step) for norm in self.norms}
            if not found or found[-1].expected != expected:
                found.append(self._check_multipliers(step, expected))
        return found

    def _check_multipliers(self, step: int, expected: dict[str, float]) -> MultiplierCheck:
        assert self.schedule is not None
        sigma = self.schedule.sigma(step)
        draw = list(zip(map(_layer_name, self.norms), self._draw(step), strict=True))
        measured, tolerance = {}, {}
        for name, multiplier in expected.items():
            changes = [change for layer, change in draw if layer == name]
            differences = torch.cat([change.difference for change in changes])
            bounds = torch.cat([change.rounding_bound for change in changes])
            measured[name] = float(differences.square().mean().sqrt()) / sigma
            # As in measurement.py: the scatter of a standard deviation, and rounding.
            tolerance[name] = SAMPLING_BOUND * multiplier / math.sqrt(2 * differences.numel())
            if multiplier > 0.0:
                tolerance[name] += float(bounds.square().mean().sqrt()) / sigma
        return MultiplierCheck(step, expected, measured, tolerance)

    def describe(self) -> dict[str, Any]:
        """What the audit keeps about the noise, in JSON types; runs ``check``."""
        if self.schedule is None:
            return {"enabled": False}
        return {
            "enabled": True,
            "apply_during": self.config.apply_during,
            "norm_dtype": self._dtype_name,
            "seed": self.seed,
            "norms": [norm.path for norm in self.norms],
            "multipliers": [asdict(check) for check in self.check_multipliers()],
            "elements": sum(norm.weight.numel() for norm in self.norms),
            "stages": [asdict(check) for check in self.check()],
        }

    @property
    def _dtype_name(self) -> str:
        dtypes = {str(norm.weight.dtype).removeprefix("torch.") for norm in self.norms}
        return "+".join(sorted(dtypes))

    def _why_clean(self, step: int, phase: str) -> str:
        """Why a block has no noise, or "" if it has."""
        if self.schedule is None:
            return "noise is not enabled"
        if phase == "evaluation":
            return "evaluation is always clean"
        if self.config.apply_during not in ("both", phase):
            return f"noise is applied during {self.config.apply_during} only"
        if self.schedule.sigma(step) == 0.0:
            return "the schedule's stage has no noise"
        if not self._multiplies(step):
            return "the multipliers of all norms are 0 at this step"
        return ""

    def due(self, step: int) -> bool:
        """Whether schedule and multipliers ask for noise at ``step``."""
        return (
            self.schedule is not None and self.schedule.sigma(step) > 0.0 and self._multiplies(step)
        )

    def _multiplier(self, norm: Norm, step: int) -> float:
        return self._multipliers.multiplier(norm.layer, step, self.total_steps)

    def _refuse_silence(self) -> None:
        """Noise that is switched on and never comes is the failure that this module is about."""
        if not any(self.due(step) for step in range(self.total_steps)):
            layers = sorted({_layer_name(norm) for norm in self.norms})
            raise NoiseError(
                "noise.enabled is true, but in every step the multipliers of all chosen norms are "
                f"0 (norms in layers {', '.join(layers)}); give one of these layers a multiplier "
                "above 0 in noise.layers, or change noise.target_modules and noise.exclude"
            )

    def _multiplies(self, step: int) -> bool:
        return any(self._multiplier(norm, step) > 0.0 for norm in self.norms)

    @contextmanager
    def _noisy(self, step: int, phase: str) -> Iterator[NoiseRecord]:
        modules = [norm.module for norm in self.norms]
        self._verify_clean("changed since AQN was made; make AQN after the weights are loaded")
        draw = self._draw(step)
        _IN_USE.update(modules)
        try:
            for norm, change in zip(self.norms, draw, strict=True):
                write(norm.weight, change.noisy)
            yield self._record(step, phase, draw)
        finally:
            for norm, change in zip(self.norms, draw, strict=True):
                write(norm.weight, change.clean)
            _IN_USE.difference_update(modules)
            self._verify_clean("is not what it was before the noise, although it was restored")

    def _verify_clean(self, what: str) -> None:
        for norm in self.norms:
            if digest(norm.weight) != norm.digest:
                raise NoiseError(f"the weight of norm {norm.path} {what}")

    def _draw(self, step: int) -> list[Change]:
        """The noise of ``step`` and the weights with it, for each norm; writes nothing."""
        assert self.schedule is not None
        sigma = self.schedule.sigma(step)
        changes = []
        for norm in self.norms:
            multiplier = self._multiplier(norm, step)
            clean = on_cpu(norm.weight)
            generator = torch.Generator().manual_seed(_noise_seed(self.seed, step, norm.path))
            unit = torch.randn(clean.shape, generator=generator, dtype=torch.float32)
            noise = unit * (sigma * multiplier)
            noisy = (clean.float() + noise).to(clean.dtype)
            changes.append(Change(norm.path, multiplier, clean, noise, noisy))
        return changes

    def _record(self, step: int, phase: str, draw: list[Change]) -> NoiseRecord:
        """Measure what the modules now hold and compare it with what was drawn."""
        assert self.schedule is not None
        sigma = self.schedule.sigma(step)
        found = [
            replace(change, noisy=on_cpu(norm.weight))
            for norm, change in zip(self.norms, draw, strict=True)
        ]
        measured = verify(step, sigma, draw, found)
        return NoiseRecord(
            step=step,
            phase=phase,
            sigma=sigma,
            reason="",
            norms_total=len(self.norms),
            norms_expected=measured.norms,
            norms_changed=measured.norms_changed,
            elements_changed_fraction=measured.changed_fraction,
            sigma_realized=measured.sigma,
            rms_expected=sigma * measured.rms_multiplier,
            rms_realized=measured.rms,
            inert=measured.inert,
            norm_dtype=self._dtype_name,
        )

    def _check_stage(self, stage: Stage) -> StageCheck:
        if stage.sigma == 0.0 or not self._multiplies(stage.first_step):
            return StageCheck(stage.first_step, stage.last_step, stage.sigma, inert=stage.sigma > 0)
        measured = measure(self._draw(stage.first_step))
        return StageCheck(
            **asdict(stage),
            elements_changed_fraction=measured.changed_fraction,
            sigma_realized=measured.sigma,
            inert=measured.inert,
        )

    def _refuse_inert(self, best: StageCheck) -> None:
        remedy = "raise noise.sigma_start"
        if self.config.norm_dtype == "model":
            remedy = "set noise.norm_dtype: fp32 (with rollout.engine: hf), or " + remedy
        raise NoiseError(
            f"every noisy stage is below the resolution of the norm weights ({self._dtype_name}): "
            f"the best one, sigma {best.sigma:g} at steps {best.first_step} to {best.last_step}, "
            f"changes {100 * best.elements_changed_fraction:.1f} % of the elements and "
            f"{100 * INERT_BELOW:.0f} % are needed; {remedy}"
        )


def _noise_seed(seed: int, step: int, path: str) -> int:
    """A 63-bit seed for one norm at one step: equal on every rank and device, at every call."""
    key = f"{seed}/{step}/{path}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def _layer_name(norm: Norm) -> str:
    """The decoder layer of a norm as a key; "other" for the final norm."""
    return "other" if norm.layer is None else str(norm.layer)
