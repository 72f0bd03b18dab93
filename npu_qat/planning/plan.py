"""From a model, devices and a configuration to layouts: what fits, how fast, which one to take.

A layout is a ZeRO stage, a storage of the base, and gradient checkpointing or not. For each the
largest rollout batch and the largest micro-batch that fit are found (both grow memory, so bisection
finds them), then the time of a step; a packed base is also tried with rollout batches that are
small enough for the kernel that reads packed weights. The layout to take is the fastest one that
fits; without the figures for times, the one with the largest micro-batch, and of equals the
simplest: the first in the order of stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from npu_qat.config import Recipe, RunConfig
from npu_qat.planning.efficiency import Calibration, Error
from npu_qat.planning.facts import ModelFacts, model_facts
from npu_qat.planning.hardware import Hardware
from npu_qat.planning.memory import (
    GIB,
    REDUCE_BUCKET,
    Layout,
    Load,
    Memory,
    predict_memory,
)
from npu_qat.planning.model import build_on_meta, known_models, read_architecture
from npu_qat.planning.steps import PACKED_ROWS, StepTime, predict_step

# Outside of the allocator: the context of the device, its libraries, buffers of collectives. An
# assumption, which --reserve-gib replaces.
RESERVE_GIB = 2.0
# The allocator's pool over the tensors in it, where no calibration has measured it: an assumption.
POOL = 1.05
# Room for the gradients of the adapters; DeepSpeed wants at least the largest tensor.
SMALLEST_BUCKET = 1_000_000


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of a completion, at most."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Candidate:
    """One layout.

    Attributes:
        layout, storage: what it is. If the 16-bit arms of the run alone stand in the way, they are
            left out of it.
        config: the configuration that realises it.
        load: the largest batches that fit; the smallest ones (1) if nothing fits.
        memory: of the device.
        needed: bytes with the allocator's pool and the reserve.
        fits: whether that is what the device has.
        time: of a step; None where a figure of the device is missing, another engine samples, or it
            does not fit.
    """

    layout: Layout
    storage: str
    config: RunConfig
    load: Load
    memory: Memory
    needed: float
    fits: bool
    time: StepTime | None

    @property
    def name(self) -> str:
        """For tables."""
        again = ", checkpointing" if self.layout.checkpointing else ""
        return f"ZeRO-{self.layout.zero}, {self.storage}{again}"

    def settings(self) -> list[str]:
        """What to give to ``--set``."""
        found = [
            f"quant.base_storage={self.storage}",
            f"model.gradient_checkpointing={str(self.layout.checkpointing).lower()}",
            f"deepspeed.zero_stage={self.layout.zero}",
            f"train.micro_batch_size={self.load.sequences}",
        ]
        if self.load.rollout_rows:
            found.append(f"rollout.batch_size={self.load.rollout_rows}")
        if self.load.evaluation_rows:
            found.append(f"evaluation.batch_size={self.load.evaluation_rows}")
        if self.layout.zero:
            bucket = f"{{zero_optimization: {{reduce_bucket_size: {self.layout.bucket}}}}}"
            found.append(f"deepspeed.overrides={bucket}")
        if self.layout.baseline == "none" and _baseline(self.config) != "none":
            kept = [name for name in self.config.evaluation.baselines if name == "ptq"]
            found.append(f"evaluation.baselines=[{', '.join(kept)}]")
        return found


@dataclass(frozen=True)
class ScalePlan:
    """All layouts of one question.

    Attributes:
        model, source: the model, and where its configuration came from.
        hardware, devices: on what.
        facts: counts of the model, in ``image`` storage.
        lengths: of the sequences.
        candidates: in the order of stages, storages, checkpointing.
        calibration: where the times come from; None: there are none.
    """

    model: str
    source: str
    hardware: Hardware
    devices: int
    facts: ModelFacts
    lengths: Lengths
    candidates: tuple[Candidate, ...]
    calibration: Calibration | None

    @property
    def best(self) -> Candidate | None:
        """The layout to take; None if nothing fits."""
        fitting = [c for c in self.candidates if c.fits]
        if not fitting:
            return None
        if any(c.time is not None for c in fitting):
            return min(fitting, key=lambda c: c.time.total if c.time else math.inf)
        return max(fitting, key=lambda c: c.load.sequences)

    def interval(self, time: StepTime) -> tuple[float, float]:
        """95 % prediction interval of a step, each part by the error of its kind."""
        low = high = 0.0
        for quantity, seconds in (
            ("update time", time.forward_backward + time.optimizer + time.communication),
            ("forward time", time.old_policy),
            ("prefill time", time.prefill),
            ("decoding time", time.decode),
        ):
            known = self.calibration.error(quantity) if self.calibration else None
            error = known or Error(0, 1.0, 1.0, 1.0)
            low, high = low + seconds * error.low, high + seconds * error.high
        return low, high

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``. Bytes and seconds."""
        return {
            "model": self.model,
            "source": self.source,
            "device": self.hardware.name,
            "evidence": self.hardware.evidence,
            "devices": self.devices,
            "parameters": self.facts.parameters,
            "lora_parameters": self.facts.lora_parameters,
            "prompt_tokens": self.lengths.prompt,
            "completion_tokens": self.lengths.completion,
            "calibration": None if self.calibration is None else self.calibration.as_dict(),
            "layouts": [self._candidate(c) for c in self.candidates],
            "best": None if self.best is None else self.best.name,
        }

    def _candidate(self, c: Candidate) -> dict[str, Any]:
        time = None
        if c.time is not None:
            low, high = self.interval(c.time)
            time = {
                **c.time.__dict__,
                "total": c.time.total,
                "low": low,
                "high": high,
                "generation_share": c.time.generation_share,
            }
        return {
            "name": c.name,
            "zero": c.layout.zero,
            "storage": c.storage,
            "checkpointing": c.layout.checkpointing,
            "fits": c.fits,
            "needed": c.needed,
            "peak": c.memory.peak,
            "peak_phase": c.memory.peak_phase,
            "phases": c.memory.phases,
            "micro_batch_size": c.load.sequences,
            "rollout_batch_size": c.load.rollout_rows,
            "seconds": time,
            "settings": c.settings(),
        }


