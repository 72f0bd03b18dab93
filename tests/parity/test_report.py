"""What was found, in words, as JSON and as a page that loads nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from npu_qat.parity.levels import ParityReport
from npu_qat.parity.report import as_text, figures, headline, render, write_html
from tests.parity.world import World, break_tensor, make


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def good(world: World) -> ParityReport:
    return world.judge()


@pytest.fixture(scope="module")
def bad(world: World, tmp_path_factory: pytest.TempPathFactory) -> ParityReport:
    folder = world.copy(tmp_path_factory.mktemp("bad") / "served")
    name = "model.layers.0.mlp.down_proj.weight"
    break_tensor(folder, name, lambda t: t[0, 0].bitwise_xor_(0x44))
    return world.judge(folder)


def test_the_text_says_every_check_with_what_was_expected(good: ParityReport) -> None:
    lines = list(as_text(good))
    assert "computes what was trained, from codes to tokens" in lines[0]
    for level in good.levels:
        assert any(line.startswith(f"PASS  {level.key} ") for line in lines)
        for check in level.checks:
            assert any(f"{check.name}: {check.measured}  [expected: " in line for line in lines)


def test_a_failure_is_in_the_first_line(bad: ParityReport) -> None:
    assert headline(bad).startswith("The export does not compute what was trained: L0, L1")
    assert any(line.startswith("FAIL  L0") for line in as_text(bad))


def test_json_has_all_numbers(good: ParityReport, bad: ParityReport) -> None:
    content = json.loads(json.dumps(good.as_dict()))
    assert content["verdict"] == "pass" and bad.as_dict()["verdict"] == "fail"
    assert [row["level"] for row in content["levels"]] == ["L0", "L1", "L2", "L3"]
    assert set(content["levels"][2]["noise"]) >= {"each row alone", "1 ulp, seed 1"}
    assert content["recorded"]["environment"] == {"device": "cpu"}


def test_the_page_holds_everything_and_loads_nothing(good: ParityReport, tmp_path: Path) -> None:
    write_html(good, tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert not re.search(r"<script|<link|<img|https?://(?!www\.w3\.org)", page)
    assert page.count("<figure") == 3 and page.count("✓ pass") >= 12
    for level in good.levels:
        for check in level.checks:
            assert check.name in page
    assert not list(tmp_path.glob(".*"))


def test_plots_show_causes_only_where_something_differs(
    good: ParityReport, bad: ParityReport
) -> None:
    assert [f.slug for f in figures(good)] == ["ulps", "floor", "gaps"]
    found = {f.slug: f.caption for f in figures(bad)}
    assert found["causes"] == "2 other (codes)."
    assert "0 lie beyond" not in found["ulps"]


def test_text_from_files_is_escaped(good: ParityReport) -> None:
    from dataclasses import replace

    page = render(replace(good, folder=Path("<b>served</b>")))
    assert "<b>served</b>" not in page.replace("<b>&lt;b&gt;", "")
