"""``npu-qat config``: show, validate, presets."""

from __future__ import annotations

import argparse
from typing import Any

from npu_qat.cli.arguments import HelpFormatter, add_config_arguments, examples, load_from
from npu_qat.cli.terminal import FAILED, make_console, report_line

SHOW_EXAMPLES = examples(
    "npu-qat config show                                  # every key with its default",
    "npu-qat config show --describe                       # ... and what it means",
    "npu-qat config show --preset log-e13h",
    "npu-qat config show my-run.yaml --set train.lr=1e-5 --format json",
)
VALIDATE_EXAMPLES = examples("npu-qat config validate my-run.yaml other.yaml")
PRESETS_EXAMPLES = examples("npu-qat config presets")
EXAMPLES = examples(
    "npu-qat config show --describe",
    "npu-qat config validate my-run.yaml",
    "npu-qat config presets",
)


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "config",
        help="show, check and list configurations",
        description="Show a resolved configuration, check files, list the presets.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=lambda args: parser.print_help() or 0)
    inner = parser.add_subparsers(title="commands", metavar="COMMAND")
    show = _add(inner, "show", "print a configuration with every key", SHOW_EXAMPLES, run_show)
    add_config_arguments(show)
    show.add_argument("--describe", action="store_true", help="say what each key means (YAML)")
    show.add_argument("--format", choices=("yaml", "json"), default="yaml")
    validate = _add(inner, "validate", "check YAML files", VALIDATE_EXAMPLES, run_validate)
    validate.add_argument("files", nargs="+", metavar="FILE")
    _add(inner, "presets", "list the shipped presets", PRESETS_EXAMPLES, run_presets)


def _add(commands: Any, name: str, purpose: str, epilog: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def run_show(args: argparse.Namespace) -> int:
    """Print one configuration; the output is itself a configuration file."""
    from npu_qat.config.dump import describe_yaml, dump_yaml, to_plain

    loaded = load_from(args, config=args.config, preset=args.preset)
    for note in loaded.notes:
        report_line(f"note: {note}")
    if args.format == "json":
        import json

        print(json.dumps(to_plain(loaded.config), indent=2))
    else:
        write = describe_yaml if args.describe else dump_yaml
        print(write(loaded.config), end="")
    return 0


def run_validate(args: argparse.Namespace) -> int:
    """Check each file; all of them are looked at, whatever is wrong with the first."""
    from npu_qat.config import ConfigError, load_run

    wrong = 0
    for file in args.files:
        try:
            loaded = load_run(file)
        except ConfigError as error:
            wrong += 1
            report_line(f"error: {error}")
            continue
        print(f"ok: {file}")
        for note in loaded.notes:
            print(f"  note: {note}")
    return FAILED if wrong else 0


def run_presets(args: argparse.Namespace) -> int:
    """List the presets with the first sentence of each."""
    from rich.table import Table

    from npu_qat.config.load import preset_names, preset_summary

    table = Table(box=None, pad_edge=False)
    table.add_column("preset", no_wrap=True)
    table.add_column("what it is")
    for name in preset_names():
        table.add_row(name, preset_summary(name))
    make_console().print(table)
    return 0