def resolve_model(name: str) -> str:
    """The ``model.path`` that ``name`` stands for: a short name of a known model, or itself."""
    return known_models().get(name.lower(), name)


def make_plan(
    config: RunConfig,
    hardware: Hardware,
    devices: int,
    calibration: Calibration | None,
    *,
    lengths: Lengths | None = None,
    stages: Sequence[int] = (),
    storages: Sequence[str] = ("image", "packed"),
    reserve: float = RESERVE_GIB * GIB,
) -> ScalePlan:
    """Work out every layout of ``config`` on ``devices`` of ``hardware``.

    Args:
        config: the run; its storage, stage, checkpointing and batch sizes are what is varied, the
            batch sizes only downwards for rollouts.
        hardware: of one device.
        devices: processes, one a device.
        calibration: for times; None: memory alone.
        lengths: of prompts and completions; default: the limits of the configuration.
        stages: of ZeRO; default 0, and on several devices 2 and 3.
        storages: of the base.
        reserve: bytes that the allocator does not get.

    Raises:
        ValueError: the model cannot be found or is no decoder, the memory of the device is not
            known, a count is not positive, or the reserve is negative or no number.
    """
    if devices < 1:
        raise ValueError(f"--devices must be at least 1, not {devices}")
    if not 0 <= reserve < math.inf:
        raise ValueError(f"--reserve-gib must be 0 or more, and finite, not {reserve / GIB:g}")
    if hardware.memory is None:
        raise ValueError(
            f"no figure for the memory of {hardware.name} is known here; give --memory-gib"
        )
    architecture, source = read_architecture(config.model)
    model = build_on_meta(architecture, config.model)
    lengths = lengths or default_lengths(config)
    if lengths.completion < 1 or lengths.prompt < (config.train.method == "dapo"):
        raise ValueError(
            "--prompt-tokens and --completion-tokens must be at least 1 (prompts of sft: 0)"
        )
    facts: dict[tuple[str, bool], ModelFacts] = {}
    candidates = []
    for layout, storage in _layouts(config, hardware, devices, stages, storages):
        key = (storage, layout.zero == 3)
        if key not in facts:
            facts[key] = _facts(config, model, architecture, *key, hardware)
        given = (config, facts[key], storage, lengths, hardware, calibration, reserve)
        candidate = _fastest(layout, *given)
        if not candidate.fits and layout.baseline != "none":
            without = _fastest(replace(layout, baseline="none"), *given)
            candidate = without if without.fits else candidate
        candidates.append(candidate)
    return ScalePlan(
        model=type(model).__name__,
        source=source,
        hardware=hardware,
        devices=devices,
        facts=next(iter(facts.values())),
        lengths=lengths,
        candidates=tuple(candidates),
        calibration=calibration,
    )


