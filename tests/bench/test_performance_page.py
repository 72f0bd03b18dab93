"""docs/performance.md shows what the result files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from npu_qat.bench.page import filled

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "performance.md").read_text(encoding="utf-8")
RESULTS = DOCS / "results" / "performance"


def test_the_tables_are_those_of_the_result_files() -> None:
    assert filled(PAGE, RESULTS) == PAGE, "run: python -m npu_qat.bench.page docs/performance.md"


def test_every_result_file_is_shown_and_whole() -> None:
    named = set(re.findall(r"<!-- rows (\S+) ", PAGE))
    assert named == {file.name for file in RESULTS.glob("*.json")}
    for name in named:
        rows = json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
        names = [row["name"] for row in rows]
        assert len(names) == len(set(names)), f"{name} has a row twice"
        benchmarks = {row.split("/")[0] for row in names}
        shown = re.findall(rf"<!-- rows {re.escape(name)} ([\w ,-]+) -->", PAGE)
        assert benchmarks == {b for group in shown for b in group.split()}, name


def test_a_table_of_rows_that_are_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"rows": [], "environment": {}}')
    with pytest.raises(ValueError, match="no rows of decode"):
        filled("<!-- rows x.json decode -->\n<!-- end -->", tmp_path)


def test_a_change_of_a_result_changes_the_page(tmp_path: Path) -> None:
    found = re.search(r"<!-- rows (\S+) ", PAGE)
    assert found is not None
    for file in RESULTS.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        (tmp_path / file.name).write_text(re.sub(r'"ratio": [\d.]+', '"ratio": 77.77', text))
    assert "77.77" in filled(PAGE, tmp_path) != PAGE
