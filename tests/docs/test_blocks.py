"""Every block of the manual does what it says: run in order, or at least parsed (see blocks.py)."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from npu_qat.cli import build_parser, dry_run, main
from npu_qat.config import load_config, parse_overrides
from npu_qat.config.fields import known_keys
from npu_qat.config.load import preset_path
from tests.docs.blocks import (
    PROMISE,
    ROOT,
    Block,
    blocks,
    changed,
    needs_a_copy,
    pages,
    parse,
    program_calls,
)

BLOCKS = {page: blocks(page) for page in pages()}
BASH = [b for found in BLOCKS.values() for b in found if b.language in ("bash", "sh", "console")]
SECTIONS = {path[0] for path in known_keys() if path}
TINY_RUN = (
    *("task.train_size=64", "task.test_size=32", "evaluation.problems=32", "train.steps=2"),
    *("dapo.prompts_per_rollout=4", "dapo.generation_prompts=8", "dapo.max_generation_tries=1"),
    *("rollout.num_generations=4", "dapo.updates_per_rollout=1", "noise.num_stages=2"),
)


def place(block: Block) -> str:
    return block.place


# --- what is read of every block ------------------------------------------------------------------


def test_the_pages_have_blocks_in_known_languages() -> None:
    known = {"bash", "python", "yaml", "text", "json", "diff", "dockerfile", "ini", "cpp"}
    odd = [b.place for found in BLOCKS.values() for b in found if b.language not in known]
    assert odd == [], "name the language; ```bash for commands, ```text for output"


@pytest.mark.parametrize("block", BASH, ids=place)
def test_shell_commands_parse(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert block.language == "bash" and block.code.strip()
    for words in [] if needs_a_copy(block.page) else program_calls(block):
        problem = misuse(words)
        assert problem is None, f"{block.place}: npu-qat {' '.join(words)}: {problem}"


@pytest.mark.parametrize("block", BASH, ids=place)
def test_scripts_and_make_targets_of_commands_exist(block: Block) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in block.commands():
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if not words:
            continue
        if words[0] == "make":
            targets = [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)]
            assert all(re.search(rf"(?m)^{target}:", makefile) for target in targets), words
        first = words[1] if words[0] in ("python", "bash") and len(words) > 1 else words[0]
        if first.startswith(("scripts/", "./scripts/", ".ci/")):
            assert (ROOT / first).is_file(), f"{block.place}: there is no {first}"


@pytest.mark.parametrize(
    "block",
    [b for found in BLOCKS.values() for b in found if b.language == "python"],
    ids=place,
)
def test_python_compiles(block: Block) -> None:
    ast.parse(block.code, block.place)


def test_commands_are_not_hidden_in_blocks_of_output() -> None:
    command = re.compile(r"(?m)^\s*(\$ )?(npu-qat|torchrun|deepspeed|docker|make|pip|python) [\w-]")
    hidden = [
        b.place
        for found in BLOCKS.values()
        for b in found
        if b.language == "text" and b.title is None and command.search(b.code)
    ]
    assert hidden == [], "use ```bash, with <!-- not run: why --> before it if need be"


@pytest.mark.parametrize(
    "block",
    [b for found in BLOCKS.values() for b in found if b.language == "yaml"],
    ids=place,
)
def test_yaml_parses_and_configurations_load(block: Block, tmp_path: Path) -> None:
    documents = [d for d in yaml.safe_load_all(block.code) if d is not None]
    assert documents
    if isinstance(documents[0], dict) and documents[0] and set(documents[0]) <= SECTIONS:
        file = tmp_path / "run.yaml"
        file.write_text(block.code, encoding="utf-8")
        load_config(file, preset="demo")


# --- what is run ----------------------------------------------------------------------------------


def to_run(page: str, *, slow: bool) -> list[Block]:
    return [b for b in BLOCKS[page] if b.not_run is None and (slow or b.slow is None or b.title)]


def runnable(block: Block) -> bool:
    return block.language in ("bash", "python") and block.title is None


# README's blocks set up an environment first; tests/setup/test_readme.py runs the others.
RUN_HERE = [page for page in BLOCKS if page != "README.md"]
FAST = [page for page in RUN_HERE if any(runnable(b) for b in to_run(page, slow=False))]
COPY = [page for page in RUN_HERE if needs_a_copy(page)]
SLOW = [
    page
    for page in RUN_HERE
    if page not in COPY and any(b.slow is not None and runnable(b) for b in to_run(page, slow=True))
]


@pytest.mark.parametrize("page", FAST)
def test_the_blocks_run(page: str, workplace: Path) -> None:
    run_page(to_run(page, slow=False), workplace)


@pytest.mark.slow
@pytest.mark.parametrize("page", COPY)
def test_the_recipe_works_in_a_copy_of_the_repository(page: str, workplace: Path) -> None:
    for name in ("npu_qat", "tests", "scripts", "docs"):
        shutil.copytree(ROOT / name, name, ignore=shutil.ignore_patterns("__pycache__", "cells"))
    for name in ("pyproject.toml", "Makefile", "mkdocs.yml"):
        shutil.copy(ROOT / name, name)
    run_page(to_run(page, slow=True), workplace, copy=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW)
def test_the_blocks_run_with_the_slow_ones(
    page: str, workplace: Path, request: pytest.FixtureRequest
) -> None:
    chosen = to_run(page, slow=True)
    if any(block.needs_a_run for block in chosen):
        shutil.copytree(request.getfixturevalue("finished_run"), workplace / "runs" / "mine")
    run_page(chosen, workplace)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, with `npu-qat` and `python` on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, call in (("npu-qat", "-m npu_qat "), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call}"$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(dry_run, "PROBE_SECONDS", 0.001)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of the demo."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    settings = [word for key in TINY_RUN for word in ("--set", key)]
    assert main(["train", "--device", "cpu", "--output", str(folder), *settings]) == 0
    return folder


def run_page(chosen: list[Block], folder: Path, *, copy: bool = False) -> None:
    """Run blocks in order; Python blocks share their names.

    In a ``copy`` of the repository each runs in a process of its own, which imports the copy.
    """
    names: dict[str, Any] = {"__name__": "__page__"}
    if copy:
        os.environ["PYTHONPATH"] = str(folder)  # undone by the fixture's monkeypatch
    for block in chosen:
        if block.language == "diff":
            assert block.title is not None, block.place
            file = folder / block.title
            file.write_text(changed(file.read_text(encoding="utf-8"), block.code), encoding="utf-8")
        elif block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            run_python(block, None if copy else names)
        elif block.language == "bash":
            run_bash(block, in_shell=copy)


def run_python(block: Block, names: dict[str, Any] | None) -> None:
    """With ``names`` in this process, else in one of its own."""
    if names is None:
        done = subprocess.run([sys.executable, "-c", block.code], capture_output=True, text=True)
        assert done.returncode == 0, f"{block.place}\n{done.stderr[-3000:]}"
        printed = done.stdout.splitlines()
    else:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block.code, block.place, "exec"), names)
        printed = output.getvalue().splitlines()
    promised = PROMISE.findall(block.code)
    assert [line for line in printed if line in promised] == promised, f"{block.place}: {printed}"


def run_bash(block: Block, *, in_shell: bool = False) -> None:
    """In this process if the block calls npu-qat only, which saves its start; else in a shell."""
    calls = block.commands()
    plain = re.sub(r"(?m)\s#.*$", "", block.code)
    only_ours = all(words[0] == "npu-qat" for words in calls)
    if not in_shell and only_ours and not re.search(r"[|&;<>$`]", plain):
        for words in calls:
            assert exit_code(words[1:]) == 0, f"{block.place}: {' '.join(words)}"
        return
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{block.place}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def exit_code(words: list[str]) -> int | str | None:
    try:
        return main(words)
    except SystemExit as end:  # --help, --version, a mistake in the arguments
        return end.code


# --- what is known of a command without running it ------------------------------------------------


def misuse(words: list[str]) -> str | None:
    """What is wrong with the arguments of an npu-qat call, or None."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
            args = build_parser().parse_args(words)
    except SystemExit as end:
        return None if end.code == 0 else said.getvalue().strip().splitlines()[-1]
    preset = getattr(args, "preset", None)
    try:
        if preset is not None:
            preset_path(preset)
        overrides = parse_overrides(getattr(args, "overrides", []))
    except ValueError as error:
        return str(error)
    free = {path for path, key in known_keys().items() if "mapping" in key.kind}
    for override in overrides:
        starts = {override.path[:n] for n in range(1, len(override.path))}
        if override.path not in known_keys() and not starts & free:
            return f"there is no key {'.'.join(override.path)}"
    return None


