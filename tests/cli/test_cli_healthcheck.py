"""npu-qat healthcheck: exit codes that a container engine understands, and no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from npu_qat.cli import main
from npu_qat.experiments.heartbeat import VARIABLE

ROOT = Path(__file__).resolve().parents[2]


def beat(file: Path, seconds_ago: float) -> Path:
    file.touch()
    then = time.time() - seconds_ago
    os.utime(file, (then, then))
    return file


@pytest.mark.parametrize(("seconds_ago", "code"), [(5, 0), (500, 1)])
def test_the_age_of_the_last_sign_of_life_decides(
    seconds_ago: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(beat(tmp_path / "heartbeat", seconds_ago)))
    assert main(["healthcheck", "--max-age", "60"]) == code


def test_the_option_goes_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(beat(tmp_path / "old", 500)))
    named = str(beat(tmp_path / "new", 0))
    assert main(["healthcheck", "--max-age", "60", "--file", named]) == 0
    assert capsys.readouterr().out.startswith("alive: the last one 0 s ago")


def test_a_run_that_has_not_begun_is_not_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "heartbeat")
    assert main(["healthcheck", "--max-age", "60", "--file", missing]) == 1
    assert "no sign of life yet" in capsys.readouterr().out


def test_without_a_file_to_look_at_it_says_how_to_name_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["healthcheck", "--max-age", "60"]) == 2
    error = capsys.readouterr().err
    assert VARIABLE in error and "--file" in error


@pytest.mark.parametrize("age", ["0", "-1", "nan", "inf", "soon"])
def test_an_age_that_is_none_is_refused(age: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["healthcheck", f"--max-age={age}"])
    assert end.value.code == 2


def test_it_loads_no_torch(tmp_path: Path) -> None:
    file = beat(tmp_path / "heartbeat", 0)
    script = (
        "import sys; from npu_qat.cli import main; "
        f"code = main(['healthcheck', '--max-age', '60', '--file', {str(file)!r}]); "
        "print(code, [m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
