"""Links and docstrings that are written for the repository, on a site of Markdown."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    file = ROOT / "scripts" / "manual" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return load("hooks")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[the card](../README.md)", "the card (`README.md`)"),
        ("[README.md](../README.md)", "`README.md`"),
        ("[runs](results/demo-cpu)", "runs (`docs/results/demo-cpu`)"),
        ("[CLI](cli.md#train)", "[CLI](cli.md#train)"),
        ("[web](https://example.org)", "[web](https://example.org)"),
        ("![picture](images/x.svg)", "![picture](images/x.svg)"),
        ("```text\n[a](../README.md)\n```", "```text\n[a](../README.md)\n```"),
    ],
)
def test_a_link_out_of_the_site_becomes_its_text_and_path(
    hooks: ModuleType, written: str, shown: str
) -> None:
    warned: list[str] = []
    docs = ROOT / "docs"
    assert hooks.outside_links(written, docs / "page.md", docs, warned.append) == shown
    assert warned == []


def test_a_link_that_leads_nowhere_is_a_warning(hooks: ModuleType) -> None:
    warned: list[str] = []
    docs = ROOT / "docs"
    hooks.outside_links("[x](../no-such-file.py)", docs / "page.md", docs, warned.append)
    assert warned == ["docs/page.md: the link ../no-such-file.py leads to nothing"]


def test_restructured_text_of_docstrings_becomes_markdown() -> None:
    pytest.importorskip("griffe", reason="the extra 'docs' is not installed")
    text = (
        "As in::\n\n    x = 1\n\nRaises :class:`E` for a::b.\n\n"
        "=====  =======\nname   meaning\n=====  =======\none    first\n       of a|b\ntwo    next\n"
        "=====  =======\n\nEnd."
    )
    assert load("docstrings").as_markdown(text) == (
        "As in:\n\n    x = 1\n\nRaises `E` for a::b.\n\n"
        "\n| name | meaning |\n|---|---|\n| one | first of a\\|b |\n| two | next |\n\n\nEnd."
    )
