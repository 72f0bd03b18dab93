"""``npu-qat bench``: what 4 bits cost on this machine, beside 16 bits in the same run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.cli.arguments import BACKENDS, DEVICES, HelpFormatter, examples
from npu_qat.cli.terminal import make_console, report_line

if TYPE_CHECKING:
    from npu_qat.bench.rows import Row

NAMES = ("fake-quant", "linear", "train-step", "decode", "dapo-step", "growth")
EXAMPLES = examples(
    "npu-qat bench all --quick                        # everything runs; times mean little",
    "npu-qat bench fake-quant --peers                 # beside other libraries, if installed",
    "npu-qat bench train-step --device cpu --json train-step.json",
    "npu-qat bench fake-quant --backend reference     # plain PyTorch instead of the kernels",
)


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "bench",
        help="measure what 4 bits cost on this machine",
        description="Measure quantisers, linears, training steps and decoding in turns with their "
        "16-bit baselines (a clone, the frozen linear, PEFT's LoRA, the 16-bit model) and print "
        "medians and ratios. On a GPU the shapes are those of Qwen2.5-1.5B, on a CPU those of "
        "the demo model; weights are random, nothing is downloaded.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="+", choices=(*NAMES, "all"), help="what to measure")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="default: auto")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write environment and rows")
    parser.add_argument("--peers", action="store_true", help="measure installed peers as well")
    parser.add_argument("--quick", action="store_true", help="small shapes, few samples")
    parser.add_argument(
        "--repeats", type=int, default=15, metavar="N", help="samples of each function (15)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``bench`` and return its exit code."""
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {args.repeats}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder does not exist")

    from npu_qat.bench.rows import write_json
    from npu_qat.bench.suite import environment, make_setup, measure

    setup = make_setup(
        args.device,
        args.backend,
        repeats=args.repeats,
        quick=args.quick,
        peers=args.peers,
        note=report_line,
    )
    console = make_console()
    console.print(f"device: {setup.selection.reason}", markup=False)
    names = list(NAMES) if "all" in args.what else list(dict.fromkeys(args.what))
    console.print(f"{'':58}{'median':>12}{'baseline':>12}{'ratio':>9}  bar")
    described = environment(setup, _command(args))
    rows: list[Row] = []

    def seen(row: Row) -> None:
        console.print(_line(row), markup=False, soft_wrap=True)
        rows.append(row)
        if args.json is not None:  # each time: a benchmark that is stopped has written what it has
            write_json(args.json, described, rows)

    measure(setup, names, seen)
    if args.json is not None:
        console.print(f"written: {args.json}", markup=False)
    return 0


def _line(row: Row) -> str:
    shown = [f"{x / 2**20:.2f} MiB" if row.unit == "bytes" else f"{x:.4g} ms" for x in _pair(row)]
    from npu_qat.bench.bars import verdict

    extra = f"  {verdict(row.name, row.ratio)}".rstrip()
    if "tokens_per_second" in row.details:
        extra += f"  {row.details['tokens_per_second']:.0f} tokens/s"
    return f"{row.name:58}{shown[0]:>12}{shown[1]:>12}{row.ratio:>9.3f}{extra}"


def _pair(row: Row) -> tuple[float, float]:
    return row.value, row.baseline


def _command(args: argparse.Namespace) -> str:
    """The command as it was given, without the file that it writes."""
    words = ["npu-qat", "bench", *args.what]
    words += [f"--device {args.device}"] if args.device != "auto" else []
    words += [f"--backend {args.backend}"] if args.backend != "auto" else []
    words += [f"--{name}" for name in ("peers", "quick") if getattr(args, name)]
    words += [f"--repeats {args.repeats}"] if args.repeats != 15 else []
    return " ".join(words)