def default_lengths(config: RunConfig) -> Lengths:
    """The limits of the configuration: no sequence is longer."""
    if config.train.method == "dapo":
        return Lengths(config.rollout.max_prompt_tokens, config.rollout.max_new_tokens)
    # SFT knows the sum only; the loss looks at the answer, which may be nearly all of it.
    return Lengths(0, config.sft.max_tokens)


def _layouts(
    config: RunConfig,
    hardware: Hardware,
    devices: int,
    stages: Sequence[int],
    storages: Sequence[str],
) -> Iterator[tuple[Layout, str]]:
    for zero in stages or ((0,) if devices == 1 else (0, 2, 3)):
        for storage in storages:
            if storage == "packed" and not _can_pack(config):
                continue
            for checkpointing in (False, True):
                yield (
                    Layout(
                        devices=devices,
                        zero=zero,
                        checkpointing=checkpointing,
                        fused=hardware.fused,
                        teacher=config.distill.weight > 0,
                        baseline=_baseline(config),
                        compensation=config.lora.init == "quantisation_error",
                    ),
                    storage,
                )


def _baseline(config: RunConfig) -> Literal["none", "evaluated", "trained"]:
    if "bf16_lora" in config.evaluation.baselines:
        return "trained"
    return "evaluated" if "bf16" in config.evaluation.baselines else "none"


def _can_pack(config: RunConfig) -> bool:
    return config.quant.quantizes_weight and config.quant.apply_during == "both"


def _facts(
    config: RunConfig,
    model: Any,
    architecture: Any,
    storage: str,
    sharded: bool,
    hardware: Hardware,
) -> ModelFacts:
    """Counts of the model as ``hardware`` keeps it. ``sharded``: by ZeRO-3."""
    from npu_qat.layers.plan import plan_linears

    recipe = config.quant.model_copy(update={"base_storage": storage})
    found = model_facts(model, architecture, plan_linears(model, recipe), config)
    if not _fuses(recipe, hardware):
        return found
    codes = recipe.model_copy(update={"base_storage": "packed", "apply_during": "both"})
    linears = [p for p in plan_linears(model, codes) if p.weight_profile is not None]
    beside = sum(p.bytes_stored for p in linears) if storage == "image" else 0
    # FP8 (``backends/cuda/fp8.py``): an fp32 scale a row, and beside an image the weight in E4M3.
    # ZeRO-3 frees a gathered weight after use, so there they are made again each time.
    if hardware.kind == "cuda" and not sharded:
        beside += sum(4 * p.out_features for p in linears)
        if storage == "image":
            beside += sum(p.in_features * p.out_features for p in linears)
    return replace(found, bytes_stored=found.bytes_stored + beside, bytes_beside=beside)


def _fuses(recipe: Recipe, hardware: Hardware) -> bool:
    """Whether the device multiplies codes and nothing in the recipe stands against it
    (``layers/matmul.py``); NVIDIA's devices do so on request (FP8)."""
    on_request = hardware.kind == "cuda" and recipe.matmul == "fused"
    asked = on_request or (hardware.multiplies_codes and recipe.matmul != "emulated")
    return (
        asked
        and recipe.injection_point == "both"
        and recipe.block_axis == "row"
        and (not recipe.rotates)
    )


def _fastest(layout: Layout, config: RunConfig, facts: ModelFacts, *given: Any) -> Candidate:
    """With all rollout rows that fit, or so few that a kernel reads packed weights as they are."""
    most = config.rollout.batch_size
    full = _candidate(layout, config, facts, *given, most_rows=most)
    if not facts.packed or most <= PACKED_ROWS:
        return full
    few = _candidate(layout, config, facts, *given, most_rows=PACKED_ROWS)
    if full.time is None or few.time is None:
        return full
    return min(full, few, key=lambda c: c.time.total if c.time else math.inf)


