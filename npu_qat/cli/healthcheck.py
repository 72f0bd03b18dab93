"""``npu-qat healthcheck``: has the run in this container or pod shown a sign of life lately?"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

from npu_qat.cli.arguments import HelpFormatter, examples

EXAMPLES = examples(
    "npu-qat healthcheck --max-age 600",
    "npu-qat healthcheck --max-age 600 --file /tmp/npu-qat-heartbeat",
)


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "healthcheck",
        help="tell whether a run is alive, for a container's health check",
        description="Exit code 0 if the run touched its heartbeat file within --max-age seconds, "
        "else 1. A run touches the file that NPU_QAT_HEARTBEAT names between steps, in rollouts "
        "and in evaluations. Answers without loading torch.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max-age",
        type=_seconds,
        required=True,
        metavar="SECONDS",
        help="how old the last sign of life may be: longer than one batch of a rollout, of an "
        "evaluation, and than one update",
    )
    parser.add_argument("--file", metavar="PATH", help="default: what NPU_QAT_HEARTBEAT names")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``healthcheck`` and return its exit code."""
    from npu_qat.experiments.heartbeat import VARIABLE, age

    name = args.file or os.environ.get(VARIABLE)
    if not name:
        raise ValueError(
            f"no heartbeat file is named: set {VARIABLE} for the run and for this command, or "
            "add --file PATH"
        )
    seconds = age(Path(name))
    if seconds is None:
        print(f"no sign of life yet: {name} does not exist")
        return 1
    alive: bool = seconds <= args.max_age
    verdict = "alive" if alive else f"no sign of life within {args.max_age:g} s"
    print(f"{verdict}: the last one {seconds:.0f} s ago")
    return 0 if alive else 1


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is no positive number of seconds")
    return value
