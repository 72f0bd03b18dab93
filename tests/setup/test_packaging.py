"""pyproject.toml, the constraints and the bootstrap script say the same things."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))


def pins(file: str) -> dict[str, set[str]]:
    """Package -> pinned versions (several where Pythons differ) of a constraints file."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            found.setdefault(canonical(requirement.name), set()).add(specifier.version)
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(pyproject: dict[str, Any], *extras: str) -> list[Requirement]:
    project = pyproject["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines if not line.startswith("npu-qat[")]


def test_the_issue_s_extras_exist(pyproject: dict[str, Any]) -> None:
    assert {"npu", "gpu", "trl", "parity", "dev"} <= set(
        pyproject["project"]["optional-dependencies"]
    )


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("constraints.txt", ("dev", "docs", "trl", "wandb", "mlflow", "swanlab")),
        ("constraints-npu.txt", ("dev", "docs", "trl", "wandb", "mlflow", "swanlab", "npu")),
    ],
)
def test_every_dependency_has_a_tested_version_that_it_admits(
    pyproject: dict[str, Any], file: str, extras: tuple[str, ...]
) -> None:
    pinned = pins(file)
    for requirement in requirements(pyproject, *extras):
        versions = pinned.get(canonical(requirement.name))
        assert versions, f"{requirement.name} is not in {file}: make constraints"
        for version in versions:
            assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_every_import_of_the_package_is_declared(pyproject: dict[str, Any]) -> None:
    """Nothing is relied on because something else happens to bring it."""
    extras = pyproject["project"]["optional-dependencies"]
    declared = {canonical(r.name) for r in requirements(pyproject, *extras)}
    # datasets requires pyarrow
    own_name = {"yaml": "pyyaml", "pyarrow": "datasets", "mlflow": "mlflow-skinny"}
    imported = {
        name.partition(".")[0]
        for path in (ROOT / "npu_qat").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imported_names(node)
    }
    third_party = imported - set(sys.stdlib_module_names) - {"npu_qat", ""}
    missing = {m for m in third_party if own_name.get(m, canonical(m)) not in declared}
    assert missing == set()


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    return []


def test_everything_in_the_source_archive_exists(pyproject: dict[str, Any]) -> None:
    listed = pyproject["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert [path for path in listed if not (ROOT / path).exists()] == []


def test_the_python_floor_is_one_number(pyproject: dict[str, Any]) -> None:
    floor = re.sub(r"\D", "", pyproject["project"]["requires-python"])
    assert pyproject["tool"]["ruff"]["target-version"] == f"py{floor}"
    script = (ROOT / "scripts" / "bootstrap.py").read_text(encoding="utf-8")
    assert f"MIN_PYTHON = ({floor[0]}, {floor[1:]})" in script


def test_extras_that_pin_a_torch_of_their_own_are_declared_to_conflict(
    pyproject: dict[str, Any],
) -> None:
    conflicts = [
        {entry["extra"] for entry in pair} for pair in pyproject["tool"]["uv"]["conflicts"]
    ]
    assert {"npu", "gpu"} in conflicts
    assert {"npu", "parity"} in conflicts
