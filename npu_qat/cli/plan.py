"""``npu-qat plan``: does it fit, how long is a step, which layout; before anything starts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.cli.arguments import HelpFormatter, add_config_arguments, examples, load_from
from npu_qat.cli.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from npu_qat.config import RunConfig
    from npu_qat.planning.efficiency import Calibration
    from npu_qat.planning.hardware import Hardware
    from npu_qat.planning.plan import Candidate, Lengths, ScalePlan
    from npu_qat.planning.steps import StepTime

GIB = 2**30
EXAMPLES = examples(
    "npu-qat plan --model qwen2.5-7b --devices 4 --soc h100",
    "npu-qat plan --model ./my-model --devices 8 --soc h200 --completion-tokens 400",
    "npu-qat plan --model qwen2.5-1.5b --soc ascend-950dt --tflops 400 --json plan.json",
    "npu-qat plan --preset log-e13h --soc h100 --set lora.r=64 --zero 0 --storage packed",
    "npu-qat plan --list",
)


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "plan",
        help="predict memory and step time of a model on devices",
        description="Predict, for each layout (ZeRO stage, storage of the base, gradient "
        "checkpointing), the memory of one device by part, the largest batches that fit and the "
        "time of a training step, and recommend one. From counts, formulas and measured "
        "efficiencies (docs/scaling.md); nothing is loaded or started.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a known shape (--list), a folder, a config.json or a hub name; short for model.path",
    )
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="devices (1)")
    parser.add_argument("--soc", metavar="NAME", help="the device (--list)")
    parser.add_argument("--memory-gib", type=float, metavar="X", help="memory of a device")
    parser.add_argument("--tflops", type=float, metavar="X", help="dense bf16 Tflop/s of a device")
    parser.add_argument("--bandwidth", type=float, metavar="X", help="GB/s of its memory")
    parser.add_argument("--link", type=float, metavar="X", help="GB/s between devices, one way")
    parser.add_argument(
        "--zero",
        type=int,
        choices=(0, 1, 2, 3),
        action="append",
        help="only this stage; repeat for more",
    )
    parser.add_argument("--storage", choices=("image", "packed"), help="only this storage")
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="of a prompt (rollout.max_prompt_tokens)"
    )
    parser.add_argument(
        "--completion-tokens", type=int, metavar="N", help="of a completion (the limit)"
    )
    parser.add_argument(
        "--reserve-gib", type=float, metavar="X", help="memory outside of the allocator (2)"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="efficiencies from a file of python -m npu_qat.planning.measure, made on --soc",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan")
    parser.add_argument("--list", action="store_true", help="known models and devices")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``plan`` and return its exit code: 0 also when nothing fits."""
    console = make_console()
    if args.list:
        _print_known(console)
        return 0
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder does not exist")
    from npu_qat.planning.plan import RESERVE_GIB, make_plan, write_plan

    hardware = _hardware(args)
    config = _config(args)
    plan = make_plan(
        config,
        hardware,
        args.devices,
        _calibration(args, hardware),
        lengths=_lengths(args, config),
        stages=tuple(args.zero or ()),
        storages=(args.storage,) if args.storage else ("image", "packed"),
        reserve=(RESERVE_GIB if args.reserve_gib is None else args.reserve_gib) * GIB,
    )
    print_plan(plan, console)
    if args.json is not None:
        write_plan(plan, args.json)
        console.print(f"written: {args.json}", markup=False)
    return 0


# ---------------------------------------------------------------- what is asked


def _hardware(args: argparse.Namespace) -> Hardware:
    from npu_qat.planning.hardware import HARDWARE, find_hardware

    if args.soc is None:
        raise ValueError(f"--soc is missing: the device, one of {', '.join(HARDWARE)}")
    return find_hardware(
        args.soc,
        memory_gib=args.memory_gib,
        tflops=args.tflops,
        bandwidth=args.bandwidth,
        link=args.link,
    )


