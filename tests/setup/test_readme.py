"""README's commands exist and its Python runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for found, body in BLOCK.findall(text) if found == language]


def program_calls() -> list[str]:
    """The ``npu-qat`` lines of README that finish in seconds and need no file of the user's."""
    lines = [
        line.split("#")[0].strip()
        for body in blocks("README.md", "bash")
        for line in body.splitlines()
    ]
    return [line for line in lines if line.startswith("npu-qat") and "/path/to/" not in line]


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {
        target
        for code in [*blocks(page, "bash"), *re.findall(r"`(make [^`]+)`", text)]
        for words in re.findall(r"^make ([a-z -]+)", code, re.MULTILINE)
        for target in words.split()
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert named and not [t for t in named if not re.search(rf"(?m)^{t}:", makefile)]


def test_every_room_on_the_map_exists() -> None:
    rooms = re.findall(r"^\| `(npu_qat/\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rooms and [room for room in rooms if not (ROOT / room / "__init__.py").exists()] == []


def test_the_python_example_runs() -> None:
    (example,) = blocks("README.md", "python")
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", program_calls())
def test_the_program_calls_run(line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "npu_qat", *shlex.split(line)[1:]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
