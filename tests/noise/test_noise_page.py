"""docs/noise.md: its YAML is valid and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from npu_qat.config import NoiseConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "noise.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_yaml_blocks_are_valid_and_switch_noise_on() -> None:
    sections = [yaml.safe_load(block)["noise"] for block in blocks("yaml")]
    assert len(sections) == 2
    assert all(NoiseConfig.model_validate(section).enabled for section in sections)


def test_the_python_block_runs_and_changes_every_norm(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code, "docs/noise.md", "exec"), {})
    *stages, record = capsys.readouterr().out.strip().splitlines()
    assert len(stages) == 10
    assert record.startswith("5 ")
