"""What pages, docstrings and comments name is there: files, Python names, keys, options.

A renamed function breaks its callers at once, and the sentence that mentions it never. Read are the
text of the manual outside of fences (test_blocks.py has those), every docstring, and every comment.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache

import pytest

from npu_qat.cli import build_parser
from npu_qat.config.fields import known_keys
from tests.docs.blocks import FENCE, ROOT, blocks, pages

CODE = ("npu_qat", "scripts", "kernels_ascendc", "examples", "tests")
OTHER_PAGES = (
    *("scripts/README.md", "kernels_ascendc/README.md", "tests/recordings/README.md"),
    *("docker/wheels/README.md", "tests/numerics/data/README.md"),
    "npu_qat/assets/demo_model/README.md",
)
ROOMS = {path.parent.name for path in (ROOT / "npu_qat").glob("*/__init__.py")}
# A path is one of ours if it begins here; runs/, served/ and so on are a reader's.
BEGINNINGS = {*CODE, *ROOMS, "docs", "docker", ".ci", "results", "concepts", "how-to", "reference"}
FILE = re.compile(
    r"(?<![\w/.:~$<{*-])(?:\.\./)*((?:[\w.-]+/)+[\w.-]+"
    r"\.(?:py|md|sh|ya?ml|jsonl?|toml|txt|h|asc|cpp|svg|png|npz|html|j2))(?![\w/*])"
)
NAME = re.compile(r"(?<![\w./-])npu_qat(?:\.\w+)+(?![\w/])")
KEY = re.compile(r"`(?:--set )?(\w+(?:\.\w+)+)(?:[=:][^`]*)?`")
OPTION = re.compile(r"`(?:npu-qat [\w -]+? )?(--[a-z][\w-]*)[^`]*`")
# Metrics, sections of audit.json and functions of others that look like keys of ours.
NOT_KEYS = {"noise.multipliers", "deepspeed.initialize"}
OPTIONS_OF_OTHERS = {
    *("--device", "--user", "--init"),  # docker
    *("--max-lora-rank", "--lora-modules", "--quantization", "--linear-backend"),  # vllm
}


@cache
def sentences() -> tuple[tuple[str, str], ...]:
    """(file, text) of pages, docstrings and comments."""
    found = [(page, without_fences(page)) for page in (*pages(), *OTHER_PAGES)]
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            found += [(name, text) for text in prose(path.read_text(encoding="utf-8"))]
    return tuple(found)


def without_fences(page: str) -> str:
    return FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))


def prose(source: str) -> Iterator[str]:
    """Docstrings and comments of a module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def file_exists(path: str, file: str) -> bool:
    """From the root, the package, the manual or the tests, or beside the file that names it."""
    places = (ROOT, ROOT / "npu_qat", ROOT / "docs", ROOT / "tests", (ROOT / file).parent)
    return any((place / path).exists() for place in places)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or what one holds."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[n:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


@cache
def source_of_scripts() -> str:
    return "".join(p.read_text(encoding="utf-8") for p in (ROOT / "scripts").rglob("*.[ps][yh]"))


def options(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found |= options(inner)
    return found


def missing_files(file: str, text: str) -> list[str]:
    made_by_the_page = {b.title for b in blocks(file)} if file.endswith(".md") else set()
    return [
        path
        for path in FILE.findall(text)
        if path.split("/")[0] in BEGINNINGS
        and path not in made_by_the_page
        and not file_exists(path, file)
    ]


def missing_keys(text: str) -> list[str]:
    keys = {".".join(path) for path in known_keys()}
    sections = {key.split(".")[0] for key in keys}
    return [
        key
        for key in KEY.findall(text)
        if key.split(".")[0] in sections
        and not key.endswith((".yaml", ".json"))
        and key not in keys | NOT_KEYS
        and not any(key.startswith(f"{free}.") for free in keys if "." in free)
    ]


def missing_options(text: str) -> list[str]:
    ours = options(build_parser()) | OPTIONS_OF_OTHERS
    scripts = source_of_scripts()
    return [
        option
        for option in OPTION.findall(text)
        if option not in ours and f'"{option}"' not in scripts and f"  {option} " not in scripts
    ]


def test_files_that_are_named_exist() -> None:
    assert [(f, missing) for f, text in sentences() for missing in missing_files(f, text)] == []


def test_python_names_that_are_named_exist() -> None:
    # The first makes the module that it names, the second means any.
    not_read = ("docs/contributing/add-a-backend.md", "tests/test_house.py")
    read = [(f, text) for f, text in sentences() if f not in not_read]
    named = {(name, f) for f, text in read for name in NAME.findall(text)}
    assert len(named) > 30
    assert sorted((f, name) for name, f in named if not resolves(name)) == []


def test_configuration_keys_that_are_named_exist() -> None:
    # Paths of modules in a model begin as the section "model" does.
    read = [(f, text) for f, text in sentences() if f != "npu_qat/config/paths.py"]
    assert [(f, key) for f, text in read for key in missing_keys(text)] == []


def test_options_that_pages_name_exist() -> None:
    read = [(f, text) for f, text in sentences() if f.endswith(".md")]
    assert [(f, option) for f, text in read for option in missing_options(text)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see training/no_such.py", ["training/no_such.py"]),
        ("see training/dapo.py and docs/cli.md", []),
        ("runs/mine/report.html is yours", []),
    ],
)
def test_a_file_that_is_not_there_is_found_out(text: str, found: list[str]) -> None:
    assert missing_files("README.md", text) == found


def test_a_name_that_is_not_there_is_found_out() -> None:
    assert not resolves("npu_qat.numerics.no_such") and resolves("npu_qat.numerics.fake_quant")
    assert missing_keys("`train.learning_rate=1`") == ["train.learning_rate"]
    assert missing_keys("`train.lr: 1e-5`, `rollout.engine_options.seed`") == []
    assert missing_options("`--no-such N` and `npu-qat scan --num_prompts 4`") == ["--no-such"]
