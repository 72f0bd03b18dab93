"""The manual knows every command and every room."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from npu_qat.cli import build_parser
from tests.docs.blocks import blocks, program_calls
from tests.test_house import ORDER

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Rooms without a page of the reference, and what is read instead.
NO_REFERENCE = {
    "assets": "demo-model.md",
    "reporting": "report.md",
    "experiments": "experiments.md",
    "bench": "performance.md",
    "planning": "scaling.md",
    "cluster": "clusters.md",
    "cli": "cli.md",
}


def commands() -> list[str]:
    (choice,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return list(choice.choices)


@pytest.mark.parametrize("command", commands())
def test_each_command_is_used_on_the_how_to_page_and_in_its_table(command: str) -> None:
    page = "docs/how-to/index.md"
    used = {
        words[0]
        for block in blocks(page)
        if block.language == "bash"
        for words in program_calls(block)
    }
    assert command in used
    table = (DOCS / "how-to" / "index.md").read_text(encoding="utf-8").split("## doctor")[0]
    assert f"`{command}`" in table or f"`npu-qat {command}`" in table


@pytest.mark.parametrize("command", commands())
def test_each_command_is_on_the_page_of_the_command_line(command: str) -> None:
    assert f"`npu-qat {command}" in (DOCS / "cli.md").read_text(encoding="utf-8").replace(
        "`evaluate", "`npu-qat evaluate"
    )


@pytest.mark.parametrize("room", ORDER)
def test_each_room_has_a_page(room: str) -> None:
    page = NO_REFERENCE.get(room, f"reference/api/{room}.md")
    assert (DOCS / page).is_file()


def test_the_map_shows_the_rooms_in_their_order() -> None:
    svg = (DOCS / "images" / "figures" / "house.svg").read_text(encoding="utf-8")
    shown = [name for name in re.findall(r">(\w+)</text>", svg) if name in ORDER]
    for_all = ["config", "assets"]
    assert shown == [room for room in ORDER if room not in for_all] + for_all
