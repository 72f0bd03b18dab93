"""The sign of life of a run: touched whenever the run asks whether to stop."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from npu_qat.experiments import heartbeat
from npu_qat.experiments.heartbeat import VARIABLE, age, with_heartbeat


def make_old(file: Path) -> None:
    os.utime(file, (1, 1))


def test_asking_touches_the_file_and_passes_the_answer_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "SECONDS_BETWEEN_BEATS", 0.0)
    file = tmp_path / "heartbeat"
    monkeypatch.setenv(VARIABLE, str(file))
    answers = iter([False, True])
    ask = with_heartbeat(lambda: next(answers))
    for expected in (False, True):
        make_old(file)
        assert ask() is expected
        found = age(file)
        assert found is not None and found < 60


def test_many_questions_are_few_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts ask at every token."""
    monkeypatch.setattr(heartbeat, "SECONDS_BETWEEN_BEATS", 3600.0)
    file = tmp_path / "heartbeat"
    monkeypatch.setenv(VARIABLE, str(file))
    ask = with_heartbeat(lambda: False)
    make_old(file)
    assert ask() is False and file.stat().st_mtime == 1


def test_without_a_name_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)

    def should_stop() -> bool:
        return True

    assert with_heartbeat(should_stop) is should_stop


def test_a_file_that_cannot_be_written_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere" / "heartbeat"))
    with pytest.raises(OSError):
        with_heartbeat(lambda: False)


def test_a_file_that_cannot_be_written_any_more_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "SECONDS_BETWEEN_BEATS", 0.0)
    folder = tmp_path / "gone"
    folder.mkdir()
    file = folder / "heartbeat"
    monkeypatch.setenv(VARIABLE, str(file))
    ask = with_heartbeat(lambda: True)
    file.unlink()
    folder.rmdir()
    assert ask() is True
    folder.mkdir()
    assert ask() is True and file.exists(), "it goes on when it can"


def test_a_file_from_the_future_has_no_negative_age(tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    file.touch()
    os.utime(file, (2**32, 2**32))
    assert age(file) == 0.0
    assert age(tmp_path / "nothing") is None
