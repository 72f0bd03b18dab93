"""The manual builds without a warning, links included, and needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
pytest.importorskip("material", reason="the extra 'docs' is not installed")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_every_page_of_the_repository_is_a_page_of_the_site(site: Path) -> None:
    pages = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")]
    built = {p.relative_to(site) for p in site.rglob("*.html")}
    missing = [
        page
        for page in pages
        if page.with_suffix(".html") not in built and page.with_name("index.html") not in built
    ]
    assert len(pages) > 40 and missing == []


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    """From the file system, in a closed network: styles, scripts, pictures and fonts are local."""
    loads = re.compile(
        r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^>]*>"
    )
    found = [
        (page.name, tag)
        for page in site.rglob("*.html")
        for tag in loads.findall(page.read_text(encoding="utf-8"))
        if 'rel="canonical"' not in tag
    ]
    assert found == []


def test_the_search_works_from_the_file_system(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = ") and "straight-through" in index
    assert "assets/iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "assets" / "iframe-worker.js").is_file()


def test_every_exported_function_of_the_reference_has_its_text(site: Path) -> None:
    page = (site / "reference" / "api" / "numerics.html").read_text(encoding="utf-8")
    for name in ("codec.fake_quant", "codec.quantize", "codec.dequantize", "profiles.get_profile"):
        assert f'id="npu_qat.numerics.{name}"' in page
    assert "Round" in page and "Raises ValueError" in page


def test_links_out_of_the_site_become_paths(site: Path) -> None:
    page = (site / "demo-model.html").read_text(encoding="utf-8")
    assert "npu_qat/assets/demo_model/README.md</code>" in page
    assert 'href="../npu_qat' not in page
