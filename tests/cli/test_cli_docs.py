"""Every command on the pages about the command line and the configuration works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from npu_qat.cli import build_parser, dry_run, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *(
        "docs/cli.md",
        "docs/experiments.md",
        "docs/configuration.md",
        "docs/training.md",
        "docs/performance.md",
    ),
    "docs/ascend.md",
    "docs/conformance.md",
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(language: str) -> list[str]:
    """The program's command lines in the blocks of ``language``, without comments."""
    lines = [
        line.split("#")[0].strip()
        for page in PAGES
        for found, body in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
        if found == language
        for line in body.splitlines()
    ]
    return [line for line in lines if line.startswith(("npu-qat ", "torchrun ", "deepspeed "))]


@pytest.mark.parametrize("line", dict.fromkeys(commands("bash")))
def test_commands_that_are_to_be_typed_succeed(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "PROBE_SECONDS", 0.001)
    try:
        code = main(line.split()[1:])
    except SystemExit as end:  # --help
        code = end.code
    assert code == 0


@pytest.mark.parametrize("line", commands("text"))
def test_commands_that_need_a_users_files_are_understood(line: str) -> None:
    words = re.split(r"\bnpu[-_]qat ", line)[1].split()
    assert callable(build_parser().parse_args(words).run)
