"""The house rules: imports flow one way, the start is light, no file knows one machine."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "npu_qat"

# A room may import itself and the rooms before it.
ORDER = [
    "assets",  # files that come with the package; it imports nothing
    "numerics",
    "config",
    "backends",
    "layers",
    "noise",
    "sensitivity",
    "tasks",
    "training",
    "evaluation",
    "reporting",
    "deploy",
    "integrations",
    "parity",
    "experiments",
    "bench",
    "planning",
    "cluster",
    "cli",
]
# Files outside the rooms: the front door leads anywhere (lazily), the version nowhere.
FRONT_DOOR = {"npu_qat/__init__.py", "npu_qat/__main__.py", "npu_qat/__about__.py"}
HEAVY = ["torch", "transformers", "deepspeed", "peft", "trl", "datasets", "matplotlib", "numpy"]


def room(module: str) -> str | None:
    """``numerics`` for ``npu_qat.numerics.pack``; None for what is in no room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "npu_qat" else None


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of each import of ``npu_qat`` in a source text, lazy ones included.

    ``from npu_qat import x`` counts as ``npu_qat.x``: a room, or a public name of some room.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name == "npu_qat":
                yield from ((node.lineno, f"npu_qat.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, name
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            target = node.args[0]
            if called in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield node.lineno, str(target.value)


def violations(source: str, path: str) -> list[str]:
    """Imports of a file that go against the order; ``path`` is relative to the repository."""
    parts = list(Path(path).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    own = room(module)
    if own not in ORDER:
        return [f"{path}: room {own!r} is not in the house order"]
    found = []
    for line, target in imported_modules(source, module, is_package):
        other = room(target)
        if other is None or other == own or other in ("__about__", "__version__"):
            continue
        if other not in ORDER:
            found.append(f"{path}:{line}: {target}: name the room that it comes from")
        elif ORDER.index(other) > ORDER.index(own):
            found.append(f"{path}:{line}: {own} imports {other}, which comes after it")
    return found


def test_imports_follow_the_house_order() -> None:
    files = [path.relative_to(ROOT).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]
    assert len(files) > len(FRONT_DOOR)
    found = [
        problem
        for file in files
        if file not in FRONT_DOOR
        for problem in violations((ROOT / file).read_text(encoding="utf-8"), file)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("import npu_qat.training", "npu_qat/numerics/pack.py"),
        ("from npu_qat.training.engine import Engine", "npu_qat/noise/__init__.py"),
        ("from npu_qat import cli", "npu_qat/layers/plan.py"),
        ("from ..training import engine", "npu_qat/layers/plan.py"),
        ("from . import x\nfrom ..layers import y", "npu_qat/backends/__init__.py"),
        ("def f():\n    from npu_qat.cli import main", "npu_qat/reporting/html.py"),
        ("import importlib\nimportlib.import_module('npu_qat.cli')", "npu_qat/config/schema.py"),
        ("from npu_qat import quantize", "npu_qat/layers/plan.py"),
        ("", "npu_qat/utils.py"),
    ],
)
def test_an_import_against_the_order_is_found(source: str, path: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("import torch\nfrom npu_qat.numerics import quantize", "npu_qat/layers/plan.py"),
        ("from . import pack\nfrom .formats import E2M1", "npu_qat/numerics/quantize.py"),
        ("from ..numerics.profiles import get_profile", "npu_qat/config/schema.py"),
        ("from npu_qat import __version__", "npu_qat/cli/doctor.py"),
    ],
)
def test_an_import_with_the_order_passes(source: str, path: str) -> None:
    assert violations(source, path) == []


@pytest.mark.parametrize(
    "module", ["npu_qat", "npu_qat.cli", "npu_qat.config", "npu_qat.numerics.profiles"]
)
def test_the_start_is_light(module: str) -> None:
    """The command line and configuration errors must not wait for torch."""
    script = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_public_names_lead_somewhere() -> None:
    import npu_qat

    assert set(npu_qat.__all__) - {"__version__"} == set(npu_qat._HOME)
    for name in npu_qat.__all__:
        assert getattr(npu_qat, name) is not None
    assert callable(npu_qat.quantize) and callable(npu_qat.fake_quant)
    assert {"ascend950", "nvfp4"} <= set(npu_qat.profiles())
    with pytest.raises(AttributeError, match="quantise"):
        _ = npu_qat.quantise


def tracked_files() -> list[Path]:
    """What git would commit; of an unpacked source archive, all of it."""
    listed = ""
    if shutil.which("git"):
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        ).stdout
    if listed:
        files = [ROOT / name for name in listed.split("\0") if name]
    else:
        files = [path for path in ROOT.rglob("*") if ".venv" not in path.parts]
    return [path for path in files if path.is_file()]


# Written in pieces, so that this file passes its own test.
FORBIDDEN = re.compile(
    "|".join(
        [
            r"(?<![\w.~-])/" + r"(?:work|farm)/",
            "/opt/" + "(?:wheels|pypi)",
            r"\bpypi" + r"\.org\b",
            "files" + r"\.pythonhosted\b",
            r"/root/\." + "pyenv",
        ]
    )
)


def test_no_file_names_one_machine_or_a_registry() -> None:
    files = tracked_files()
    assert ROOT / "pyproject.toml" in files
    found = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, images
        for number, line in enumerate(text.splitlines(), 1):
            if FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []
