"""docs/report.md: its Python runs and says what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.reporting import fabricated

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text(encoding="utf-8")


def test_the_python_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    fabricated.write_evaluations(tmp_path / "runs" / "mine", fabricated.RATES, 60)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        exec(compile(code, "docs/report.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "mean=0.6," in printed
    assert "only_a=15" in printed
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
