"""Links that work where the repository is shown as files, on a site that has pages only."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "scripts" / "manual" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