# --- that these tests can fail --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("train --nonsense", "unrecognized"),
        ("train --preset no-such", "there is no preset"),
        ("train --set train.learning_rate=1", "there is no key"),
        ("train --set train.lr", "expected key=value"),
        ("frobnicate", "invalid choice"),
    ],
)
def test_a_wrong_call_is_found(call: str, problem: str) -> None:
    assert problem in str(misuse(call.split()))


@pytest.mark.parametrize(
    "call",
    ["--help", "train --preset demo", "train x.yaml --set rollout.engine_options.seed=1"],
)
def test_a_right_call_passes(call: str) -> None:
    assert misuse(call.split()) is None


def test_marks_titles_and_launchers_are_read() -> None:
    text = (
        "<!-- not run: needs an NPU -->\n```bash\nA=1 torchrun -m npu_qat train x | tee y\n```\n"
        '<!-- slow: trains -->\n\n```python title="a/b.py"\nx = 1\n```\n'
        "- item\n\n    ```bash\n    npu-qat doctor && npu-qat bench linear \\\n"
        "      --quick\n    ```\n"
    )
    first, second, third = parse(text, "page.md")
    assert first.not_run == "needs an NPU" and list(program_calls(first)) == [["train", "x"]]
    assert second.title == "a/b.py" and second.slow == "trains" and second.not_run is None
    assert list(program_calls(third)) == [["doctor"], ["bench", "linear", "--quick"]]
    assert third.not_run is None and third.slow is None


def test_a_diff_changes_what_it_shows_and_nothing_else() -> None:
    assert changed("a\nb\nc\n", " a\n-b\n+x\n+y\n c\n") == "a\nx\ny\nc\n"
    for text in ("a\nc\n", "a\nb\na\nb\n"):
        with pytest.raises(ValueError, match="not once"):
            changed(text, " a\n-b\n")


def test_a_broken_promise_and_a_failing_command_fail(workplace: Path) -> None:
    (block,) = parse("```python\nprint(1)  # -> 2\n```\n", "page.md")
    with pytest.raises(AssertionError):
        run_python(block, {})
    for code in ("npu-qat config show --preset no-such", "false | true"):
        (block,) = parse(f"```bash\n{code}\n```\n", "page.md")
        with pytest.raises(AssertionError):
            run_bash(block)
