"""What a run would do, without doing it: ``npu-qat train --dry-run``.

The model is built on the meta device, which has shapes and no data (``planning/model.py``). So the
plan of a 1.5-billion-parameter run takes seconds on a machine that could not hold it, and it is
made by the same ``plan_linears`` that the run itself carries out. What activations, other layouts
and other devices would need is another question: ``npu-qat plan``.

Counts are exact. The time of generation is an estimate by a simple model that is printed beside
it::

    seconds = 2 * parameters in matmuls * tokens / (measured flop/s of one matmul)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.config import NoiseConfig, RunConfig
from npu_qat.config.paths import layer_index
from npu_qat.planning.memory import Layout, Load, adapter_states, kv_cache
from npu_qat.planning.model import build_on_meta, read_architecture

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from npu_qat.layers.plan import PlannedLinear
    from npu_qat.planning.facts import ModelFacts

GSM8K_HUB_NAME = "openai/gsm8k"
GSM8K_SIZES = (7473, 1319)  # of the published dataset: training, test
PROBE_SECONDS = 0.2
# Rows of the probe's matmul: a small decode batch.
PROBE_ROWS = 64
# Elements in which a stage's noise is tried out for inertness.
NOISE_SAMPLE = 1 << 14
_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Group:
    """Linears that differ only in their decoder layer and in why they are left in 16 bits.

    ``pattern`` is their path with ``*`` for the layer; ``reasons`` counts why they are left.
    """

    pattern: str
    layers: tuple[int, ...]
    count: int
    example: PlannedLinear
    reasons: dict[str, int]


@dataclass(frozen=True)
class StagePlan:
    """A stage of the noise. ``changed`` is the share of norm elements (at weight 1) it changes."""

    first_step: int
    last_step: int
    sigma: float
    changed: float
    inert: bool


@dataclass(frozen=True)
class GenerationEstimate:
    """The measured rate behind the estimate, in flop/s, and tokens/s and seconds a step from it."""

    device: str
    flops: float
    tokens_per_second: float
    seconds_a_step: float


@dataclass(frozen=True)
class Plan:
    """Everything that ``--dry-run`` prints. Sizes in bytes. ``ascend_refusal``: why the run could
    not be exported for an Ascend 950, or None."""

    config: RunConfig
    model: str
    source: str
    groups: list[Group]
    ascend_refusal: str | None
    parameters: int
    quantized_parameters: int
    lora_parameters: int
    norms: int
    memory: dict[str, int]
    problems: tuple[int, int]
    problems_note: str
    steps: int
    stages: list[StagePlan]
    multipliers: list[tuple[int, dict[str, float]]]
    device: str
    estimate: GenerationEstimate | None


def build_plan(config: RunConfig) -> Plan:
    """Resolve the plan of a run.

    Raises:
        ValueError: what the run itself would refuse: an unknown model, an exclude pattern that
            matches nothing, layers that the model does not have, an invalid schedule, an engine
            that computes another model.
    """
    from npu_qat.deploy.engine_base import check_engine_base
    from npu_qat.deploy.export import ascend_refusal
    from npu_qat.layers.plan import plan_linears
    from npu_qat.noise.norms import find_rms_norms, select_norms
    from npu_qat.planning.facts import model_facts

    architecture, source = read_architecture(config.model)
    model = build_on_meta(architecture, config.model)
    linears = plan_linears(model, config.quant)
    problems, note = _problem_counts(config)
    steps = _steps(config, problems[0])
    norms = find_rms_norms(model) if config.noise.enabled else {}
    chosen = select_norms(model, norms, config.noise) if config.noise.enabled else {}
    device, reason = _device(config.run.device, config.run.backend)
    check_engine_base(config, config.run.device if device is None else device.type)
    facts = model_facts(model, architecture, linears, config)
    return Plan(
        config=config,
        model=f"{type(model).__name__}, {_architecture_in_words(architecture)}",
        source=source,
        groups=group_linears(linears),
        ascend_refusal=ascend_refusal(config.quant, linears),
        parameters=facts.parameters,
        quantized_parameters=facts.quantized_parameters,
        lora_parameters=facts.lora_parameters,
        norms=len(chosen),
        memory=_memory(facts, config),
        problems=problems,
        problems_note=note,
        steps=steps,
        stages=_stages(config, steps, problems[0], norms),
        multipliers=_multipliers(config, steps, norms, chosen),
        device=reason,
        estimate=_estimate(device, linears, config),
    )


# ---------------------------------------------------------------- the model


def group_linears(linears: Sequence[PlannedLinear]) -> list[Group]:
    """Linears of all layers with one name, one shape and one treatment as one row."""
    groups: dict[tuple[Any, ...], list[PlannedLinear]] = {}
    for linear in linears:
        key = (
            _pattern(linear),
            linear.in_features,
            linear.out_features,
            linear.mode,
            linear.storage,
        )
        groups.setdefault(key, []).append(linear)
    return [
        Group(
            pattern=key[0],
            layers=tuple(m.layer for m in members if m.layer is not None),
            count=len(members),
            example=members[0],
            reasons=dict(Counter(m.reason for m in members if m.reason)),
        )
        for key, members in groups.items()
    ]


def _pattern(linear: PlannedLinear) -> str:
    """The path with ``*`` for the layer index."""
    segments = linear.path.split(".")
    if linear.layer is not None:
        segments[segments.index(str(linear.layer))] = "*"
    return ".".join(segments)


def _architecture_in_words(architecture: Any) -> str:
    a = architecture
    heads = f"{a.num_attention_heads} heads"
    if getattr(a, "num_key_value_heads", None) not in (None, a.num_attention_heads):
        heads += f" ({a.num_key_value_heads} for keys and values)"
    return (
        f"{a.num_hidden_layers} layers, hidden {a.hidden_size}, "
        f"intermediate {getattr(a, 'intermediate_size', '?')}, {heads}, vocabulary {a.vocab_size}"
    )


# ---------------------------------------------------------------- counts


def _memory(facts: ModelFacts, config: RunConfig) -> dict[str, int]:
    """What stays on one device, whatever the sequences; ``npu-qat plan`` has the rest."""
    r = config.rollout
    rollout = Load(
        1, 1, 1, rollout_rows=r.batch_size, prompt=r.max_prompt_tokens, new_tokens=r.max_new_tokens
    )
    return {
        f"weights in {config.model.dtype}": facts.bytes_loaded,
        f"weights as stored ({_storage_in_words(config)})": facts.bytes_stored,
        **adapter_states(facts, Layout()),
        "KV cache of a rollout, at most": kv_cache(facts, rollout),
    }


def _storage_in_words(config: RunConfig) -> str:
    quant = config.quant
    if not quant.quantizes_weight:
        return "nothing is quantised"
    if quant.apply_during == "both":
        return quant.base_storage
    return f"{quant.base_storage}, and in 16 bits for the phase without quantisation"


def _problem_counts(config: RunConfig) -> tuple[tuple[int, int], str]:
    """(training, held-out) problems, and where the numbers come from."""
    from npu_qat.tasks import load_task

    task = config.task
    published = task.path in (None, GSM8K_HUB_NAME) and not Path(GSM8K_HUB_NAME).exists()
    if task.name == "gsm8k" and published:
        train, test = GSM8K_SIZES
        return (task.train_size or train, task.test_size or test), "sizes as published"
    loaded = load_task(task)
    return (len(loaded.train), len(loaded.test)), "counted"


def _steps(config: RunConfig, problems: int) -> int:
    from npu_qat.training.loop import total_steps

    return total_steps(config, problems)


# ---------------------------------------------------------------- noise


def _stages(config: RunConfig, steps: int, problems: int, norms: dict[str, Any]) -> list[StagePlan]:
    if not config.noise.enabled:
        return []
    from npu_qat.noise import LayerMultipliers, Schedule
    from npu_qat.noise.measurement import INERT_BELOW

    one_epoch = config.train.model_copy(update={"steps": None, "epochs": 1})
    per_epoch = (
        _steps(config.model_copy(update={"train": one_epoch}), problems)
        if config.noise.epoch_aware
        else None
    )
    schedule = Schedule(config.noise, steps, per_epoch)
    layers = {index for path in norms if (index := layer_index(path)) is not None}
    multipliers = LayerMultipliers(config.noise.layers, layers)
    plans = []
    for stage in schedule.stages():
        strongest = max(
            multipliers.multiplier(layer, stage.first_step, steps) for layer in (None, *layers)
        )
        changed = changed_fraction(stage.sigma * strongest, config.noise, config.model.dtype)
        inert = stage.sigma > 0 and changed < INERT_BELOW
        plans.append(StagePlan(stage.first_step, stage.last_step, stage.sigma, changed, inert))
    return plans


def _multipliers(
    config: RunConfig, steps: int, norms: dict[str, Any], chosen: dict[str, Any]
) -> list[tuple[int, dict[str, float]]]:
    """(first step, multiplier by layer) whenever the multipliers change; "other" is the final norm.

    Raises ``ValueError`` if they leave every chosen norm without noise.
    """
    if not (config.noise.enabled and config.noise.layers.enabled):
        return []
    from npu_qat.noise import LayerMultipliers

    layers = {index for path in norms if (index := layer_index(path)) is not None}
    table = LayerMultipliers(config.noise.layers, layers)
    hit = {layer_index(path) for path in chosen}
    inside = sorted(layer for layer in hit if layer is not None)
    order: list[int | None] = [*inside, *([None] if None in hit else [])]
    found: list[tuple[int, dict[str, float]]] = []
    for step in range(steps):
        now = {
            "other" if layer is None else str(layer): table.multiplier(layer, step, steps)
            for layer in order
        }
        if not found or found[-1][1] != now:
            found.append((step, now))
    if not any(value > 0.0 for _, now in found for value in now.values()):
        raise ValueError(
            "noise.layers: the multipliers of all norms that noise.target_modules and "
            "noise.exclude leave are 0, so there would be no noise"
        )
    return found


def changed_fraction(sigma: float, noise: NoiseConfig, model_dtype: str) -> float:
    """Share of norm weights equal to 1 that noise of ``sigma`` changes in the dtype that holds
    them. The run measures the same on the real weights."""
    import torch

    from npu_qat.layers.base_model import DTYPES

    dtype = torch.float32 if noise.norm_dtype == "fp32" else DTYPES[model_dtype]
    draw = torch.randn(NOISE_SAMPLE, generator=torch.Generator().manual_seed(0))
    return float(((1 + sigma * draw).to(dtype) != 1).float().mean())


# ---------------------------------------------------------------- time


def _device(name: str, backend: str) -> tuple[torch.device | None, str]:
    """The device of the run, or None and the reason why it is not here."""
    from npu_qat.backends import BackendUnavailable, select

    try:
        selection = select(name, backend)
    except BackendUnavailable as error:
        return None, str(error)
    return selection.device, selection.reason


def _estimate(
    device: torch.device | None, linears: Sequence[PlannedLinear], config: RunConfig
) -> GenerationEstimate | None:
    if device is None or config.train.method != "dapo":
        return None
    widest = max(
        (p for p in linears if p.layer is not None), key=lambda p: p.in_features * p.out_features
    )
    flops = measure_flops(device, config.model.dtype, widest.in_features, widest.out_features)
    # The output head counts: each token is one product with it.
    in_matmuls = sum(p.in_features * p.out_features for p in linears)
    rate = flops / (2 * in_matmuls)
    tokens = (
        config.dapo.generation_prompts
        * config.rollout.num_generations
        * config.rollout.max_new_tokens
    )
    return GenerationEstimate(device.type, flops, rate, tokens / rate)


def measure_flops(device: torch.device, dtype: str, width: int, height: int) -> float:
    """Floating-point operations a second of ``[64, width] @ [width, height]``."""
    import torch

    from npu_qat.layers.base_model import DTYPES

    x = torch.ones(PROBE_ROWS, width, dtype=DTYPES[dtype], device=device)
    w = torch.ones(width, height, dtype=DTYPES[dtype], device=device)
    (x @ w).sum().item()  # the first call sets things up
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < PROBE_SECONDS:
        (x @ w)[0, 0].item()  # waits for the device
        calls += 1
    return 2.0 * PROBE_ROWS * width * height * calls / elapsed


# ---------------------------------------------------------------- print


def print_plan(plan: Plan, console: Console) -> None:
    """Print a plan as tables."""
    config = plan.config
    console.print(f"model: {config.model.path}: {plan.model}", markup=False)
    console.print(f"  architecture {plan.source}; weights are not loaded", markup=False)
    console.print(f"device: {plan.device}", markup=False)
    console.print(f"\nlinear layers: {_recipe_in_words(config)}", markup=False, style="bold")
    console.print(_linears_table(plan))
    for reason, count in _reasons(plan).items():
        console.print(f"{count} left in 16 bits: {reason}", markup=False)
    if plan.ascend_refusal is None:
        console.print("export --format ascend: takes it")
    else:
        console.print(f"export --format ascend: refuses it: {plan.ascend_refusal}", markup=False)
    for title, table in _tables(plan):
        console.print(f"\n{title}", markup=False, style="bold")
        console.print(table)
    noisy = [stage for stage in plan.stages if stage.sigma > 0]
    if noisy and all(stage.inert for stage in noisy):
        console.print(
            "every noisy stage is inert on weights near 1; if the model's norms are no larger, the "
            "run will refuse to start (noise.norm_dtype: fp32 helps)"
        )
    if plan.estimate is not None:
        console.print(_estimate_text(plan), markup=False)
    console.print("\ndry run: nothing was trained or written")


def _tables(plan: Plan) -> Iterator[tuple[str, Table]]:
    """The tables behind that of the linears, each with its title."""
    yield "parameters and memory of one process (activations not counted)", _memory_table(plan)
    yield "run", _steps_table(plan)
    if plan.stages:
        noise = plan.config.noise
        holds = "fp32" if noise.norm_dtype == "fp32" else plan.config.model.dtype
        when = {"both": "rollout and training"}.get(noise.apply_during, noise.apply_during)
        yield f"noise on {plan.norms} RMSNorms held in {holds}, during {when}", _noise_table(plan)
    if plan.multipliers:
        yield "sigma times", _multiplier_table(plan)


def _recipe_in_words(config: RunConfig) -> str:
    quant = config.quant
    parts = []
    if quant.quantizes_weight:
        along = "in" if quant.block_axis == "row" else "out"
        parts.append(f"weights {quant.weight_profile} along '{along}', as {quant.base_storage}")
    if quant.quantizes_input:
        parts.append(f"inputs {quant.activation_profile}")
    if quant.quantizes_output:
        parts.append(f"outputs {quant.activation_profile}")
    return "; ".join(parts) or "nothing is quantised"


def _table(*columns: str) -> Table:
    """An open table; columns named with ``>`` are aligned on the right."""
    from rich.table import Table

    table = Table(
        box=None, pad_edge=False, show_header=any(column.strip(">") for column in columns)
    )
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
            no_wrap=column == "module",
        )
    return table


def _linears_table(plan: Plan) -> Table:
    table = _table("module", "layers", ">number", ">in x out", "mode")
    for group in plan.groups:
        e = group.example
        table.add_row(
            group.pattern,
            _ranges(group.layers) or "-",
            str(group.count),
            f"{e.in_features} x {e.out_features}",
            e.mode,
        )
    return table


def _reasons(plan: Plan) -> Counter[str]:
    """How many linears are left in 16 bits, by reason."""
    return sum((Counter(group.reasons) for group in plan.groups), Counter())


def _ranges(layers: Sequence[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans)


def _memory_table(plan: Plan) -> Table:
    table = _table("", ">")
    share = plan.quantized_parameters / plan.parameters
    table.add_row("parameters of the base model", f"{plan.parameters:,}")
    table.add_row("of these in 4-bit weights", f"{plan.quantized_parameters:,} ({share:.1%})")
    table.add_row("trained (LoRA)", f"{plan.lora_parameters:,}")
    for what, size in plan.memory.items():
        table.add_row(what, _size(size))
    return table


def _size(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"


def _steps_table(plan: Plan) -> Table:
    c = plan.config
    table = _table("", ">")
    table.add_row("task", c.task.name)
    train, test = plan.problems
    table.add_row(
        f"problems, training and held-out ({plan.problems_note})", f"{train:,} + {test:,}"
    )
    table.add_row("steps", f"{plan.steps:,}")
    if c.train.method == "dapo":
        per_update = c.dapo.prompts_per_rollout * c.rollout.num_generations
        sampled = c.dapo.generation_prompts * c.rollout.num_generations
        table.add_row("updates a step", str(c.dapo.updates_per_rollout))
        table.add_row("sequences sampled in a try", f"{sampled:,}")
        tries = c.dapo.max_generation_tries if c.dapo.dynamic_sampling else 1
        table.add_row("tries a step, at most", str(tries))
        table.add_row("sequences trained a step", f"{per_update:,}")
    else:
        table.add_row("sequences an update", str(c.sft.batch_size))
    evaluated = min(c.evaluation.problems or test, test)
    table.add_row("problems of each final evaluation", f"{evaluated:,}")
    table.add_row("baselines", ", ".join(c.evaluation.baselines) or "none")
    return table


def _noise_table(plan: Plan) -> Table:
    table = _table(">steps", ">sigma", ">norm elements changed (at weight 1)", "")
    for stage in plan.stages:
        table.add_row(
            f"{stage.first_step + 1}-{stage.last_step + 1}",
            f"{stage.sigma:.6g}",
            f"{stage.changed:.1%}" if stage.sigma else "-",
            "inert: below the resolution of the dtype" if stage.inert else "",
        )
    return table


def _multiplier_table(plan: Plan) -> Table:
    """Layers of one multiplier together, a row for each phase of the run."""
    table = _table(">from step", "multiplier: decoder layers")
    for first, multipliers in plan.multipliers:
        groups: dict[float, list[str]] = {}
        for name, value in multipliers.items():
            groups.setdefault(value, []).append(name)
        parts = []
        for value, names in sorted(groups.items()):
            layers = _ranges([int(name) for name in names if name != "other"])
            others = "norms outside of the layers" if "other" in names else ""
            parts.append(f"{value:.4g}: {', '.join(filter(None, (layers, others)))}")
        table.add_row(str(first + 1), "; ".join(parts))
    return table


def _estimate_text(plan: Plan) -> str:
    e = plan.estimate
    assert e is not None
    return (
        f"\ngeneration, estimated: at most {_duration(e.seconds_a_step)} a try, "
        f"if every completion reaches {plan.config.rollout.max_new_tokens} tokens\n"
        f"  = 2 x parameters in matmuls x tokens / {e.flops / 1e9:.1f} Gflop/s, measured on this "
        f"{e.device} with one {PROBE_ROWS}-row matmul ({e.tokens_per_second:,.0f} tokens/s).\n"
        "  Attention, quantisation, sampling and Python come on top; small models feel them most."
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
