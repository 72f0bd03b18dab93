"""``npu-qat experiment``: what it lists, plans and refuses. Runs are in tests/experiments."""

from __future__ import annotations

from pathlib import Path

import pytest

from npu_qat.cli import main
from npu_qat.experiments.matrix import cells, load_matrix, matrix_path
from npu_qat.experiments.matrix_store import Store, code_digest
from tests.experiments.matrices import failure, fill, write_matrix


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_it_lists_the_shipped_matrices_and_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "list"]) == 0
    text = said(capsys)
    assert "rl-demo" in text and "sft-smollm2" in text and code_digest() in text


def test_a_dry_run_says_what_is_done_and_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = write_matrix(tmp_path)
    store = Store(tmp_path / "r")
    fill(matrix, store.folder)
    words = ["experiment", "run", str(tmp_path / "small.yaml"), "--results", str(tmp_path / "r")]
    assert main([*words, "--dry-run"]) == 0
    text = said(capsys)
    assert "small: 12 cells, 11 done, 1 failed, 0 to do" in text
    assert main([*words, "--dry-run", "--set", "train.steps=5", "--seeds", "1"]) == 0
    # Anchors belong to every seed.
    assert "small: 4 cells, 0 done, 0 failed, 4 to do" in said(capsys)


def test_what_failed_earlier_is_no_success_unless_it_had_to_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = write_matrix(tmp_path)
    store = Store(tmp_path / "r")
    for cell in cells(matrix):
        if cell.arm.name in ("start", "never"):
            store.add(cell, failure(cell))
    words = ["experiment", "run", str(tmp_path / "small.yaml"), "--results", str(tmp_path / "r")]
    assert main([*words, "--arms", "never"]) == 0
    assert "failed earlier" not in said(capsys)
    assert main([*words, "--arms", "never,start"]) == 2
    assert "failed earlier: 1; --retry-failed" in said(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nothing"], "there is no matrix 'nothing'"),
        (["run", "smoke", "--arms", "w4a5"], "there is no arm 'w4a5'"),
        (["run", "smoke", "--model", "demo"], "expected NAME=PATH"),
        (["run", "smoke", "--set", "train.stepz=3"], "stepz"),
        (["run", "smoke", "--arms", ""], "there is no arm ''"),
        (["run", "smoke", "--seeds", "x"], "no arm has the seed 'x'; seeds: 0, 1"),
        (["run", "smoke", "--seeds", "0,7"], "no arm has the seed '7'"),
        (["pages", "nowhere"], "no such folder"),
        (["report", "smoke", "--results", "nowhere"], "npu-qat experiment run smoke"),
    ],
)
def test_mistakes_are_explained(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", *words]) == 2
    assert message in said(capsys)


def test_a_report_is_written_beside_the_results(tmp_path: Path) -> None:
    matrix = write_matrix(tmp_path)
    fill(matrix, tmp_path / "mine" / "results")
    words = ["experiment", "report", str(tmp_path / "small.yaml")]
    assert main([*words, "--results", str(tmp_path / "mine" / "results")]) == 0
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert {"report.md", "report.html", "report.json", "rows.svg", "curves.svg"} <= names
    assert "[results](results)" in (tmp_path / "mine" / "report.md").read_text()
    away = tmp_path / "away"
    main([*words, "--results", str(tmp_path / "mine" / "results"), "--output", str(away)])
    assert "(../mine/results)" in (away / "report.md").read_text()


def test_a_time_limit_is_more_than_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "-5", "nan"):
        with pytest.raises(SystemExit):
            main(["experiment", "run", "smoke", "--time-limit", text])
        assert "is not more than 0" in said(capsys)


def test_pages_that_are_out_of_date_fail_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = load_matrix(matrix_path("smoke"))
    assert cells(smoke)
    (tmp_path / "smoke" / "cells").mkdir(parents=True)
    assert main(["experiment", "pages", str(tmp_path), "--check"]) == 2
    assert main(["experiment", "pages", str(tmp_path)]) == 0
    assert main(["experiment", "pages", str(tmp_path), "--check"]) == 0
    assert "out of date" in said(capsys)
