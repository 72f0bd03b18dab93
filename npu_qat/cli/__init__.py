"""The command line: ``npu-qat train``, ``evaluate``, ``export`` and so on, one file a command.

Each file has ``add_parser`` (what the command takes) and ``run`` (what it does, as an exit code).
Parsers are built without importing torch, pydantic or rich, so that ``--help`` answers at once;
``run`` imports what it needs.

Exit codes: 0 done; 1 ``doctor`` found something missing, ``validate`` something wrong, ``parity``
or ``serve-check`` a difference, ``healthcheck`` no life; 2 a mistake or a failure, explained in one
``error:`` line; 75 another process of the run is gone, ``--resume auto`` goes on; 130 stopped by
Ctrl-C. The environment variable ``NPU_QAT_DEBUG=1`` shows the traceback instead.

Under ``torchrun -m npu_qat ...`` and ``deepspeed --module npu_qat ...`` every process runs this
same code and only rank 0 prints.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from npu_qat.__about__ import __version__
from npu_qat.backends.npu_installation import prepare_process
from npu_qat.cli import (
    bench,
    config,
    doctor,
    evaluate,
    experiment,
    export,
    healthcheck,
    parity,
    plan,
    scan,
    serve_check,
    train,
    validate,
)
from npu_qat.cli.terminal import INTERRUPTED, end_failed_rank, report_error, report_line

COMMANDS = (
    train,
    evaluate,
    scan,
    experiment,
    export,
    validate,
    parity,
    serve_check,
    bench,
    plan,
    config,
    doctor,
    healthcheck,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors are printed, never raised."""
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(arguments)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    prepare_process()
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        report_line("stopped")
        return INTERRUPTED
    except BrokenPipeError:  # the reader, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return end_failed_rank(report_error(error))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="npu-qat",
        description="Train a language model so that it still works when an Ascend NPU runs it "
        "in 4 bits.",
        epilog="Run 'npu-qat COMMAND --help' for options and examples. Start with 'npu-qat train', "
        "which needs no network and no accelerator.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"npu-qat {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """``argv`` without the ``--local_rank N`` that the deepspeed launcher puts in front.

    The same number is in the environment (``LOCAL_RANK``), which is where it is read from.
    """
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not re.fullmatch(r"--local[_-]rank=\d+", word):
            kept.append(word)
    return kept