def _config(args: argparse.Namespace) -> RunConfig:
    from npu_qat.planning.plan import resolve_model

    given = any((args.model, args.config, args.preset, args.overrides))
    if not given:
        raise ValueError("--model is missing: a known shape (--list), a folder or a hub name")
    options = {} if args.model is None else {"model.path": resolve_model(args.model)}
    return load_from(args, config=args.config, preset=args.preset, options=options).config


def _lengths(args: argparse.Namespace, config: RunConfig) -> Lengths:
    from npu_qat.planning.plan import Lengths, default_lengths

    found = default_lengths(config)
    return Lengths(
        found.prompt if args.prompt_tokens is None else args.prompt_tokens,
        found.completion if args.completion_tokens is None else args.completion_tokens,
    )


def _calibration(args: argparse.Namespace, hardware: Hardware) -> Calibration | None:
    from npu_qat.planning.efficiency import shipped_calibration

    if args.calibrate is None:
        return shipped_calibration()
    from npu_qat.planning.calibration import calibrate

    return calibrate(args.calibrate, hardware)


# ---------------------------------------------------------------- print


def print_plan(plan: ScalePlan, console: Console) -> None:
    """Print a plan as tables."""
    facts, hardware = plan.facts, plan.hardware
    console.print(
        f"model: {plan.model}, {facts.parameters:,} parameters, {facts.lora_parameters:,} in "
        f"adapters of rank {facts.rank}; {plan.source}",
        markup=False,
    )
    memory = hardware.memory or 0.0
    console.print(
        f"devices: {plan.devices} x {hardware.name}, {memory / GIB:.1f} GiB; {hardware.evidence}",
        markup=False,
    )
    console.print(
        f"sequences: prompts of {plan.lengths.prompt} and completions of "
        f"{plan.lengths.completion} tokens, all of them that long",
        markup=False,
    )
    console.print("\nlayouts, of one device", style="bold")
    console.print(_layouts_table(plan))
    _print_times(plan, console)
    best = plan.best
    if best is None:
        _print_nothing_fits(plan, console)
        return
    console.print(f"\nmemory of '{best.name}', GiB", style="bold", markup=False)
    console.print(_parts_table(best))
    if best.time is not None:
        console.print(f"\na step of '{best.name}'", style="bold", markup=False)
        console.print(_time_table(plan, best.time))
    console.print("\nto take it:", markup=False)
    for setting in best.settings():
        word = f'"{setting}"' if set(setting) & set(" []{}") else setting
        console.print(f"  --set {word}", markup=False, soft_wrap=True)
    if plan.facts.bytes_loaded > 0 and best.storage == "packed":
        console.print(
            f"each process reads the 16-bit base into the host's memory first: "
            f"{plan.facts.bytes_loaded / GIB:.0f} GiB a process",
            markup=False,
        )


def _print_times(plan: ScalePlan, console: Console) -> None:
    """Where times come from, or why there are none."""
    config = plan.candidates[0].config
    if config.train.method == "dapo" and config.rollout.engine != "hf":
        console.print(
            f"no times: rollout.engine {config.rollout.engine} has its own, and memory that is not "
            "in this plan",
            markup=False,
        )
        return
    missing = [o for o in plan.hardware.missing() if o != "--link" or plan.devices > 1]
    if missing:
        console.print(
            f"no times: no figure that we have read says them for {plan.hardware.name}; "
            f"give {', '.join(missing)}",
            markup=False,
        )
        return
    c = plan.calibration
    if c is None:
        console.print(
            "no times: this package comes with no calibration; make one with python -m "
            "npu_qat.planning.measure on such a device and give --calibrate",
            markup=False,
        )
        return
    unknown = " and ".join(
        [f"{s} storage" for s in ("image", "packed") if s not in c.storages] + ["other devices"]
    )
    console.print(
        f"times: efficiencies measured on {c.device} ({c.source}); other devices are assumed to "
        f"reach the same shares of their peaks; the intervals say nothing about {unknown}",
        markup=False,
    )


