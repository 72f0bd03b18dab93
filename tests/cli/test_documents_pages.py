"""docs/sensitivity.md and docs/experiments-of-the-documents.md: what their tables say is so.

That their commands work is checked with those of all pages, in tests/docs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from npu_qat.config import preset_names

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_python_block_prints_a_linear_and_multipliers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (DOCS / "sensitivity.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/sensitivity.md", "exec"), {})
    worst, multipliers = capsys.readouterr().out.strip().splitlines()
    assert worst.startswith("model.layers.") and multipliers.startswith("{0: ")


def test_the_table_has_a_row_for_every_preset_and_for_nothing_else() -> None:
    text = (DOCS / "experiments-of-the-documents.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    presets = [row for row in rows if row in preset_names()]
    assert sorted(presets) == sorted(name for name in preset_names() if name != "demo")