def _candidate(
    layout: Layout,
    config: RunConfig,
    facts: ModelFacts,
    storage: str,
    lengths: Lengths,
    hardware: Hardware,
    calibration: Calibration | None,
    reserve: float,
    *,
    most_rows: int,
) -> Candidate:
    assert hardware.memory is not None
    layout = replace(layout, bucket=_bucket(facts, layout))
    room = hardware.memory - reserve
    pool = POOL if calibration is None else calibration.efficiency.reserved

    def fits(micro: int, rows: int, evaluated: int) -> bool:
        load = _load(config, lengths, micro, rows, evaluated)
        return predict_memory(facts, layout, load).peak * pool <= room

    rows = 0
    if config.train.method == "dapo" and config.rollout.engine == "hf":
        sampled = _rollout_rows(config, layout.devices)
        rows = _largest(min(most_rows, sampled), lambda n: fits(1, n, 1))
        rows = _even(sampled, rows)
    evaluated = 0
    if config.evaluation.metric == "accuracy":
        # An evaluation of the quantised model needs what a rollout needs.
        most = min(config.evaluation.batch_size, rows or config.evaluation.batch_size)
        evaluated = _largest(most, lambda n: fits(1, rows, n))
    trained = _per_update(config, layout.devices)
    micro = _even(trained, _largest(trained, lambda n: fits(n, rows, evaluated)))
    load = _load(config, lengths, micro, rows, evaluated)
    found = predict_memory(facts, layout, load)
    needed = found.peak * pool + reserve
    possible = needed <= hardware.memory
    known = hardware.flops and hardware.bandwidth and (hardware.link or layout.devices == 1)
    time = None
    if calibration and layout.zero == 3 and calibration.efficiency.zero3_layer_seconds is None:
        known = False  # its hooks cost more than what they gather, and nobody measured them
    if config.train.method == "dapo" and not rows:
        known = False  # another engine samples, with times of its own
    if possible and known and calibration is not None:
        time = predict_step(facts, layout, load, config, hardware, calibration.efficiency)
    return Candidate(layout, storage, config, load, found, needed, possible, time)


def _bucket(facts: ModelFacts, layout: Layout) -> int:
    """A reduce bucket that the adapters' gradients just fill."""
    if layout.zero == 0:
        return REDUCE_BUCKET
    return min(REDUCE_BUCKET, max(SMALLEST_BUCKET, facts.lora_parameters))


def _largest(most: int, fits: Any) -> int:
    """The largest count from 1 to ``most`` that fits, by bisection; 1 if none does."""
    low, high = 1, max(most, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _even(total: int, size: int) -> int:
    """The smallest size of batches that makes no more of them out of ``total``."""
    return math.ceil(total / math.ceil(total / size))


def _load(config: RunConfig, lengths: Lengths, micro: int, rows: int, evaluated: int) -> Load:
    return Load(
        sequences=micro,
        tokens=lengths.prompt + lengths.completion,
        completion=lengths.completion,
        rollout_rows=rows,
        prompt=lengths.prompt,
        new_tokens=lengths.completion,
        evaluation_rows=evaluated,
    )


def _rollout_rows(config: RunConfig, devices: int) -> int:
    """Sequences that one device samples in a try."""
    d = config.dapo
    prompts = d.generation_prompts if d.dynamic_sampling else d.prompts_per_rollout
    return math.ceil(prompts / devices) * config.rollout.num_generations


def _per_update(config: RunConfig, devices: int) -> int:
    """Sequences of one update on one device: no micro-batch is larger."""
    if config.train.method != "dapo":
        return math.ceil(config.sft.batch_size / devices)
    d = config.dapo
    sequences = d.prompts_per_rollout * config.rollout.num_generations
    return math.ceil(sequences / d.updates_per_rollout / devices)


def write_plan(plan: ScalePlan, path: Path) -> None:
    """Write ``plan`` as JSON."""
    path.write_text(json.dumps(plan.as_dict(), indent=1) + "\n", encoding="utf-8")