def _print_nothing_fits(plan: ScalePlan, console: Console) -> None:
    nearest = min(plan.candidates, key=lambda c: c.needed)
    phase = nearest.memory.peak_phase
    console.print(
        f"\nnothing fits. The nearest is '{nearest.name}': it needs {nearest.needed / GIB:.1f} GiB "
        f"in the phase '{phase}'",
        markup=False,
    )
    for part, size in nearest.memory.phases[phase].items():
        console.print(f"  {part}: {size / GIB:.2f} GiB", markup=False)
    if phase in ("load", "shard", "rollout"):
        console.print(
            "in this phase every device holds the whole base, so more devices do not help; packed "
            "storage, smaller batches or a device with more memory do",
            markup=False,
        )


def _table(*columns: str) -> Table:
    """An open table; the first column on the left, the others on the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold", no_wrap=i == 0)
    return table


def _layouts_table(plan: ScalePlan) -> Table:
    table = _table(
        "", "needs, GiB", "worst in", "rollout rows", "micro-batch", "s a step", "rollout"
    )
    for c in plan.candidates:
        shown = f"{c.needed / GIB:.1f}" + ("" if c.fits else ", too much")
        row = [c.name, shown, c.memory.peak_phase]
        if not c.fits:
            table.add_row(*row, "-", "-", "-", "-")
            continue
        row += [str(c.load.rollout_rows or "-"), str(c.load.sequences)]
        if c.time is None:
            table.add_row(*row, "?", "?")
            continue
        low, high = plan.interval(c.time)
        row.append(_with_interval(c.time.total, low, high))
        table.add_row(*row, f"{c.time.generation_share:.0%}")
    return table


def _parts_table(best: Candidate) -> Table:
    phases = best.memory.phases
    table = _table("", *phases)
    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    for part in parts:
        sizes = [phase.get(part) for phase in phases.values()]
        table.add_row(part, *("" if size is None else f"{size / GIB:.2f}" for size in sizes))
    table.add_row("sum", *(f"{best.memory.total(phase) / GIB:.2f}" for phase in phases))
    return table


def _time_table(plan: ScalePlan, time: StepTime) -> Table:
    table = _table("", "s", "share")
    for name, seconds in (
        ("rollout: prefill", time.prefill),
        (f"rollout: {time.decoding_steps:,} decoding steps", time.decode),
        ("log-probabilities of the old policy", time.old_policy),
        (f"forward and backward, {time.micro_batches:,} micro-batches", time.forward_backward),
        ("optimiser", time.optimizer),
        ("communication and ZeRO-3", time.communication),
    ):
        if seconds:
            table.add_row(name, _number(seconds), f"{seconds / time.total:.0%}")
    low, high = plan.interval(time)
    table.add_row("step", _with_interval(time.total, low, high), "")
    return table


def _with_interval(seconds: float, low: float, high: float) -> str:
    """A prediction and its interval, where the calibration has one."""
    if low == high:
        return _number(seconds)
    return f"{_number(seconds)} ({_number(low)} to {_number(high)})"


def _number(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _print_known(console: Console) -> None:
    from npu_qat.planning.hardware import HARDWARE
    from npu_qat.planning.model import known_models

    console.print("models (--model)", style="bold")
    for name, hub in known_models().items():
        console.print(f"  {name:20}{hub}", markup=False)
    console.print("devices (--soc)", style="bold")
    table = _table(
        "", "device", "GB", "bf16 Tflop/s", "fp8", "fp4", "GB/s", "link GB/s", "evidence"
    )
    for name, h in HARDWARE.items():
        figures = (h.memory, h.flops, h.flops_fp8, h.flops_fp4, h.bandwidth, h.link)
        units = (1e9, 1e12, 1e12, 1e12, 1e9, 1e9)
        shown = (
            "?" if f is None else f"{f / unit:.0f}" for f, unit in zip(figures, units, strict=True)
        )
        table.add_row(name, h.name, *shown, h.evidence)
    console.print(table)
