"""``npu-qat evaluate``: accuracy with an interval, in the configured numbers, noise off."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from npu_qat.cli.arguments import (
    BACKENDS,
    DEVICES,
    HelpFormatter,
    add_config_arguments,
    examples,
    load_from,
)
from npu_qat.cli.terminal import make_console, rank

EXAMPLES = examples(
    "npu-qat evaluate runs/mine                          # the adapters of a run, all its arms",
    "npu-qat evaluate runs/mine --set evaluation.problems=200",
    "npu-qat evaluate --model demo --preset demo         # a model before training: BF16 and W4A4",
    "npu-qat evaluate --model path/to/model --adapter path/to/adapter --preset log-e13h",
)


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the accuracy of a run or of a model with an adapter",
        description="Answer the held-out problems greedily, in the configured quantisation and "
        "with noise off, and print the accuracy of each arm with its interval. Give a run "
        "directory, or a model.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_dir", nargs="?", metavar="RUN_DIR", help="directory of a run; brings its configuration"
    )
    parser.add_argument("--model", metavar="PATH", help="model.path, instead of a run directory")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format")
    add_config_arguments(parser, positional=False)
    parser.add_argument("--device", choices=DEVICES, help="same as --set run.device=...")
    parser.add_argument("--backend", choices=BACKENDS, help="same as --set run.backend=...")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``evaluate`` and return its exit code."""
    run_dir = _checked_run_dir(args)
    config_file = None if run_dir is None else str(run_dir / "config.yaml")
    options = {"run.device": args.device, "run.backend": args.backend, "model.path": args.model}
    given = {key: value for key, value in options.items() if value is not None}
    loaded = load_from(args, config=config_file, preset=args.preset, options=given)

    from npu_qat.experiments.run import evaluate

    console = make_console()
    console.quiet = console.quiet or args.json
    adapter = None if args.adapter is None else Path(args.adapter)
    result = evaluate(loaded.config, run_dir=run_dir, adapter=adapter, console=console)
    if rank() != 0:
        return 0
    if args.json:
        import json

        print(json.dumps(result, indent=2))
    else:
        _print(result)
    return 0


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    console = make_console()
    level = f"{result['confidence']:.0%}"
    table = Table(box=None, pad_edge=False)
    for column in ("arm", "problems", f"strict [{level} interval]", f"flexible [{level} interval]"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for name, arm in result["arms"].items():
        scores = [arm["strict"], arm["flexible"]]
        shown = [f"{s['mean']:.1%} ({s['low']:.1%} to {s['high']:.1%})" for s in scores]
        table.add_row(name, str(arm["n"]), *shown)
    console.print()
    console.print(table)
    for c in result["comparisons"]:
        console.print(
            f"{c['a']} - {c['b']}: {100 * c['difference']:+.1f} points "
            f"({100 * c['low']:+.1f} to {100 * c['high']:+.1f}), paired",
            markup=False,
        )


def _checked_run_dir(args: argparse.Namespace) -> Path | None:
    """The run directory, or None for ``--model``. Raises ``ValueError`` unless exactly one."""
    if (args.run_dir is None) == (args.model is None):
        raise ValueError("give either a run directory or --model PATH (--help has examples)")
    if args.run_dir is None:
        if args.adapter is not None and not Path(args.adapter).is_dir():
            raise ValueError(f"--adapter {args.adapter}: no such folder")
        return None
    for option, value in (("--adapter", args.adapter), ("--preset", args.preset)):
        if value is not None:
            raise ValueError(f"{option} goes with --model; a run directory brings its own")
    run_dir = Path(args.run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is no run directory: it has no config.yaml")
    return run_dir
