"""Write the manual's figures and generated tables anew: ``python scripts/manual/build.py``.

Figures go to ``docs/images/figures``. A table goes between two comments of a page,
``<!-- made: NAME -->`` and ``<!-- end -->``. With ``--check`` nothing is written, and the exit code
is 1 if anything differs from what the package computes today; a test runs that.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import diagrams
import figures
from svg import Figure
from tables import TABLES

DOCS = Path(__file__).resolve().parents[2] / "docs"
FIGURES: dict[str, Callable[[], Figure]] = {
    "overview": diagrams.overview,
    "e2m1-grid": figures.e2m1_grid,
    "bit-layouts": figures.bit_layouts,
    "mx-block": figures.mx_block,
    "mx-bytes": figures.mx_bytes,
    "scale-rules": figures.scale_rules,
    "block-axis": figures.block_axis,
    "straight-through": diagrams.straight_through,
    "quant-linear": diagrams.quant_linear,
    "aqn-schedule": diagrams.aqn_schedule,
    "dapo-step": diagrams.dapo_step,
    "dapo-clip": diagrams.dapo_clip,
    "parity-levels": diagrams.parity_levels,
    "house": diagrams.house,
}
MADE = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def expected() -> dict[Path, str]:
    """Every generated file and every page with a generated part, as it should be."""
    folder = DOCS / "images" / "figures"
    files = {folder / f"{name}.svg": figure().render() for name, figure in FIGURES.items()}
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if "<!-- made: " in text:
            files[page] = filled(text, str(page))
    return files


def filled(text: str, page: str) -> str:
    """``text`` with fresh tables. Raises ``ValueError`` for a table that does not exist."""

    def fresh(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"{page}: no table {found[2]!r}; there are {', '.join(TABLES)}")
        return f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}"

    return MADE.sub(fresh, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    stale = [
        (path, text)
        for path, text in expected().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        print(("differs: " if check else "wrote ") + str(path.relative_to(DOCS.parent)))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
