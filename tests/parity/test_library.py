"""The twin at L3 through the compressed-tensors library's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from npu_qat.config import Recipe
from npu_qat.parity.levels import Level, _library
from tests.deploy.models import NVFP4, W4A16, export_tiny

NAME = "transformers with compressed-tensors"


@pytest.mark.contract
@pytest.mark.parametrize("recipe", [None, W4A16, NVFP4], ids=["w4a4", "w4a16", "nvfp4"])
def test_the_library_sees_our_weights(tmp_path: Path, recipe: Recipe | None) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the compressed-tensors package")
    folder = export_tiny(tmp_path, "compressed-tensors", recipe).folder
    level = Level("L3")
    _library(level, folder)
    (check,) = level.checks
    assert check.name == NAME and check.ok and check.measured == "14 equal"


def test_without_the_library_the_report_says_that_it_was_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    level = Level("L3")
    _library(level, export_tiny(tmp_path, "compressed-tensors").folder)
    assert level.checks == [] and "not installed" in level.data["library"]


def test_another_format_is_not_the_librarys(tmp_path: Path) -> None:
    level = Level("L3")
    _library(level, export_tiny(tmp_path).folder)
    assert level.checks == [] and level.data == {}
