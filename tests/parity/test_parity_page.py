"""docs/parity.md: its commands succeed, in their order, and its Python runs on their result."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from npu_qat.cli import build_parser, main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands(language: str) -> list[list[str]]:
    lines = [line for block in blocks(language) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("npu-qat ")]


def test_the_commands_succeed_and_the_python_block_runs_on_their_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [main(words) for words in commands("bash")] == [0, 0]
    assert "from codes to tokens" in Path("parity.html").read_text()
    (code,) = blocks("python")
    exec(compile(code, "docs/parity.md", "exec"), {})


def test_commands_that_need_a_users_files_are_understood() -> None:
    parsed = [build_parser().parse_args(words) for words in commands("text")]
    assert len(parsed) == 8 and all(callable(args.run) for args in parsed)
