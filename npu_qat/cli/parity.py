"""``npu-qat parity``: does the serving side compute what was trained?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.cli import parity_device
from npu_qat.cli.arguments import (
    BACKENDS,
    DEVICES,
    HelpFormatter,
    add_config_arguments,
    examples,
    load_from,
)
from npu_qat.cli.terminal import make_console

if TYPE_CHECKING:
    from npu_qat.backends import Selection
    from npu_qat.parity.levels import ParityReport
    from npu_qat.parity.recording import Recording
    from npu_qat.parity.training_side import TrainingSide

FAILED = 1
RUN = (
    "npu-qat parity run runs/mine --export served --html parity.html",
    "npu-qat parity run --model demo --export served        # quantised, not trained",
)
RECORD = ("npu-qat parity record runs/mine --output recording     # where it was trained",)
CHECK = ("npu-qat parity check recording --export served         # where it is served",)


def add_parser(commands: Any) -> None:
    """Add the command and its parts to the program's parser."""
    parser = commands.add_parser(
        "parity",
        help="compare what is served with what was trained, from codes to tokens",
        description="Compare an export with the training side at four levels: codes, layers, "
        "model, checkpoint. Exit code 1 if a level fails.",
        epilog=examples(*RUN, *RECORD, *CHECK),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    levels = parser.add_subparsers(title="parts", metavar="PART", required=True)
    for add in (_add_run, _add_record, _add_check, parity_device.add_parser):
        add(levels)


def _add_run(levels: Any) -> None:
    parser = _part(levels, "run", "record and check on this machine", RUN)
    _add_training_side(parser)
    parser.add_argument("--export", metavar="DIR", required=True, help="the exported folder")
    _add_outcome(parser)
    parser.set_defaults(run=run)


def _add_record(levels: Any) -> None:
    parser = _part(levels, "record", "write down what the training side computes", RECORD)
    _add_training_side(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder")
    parser.set_defaults(run=run_record)


def _add_check(levels: Any) -> None:
    what = "compare an export with a recording of another machine"
    parser = _part(levels, "check", what, CHECK)
    parser.add_argument("recording", metavar="RECORDING", help="what 'parity record' wrote")
    parser.add_argument("--export", metavar="DIR", required=True, help="the exported folder")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="default: %(default)s")
    _add_outcome(parser)
    parser.set_defaults(run=run_check)


def _part(levels: Any, name: str, what: str, lines: tuple[str, ...]) -> argparse.ArgumentParser:
    """The parser of one part of the command."""
    parser: argparse.ArgumentParser = levels.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=examples(*lines),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _add_training_side(parser: argparse.ArgumentParser) -> None:
    """The run or the model, and how much of it is looked at."""
    parser.add_argument(
        "run_dir", nargs="?", metavar="RUN", help="directory of a run; brings its configuration"
    )
    parser.add_argument("--model", metavar="PATH", help="model.path, instead of a run directory")
    parser.add_argument(
        "--adapter",
        choices=("keep", "none"),
        default="keep",
        help="none: the base alone, for an export with --adapter none (default: %(default)s)",
    )
    parser.add_argument(
        "--adapter-dir", metavar="DIR", help="an adapter in PEFT's format, instead of the run's"
    )
    add_config_arguments(parser, positional=False)
    parser.add_argument("--device", choices=DEVICES, help="same as --set run.device=...")
    parser.add_argument("--backend", choices=BACKENDS, help="same as --set run.backend=...")
    for option, default, what in (
        ("--prompts", 16, "problems of the task's test split"),
        ("--max-new-tokens", 48, "longest greedy completion"),
        ("--seeds", 3, "perturbations behind the noise floor"),
        ("--batch-size", 8, "rows that go through the model together"),
    ):
        parser.add_argument(
            option, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )


def _add_outcome(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", metavar="FILE", help="write the report as one HTML page")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Record and check in one go: 0 if no level failed, else 1."""
    side, recording, environment = _record(args)

    from npu_qat.parity.levels import check

    report = check(recording, Path(args.export), side.selection, side=side, environment=environment)
    return _finish(args, report)


def run_record(args: argparse.Namespace) -> int:
    """Write a recording."""
    _, recording, _ = _record(args)
    recording.save(Path(args.output))
    console = make_console()
    size = sum(t.numel() * t.element_size() for t in recording.tensors.values())
    console.print(
        f"{args.output}: {len(recording.content['linears'])} linears, "
        f"{len(recording.rows)} texts, {size / 2**20:.1f} MiB\n"
        f"base fingerprint {recording.content['base_fingerprint']}",
        markup=False,
        soft_wrap=True,
    )
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Check against a recording: 0 if no level failed, else 1."""
    from npu_qat.backends import select
    from npu_qat.parity.recording import Recording

    recording = Recording.load(Path(args.recording))
    selection = select(args.device, args.backend)

    from npu_qat.experiments.environment import describe_environment
    from npu_qat.parity.levels import check

    environment = describe_environment(selection)
    report = check(recording, Path(args.export), selection, environment=environment)
    return _finish(args, report)


def _record(args: argparse.Namespace) -> tuple[TrainingSide, Recording, dict[str, Any]]:
    side = training_side(args)

    from npu_qat.experiments.environment import describe_environment
    from npu_qat.parity.recording import Settings, record

    if min(args.prompts, args.max_new_tokens, args.seeds, args.batch_size) < 1:
        raise ValueError("--prompts, --max-new-tokens, --seeds and --batch-size must be 1 or more")
    environment = describe_environment(side.selection)
    settings = Settings(args.prompts, args.max_new_tokens, args.seeds, args.batch_size)
    return side, record(side, settings, environment), environment


def training_side(args: argparse.Namespace) -> TrainingSide:
    """The training side that ``RUN``, ``--model`` and ``--adapter`` name.

    Raises:
        ValueError: they do not fit together, or cannot be used.
    """
    run_dir = _checked_run_dir(args)
    config_file = None if run_dir is None else str(run_dir / "config.yaml")
    given = {"model.path": args.model, "run.device": args.device, "run.backend": args.backend}
    options = {key: value for key, value in given.items() if value is not None}
    config = load_from(args, config=config_file, preset=args.preset, options=options).config

    from npu_qat.deploy.run_source import trained_adapter, trained_base
    from npu_qat.parity.training_side import open_training

    adapter = None if args.adapter_dir is None else Path(args.adapter_dir)
    if run_dir is not None and adapter is None and args.adapter == "keep":
        adapter = trained_adapter(run_dir)
    base = None if run_dir is None else trained_base(run_dir)
    return open_training(config, adapter, _selection(config), base)


def _selection(config: Any) -> Selection:
    from npu_qat.backends import select

    return select(config.run.device, config.run.backend)


def _checked_run_dir(args: argparse.Namespace) -> Path | None:
    """The run directory, or None for ``--model``. Raises ``ValueError`` unless exactly one."""
    if (args.run_dir is None) == (args.model is None):
        raise ValueError("give either a run directory or --model PATH (--help has examples)")
    if args.adapter == "none" and args.adapter_dir is not None:
        raise ValueError("--adapter none contradicts --adapter-dir")
    if args.run_dir is None:
        return None
    if args.preset is not None:
        raise ValueError("--preset goes with --model; a run directory brings its own configuration")
    if any(text.startswith(("quant.", "model.", "task.")) for text in args.overrides):
        raise ValueError("--set model, quant or task goes with --model; a run keeps its own")
    run_dir = Path(args.run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is no run directory: it has no config.yaml")
    return run_dir


def _finish(args: argparse.Namespace, report: ParityReport) -> int:
    """Print and write the report; returns the exit code."""
    from npu_qat.parity.report import as_text, write_html

    if args.html is not None:
        write_html(report, Path(args.html))
    if args.json:
        import json

        print(json.dumps(report.as_dict(), indent=2))
    else:
        console = make_console()
        for line in as_text(report):
            console.print(line, markup=False, soft_wrap=True)
    return 0 if report.passed else FAILED
