"""docs/sensitivity.md and docs/experiments-of-the-documents.md: every block of theirs works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from npu_qat.cli import build_parser, dry_run, main
from npu_qat.config import preset_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/sensitivity.md", "docs/experiments-of-the-documents.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for found, body in BLOCK.findall(text) if found == language]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_succeed_in_the_order_of_the_page(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "PROBE_SECONDS", 0.001)
    lines = [line for body in blocks(page, "bash") for line in body.splitlines() if line]
    assert len(lines) >= 3
    for line in lines:
        assert line.startswith("npu-qat ")
        assert main(line.split("#")[0].split()[1:]) == 0, line


@pytest.mark.parametrize(
    "line", [line for page in PAGES for body in blocks(page, "text") for line in body.splitlines()]
)
def test_commands_that_need_a_users_files_exist(line: str) -> None:
    words = [word for word in line.split() if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "npu-qat":
        assert callable(build_parser().parse_args(words[1:]).run)
        return
    script = words[1] if words[0] == "python" else words[0]
    assert (ROOT / script).is_file()


def test_the_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("docs/sensitivity.md", "python")
    exec(compile(code, "docs/sensitivity.md", "exec"), {})
    worst, multipliers = capsys.readouterr().out.strip().splitlines()
    assert worst.startswith("model.layers.") and multipliers.startswith("{0: ")


def test_the_table_has_a_row_for_every_preset_and_for_nothing_else() -> None:
    text = (ROOT / PAGES[1]).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    presets = [row for row in rows if row in preset_names()]
    assert sorted(presets) == sorted(name for name in preset_names() if name != "demo")


def test_the_pictures_of_the_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / page).read_text()):
            assert (ROOT / "docs" / target).is_file(), target
