"""The front door: a light start, examples that hold, errors in one line, exit codes."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from npu_qat import __version__
from npu_qat.cli import build_parser, doctor, main, without_local_rank

HEAVY = ["torch", "transformers", "deepspeed", "peft", "pydantic", "rich", "yaml", "numpy"]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


ALL = list(parsers(build_parser()))
EXAMPLES = [
    line.split("#")[0].strip()
    for parser in ALL
    for line in (parser.epilog or "").splitlines()
    if line.strip().startswith(("npu-qat ", "torchrun ", "deepspeed "))
]


def program_arguments(line: str) -> list[str]:
    """The arguments that npu-qat gets from a command line, launchers included."""
    words = shlex.split(line)
    start = next(i for i, word in enumerate(words) if word in ("npu-qat", "npu_qat"))
    return words[start + 1 :]


def loaded_after(code: str) -> list[str]:
    """Which heavy modules a fresh process has imported after ``code``."""
    script = f"{code}\nimport sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout.splitlines()[-1])


def test_help_and_version_load_nothing_heavy() -> None:
    code = """
from npu_qat.cli import main
for words in (["--help"], ["--version"], ["train", "--help"], ["config", "show", "--help"]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0
"""
    assert loaded_after(code) == []


def test_a_configuration_error_loads_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {lrr: 1}")
    code = f"""
from npu_qat.cli import main
assert main(["train", {str(file)!r}]) == 2
assert main(["train", {str(file)!r}, "--dry-run"]) == 2
assert main(["config", "validate", {str(file)!r}]) == 2
"""
    assert not set(loaded_after(code)) & {"torch", "transformers", "deepspeed", "peft", "numpy"}


@pytest.mark.parametrize("parser", ALL, ids=lambda parser: parser.prog)
def test_every_command_has_examples(parser: argparse.ArgumentParser) -> None:
    if parser.prog == "npu-qat":
        return
    assert parser.epilog is not None and parser.epilog.startswith("examples:\n  npu-qat ")


@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_is_understood(line: str) -> None:
    args = build_parser().parse_args(without_local_rank(program_arguments(line)))
    assert callable(args.run)


@pytest.mark.parametrize("parser", ALL, ids=lambda parser: parser.prog)
def test_help_fits_a_terminal_and_leaves_examples_whole(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    text, _, examples = parser.format_help().partition("examples:\n")
    # A choice list in braces is one word.
    assert [line for line in text.splitlines() if len(line) > 72 and "{" not in line] == []
    assert examples in (parser.epilog or "") + "\n"


def test_launchers_variables_that_are_no_numbers_hide_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"npu-qat {__version__}\n"


@pytest.mark.parametrize("words", [[], ["config"]])
def test_without_a_command_there_is_help(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    assert "usage: npu-qat" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["fly"], ["train", "--sett", "a=b"], ["train", "--dry"]])
def test_unknown_commands_and_abbreviated_options_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--local_rank=1", "train", "--dry-run"],
        ["--local_rank", "1", "train", "--dry-run"],
        ["train", "--dry-run", "--local-rank=0"],
    ],
)
def test_the_local_rank_of_launchers_is_taken_out(words: list[str]) -> None:
    assert without_local_rank(words) == ["train", "--dry-run"]


def test_other_arguments_are_left_alone() -> None:
    words = ["train", "--set", "run.output_dir=--local_rank", "x.yaml"]
    assert without_local_rank(words) == words


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[doctor.Check]:
        raise error

    monkeypatch.setattr(doctor, "examine", run)


def test_a_users_mistake_is_one_line_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(ValueError("no such folder"), monkeypatch)
    assert main(["doctor"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: no such folder\n")


def test_an_unexpected_error_is_named_and_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(KeyError("surprise"), monkeypatch)
    assert main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: KeyError: 'surprise'\n(NPU_QAT_DEBUG=1")
    assert "Traceback" not in err


def test_debugging_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NPU_QAT_DEBUG", "1")
    fail_with(KeyError("surprise"), monkeypatch)
    assert main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: KeyError: 'surprise'\n")


def test_ctrl_c_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_only_rank_0_reports_what_all_ranks_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    file = tmp_path / "run.yaml"
    file.write_text("train: {lrr: 1}")
    assert main(["train", str(file)]) == 2
    assert capsys.readouterr() == ("", "")
    fail_with(OSError("no space left"), monkeypatch)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "[rank 1] error: no space left\n"


def test_the_module_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "npu_qat", "--local_rank=0", "config", "presets"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "log-e13h" in done.stdout


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m npu_qat config show --describe | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# ")
