"""Figures and tables of the manual are what the package computes today."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = sorted((ROOT / "docs" / "images" / "figures").glob("*.svg"))
PAGES = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").rglob("*.md"))


def test_figures_and_tables_are_current() -> None:
    """Also fails when the house has a new room or a profile a new rule."""
    done = subprocess.run(
        [sys.executable, "scripts/manual/build.py", "--check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, f"run: python scripts/manual/build.py\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.stem)
def test_a_figure_is_whole_says_what_it_shows_and_is_shown(figure: Path) -> None:
    svg = ElementTree.parse(figure).getroot()
    name = "{http://www.w3.org/2000/svg}"
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    assert len(svg.findtext(f"{name}title") or "") > 20
    for text in svg.iter(f"{name}text"):
        size = float(text.attrib["font-size"])
        length = (
            len(text.text or "")
            * size
            * (0.62 if "Mono" in text.attrib.get("font-family", "") else 0.5)
        )
        left = (
            float(text.attrib["x"])
            - {"middle": length / 2, "end": length, "start": 0}[text.attrib["text-anchor"]]
        )
        assert left > -8 and left + length < width + 12, f"{text.text!r} leaves the picture"
        assert 0 < float(text.attrib["y"]) <= height
    assert f"figures/{figure.name})" in PAGES


def test_the_chinese_page_shows_the_same_run() -> None:
    english = (ROOT / "docs" / "get-started" / "index.md").read_text(encoding="utf-8")
    chinese = (ROOT / "docs" / "zh" / "index.md").read_text(encoding="utf-8")
    row = re.compile(
        r"^\| `(\w+)` \|.*\| ([\d.]+) % \| ([\d.]+) (?:to|–) ([\d.]+) \|$", re.MULTILINE
    )
    assert len(row.findall(english)) == 5
    assert row.findall(chinese) == row.findall(english)
