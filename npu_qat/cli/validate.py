"""``npu-qat validate``: what a serving engine would load silently and should not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from npu_qat.cli.arguments import HelpFormatter, examples
from npu_qat.cli.terminal import make_console

FOUND = 1
EXAMPLES = examples(
    "npu-qat validate served",
    "npu-qat validate served --tensor-parallel 4",
    "npu-qat validate served --json",
)


def add_parser(commands: Any) -> None:
    """Add the command to the program's parser."""
    parser = commands.add_parser(
        "validate",
        help="examine a quantised checkpoint as strictly as its loader should",
        description="Compare every file, tensor, type, shape and value of a quantised checkpoint "
        "with its architecture and its description. Exit code 1 if there are findings.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", metavar="DIR", help="a checkpoint for Ascend or compressed-tensors"
    )
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="devices to be served on"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``validate``: 0 if all is well, 1 with findings."""
    if args.tensor_parallel < 1:
        raise ValueError("--tensor-parallel must be 1 or more")

    from dataclasses import asdict

    from npu_qat.deploy.validate import validate

    findings = validate(Path(args.folder), tensor_parallel=args.tensor_parallel)
    if args.json:
        import json

        content = {"folder": args.folder, "findings": [asdict(f) for f in findings]}
        print(json.dumps(content, indent=2))
    else:
        _print(args.folder, findings)
    return FOUND if findings else 0


def _print(folder: str, findings: list[Any]) -> None:
    console = make_console()
    if not findings:
        console.print(f"{folder}: no findings", markup=False)
    elif not console.is_terminal:
        for finding in findings:
            console.print(str(finding), markup=False, soft_wrap=True)
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{folder}: {len(findings)} findings", title_justify="left")
        for column in ("tensor or file", "problem", "fix"):
            table.add_column(column, overflow="fold")
        for f in findings:
            table.add_row(Text(f.tensor), Text(f.problem), Text(f.fix))
        console.print(table)
