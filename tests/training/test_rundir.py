"""The run directory refuses early, writes atomically, and forgets what a resume writes anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from npu_qat.training.rundir import (
    METRICS,
    RESULTS,
    SAMPLES,
    RunDirectory,
    RunDirectoryError,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    RunDirectory(folder).prepare(resume=False, bytes_needed=MIB)
    assert folder.is_dir() and list(folder.iterdir()) == []


def test_a_folder_with_a_run_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_text("config.yaml", "run: {}\n")
    with pytest.raises(RunDirectoryError, match=r"holds a run already.*--resume auto"):
        run.prepare(resume=False, bytes_needed=MIB)
    run.prepare(resume=True, bytes_needed=MIB)


@pytest.mark.parametrize("result", RESULTS)
def test_a_run_that_failed_before_its_first_result_is_in_nobodys_way(
    tmp_path: Path, result: str
) -> None:
    run = RunDirectory(tmp_path)
    run.write_text("config.yaml", "run: {}\n")
    run.write_json("environment.json", {})
    run.prepare(resume=False, bytes_needed=MIB)
    (tmp_path / result).mkdir()
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        run.prepare(resume=False, bytes_needed=MIB)


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"cannot write to .*file/run: Not a directory"):
        RunDirectory(tmp_path / "file" / "run").prepare(resume=False, bytes_needed=MIB)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(RunDirectoryError, match="Permission denied"):
            RunDirectory(tmp_path).prepare(resume=True, bytes_needed=MIB)
    finally:
        tmp_path.chmod(0o755)


def test_a_read_only_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", read_only)
    with pytest.raises(RunDirectoryError, match=rf"cannot write to {tmp_path}: Read-only file"):
        RunDirectory(tmp_path).prepare(resume=False, bytes_needed=MIB)


def test_too_little_space_is_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100 * MIB, 93 * MIB, 7 * MIB))
    run = RunDirectory(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"7 MiB free, .* write 64 MiB"):
        run.prepare(resume=False, bytes_needed=64 * MIB)
    with pytest.raises(RunDirectoryError, match="8 MiB"):
        run.check_space(8 * MIB)
    run.prepare(resume=False, bytes_needed=6 * MIB)


# --- the lock -------------------------------------------------------------------------------


def holds_lock(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of ``folder`` until its standard input closes."""
    script = (
        "import sys; from pathlib import Path\n"
        "from npu_qat.training.rundir import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_two_processes_never_train_into_one_folder(end: str, tmp_path: Path) -> None:
    other = holds_lock(tmp_path)
    try:
        message = "another process is training into"
        with pytest.raises(RunDirectoryError, match=message), RunDirectory(tmp_path).locked():
            pass
        # The other ranks of a run write nothing and need no lock.
        with RunDirectory(tmp_path, writer=False).locked():
            pass
    finally:
        if end == "is killed":
            other.kill()
        other.communicate()
    with RunDirectory(tmp_path).locked():
        pass


# --- writing --------------------------------------------------------------------------------


def test_a_rank_that_is_no_writer_writes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", writer=False)
    run.prepare(resume=False, bytes_needed=2**62)
    run.append(METRICS, {"step": 1})
    run.write_json("x.json", {})
    run.write_text("y.txt", "")
    run.forget_after("w4a4", 0)
    assert not (tmp_path / "run").exists()


def test_json_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    run.write_json("deep/x.json", {"a": [1, "ü"]})
    assert run.read_json("deep/x.json") == {"a": [1, "ü"]}
    assert run.read_json("none.json") is None

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.write_json("deep/x.json", {"b": 2})
    assert run.read_json("deep/x.json") == {"a": [1, "ü"]}


def test_a_write_leaves_no_second_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", b"one")
    write_atomically(tmp_path / "x", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"two"


# --- lines ----------------------------------------------------------------------------------


def lines(run: RunDirectory, name: str = METRICS) -> list[dict[str, object]]:
    text = (run.path / name).read_text("utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def filled(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    for arm in ("w4a4", "bf16_lora"):
        for step in (1, 2, 3):
            run.append(METRICS, {"arm": arm, "step": step, "text": "ünï"})
            run.append(SAMPLES, {"arm": arm, "step": step})
    return run


def test_a_resumed_arm_forgets_its_own_later_lines_only(tmp_path: Path) -> None:
    run = filled(tmp_path)
    run.forget_after("w4a4", 2)
    for name in (METRICS, SAMPLES):
        kept = [(line["arm"], line["step"]) for line in lines(run, name)]
        assert kept == [("w4a4", 1), ("w4a4", 2), *(("bf16_lora", s) for s in (1, 2, 3))]
    run.forget_after("bf16_lora", 0)
    assert [line["step"] for line in lines(run)] == [1, 2]


@pytest.mark.parametrize(
    "tail",
    [
        b'{"arm": "w4a4", "step": 4, "lo',
        '{"arm": "w4a4", "step": 4, "text": "ü'.encode()[:-1],
        b"\x00\x00\x00\x00",
        b"\n",
        b"4",
    ],
    ids=["mid-word", "mid-character", "zeros", "blank", "number"],
)
def test_a_last_line_that_a_kill_cut_off_is_dropped(tail: bytes, tmp_path: Path) -> None:
    run = filled(tmp_path)
    with open(tmp_path / METRICS, "ab") as handle:
        handle.write(tail)
    run.forget_after("w4a4", 3)
    assert len(lines(run)) == 6
    run.append(METRICS, {"arm": "w4a4", "step": 4})
    assert lines(run)[-1]["step"] == 4 and lines(run)[0]["text"] == "ünï"


def test_a_line_may_hold_any_character(tmp_path: Path) -> None:
    """Models sample U+2028 and U+0085, at which str.splitlines() would cut the line."""
    run, text = RunDirectory(tmp_path), "a\u2028b\u2029c\x85d\ne\x0cf"
    run.append(SAMPLES, {"arm": "w4a4", "step": 1, "completion": text})
    run.forget_after("w4a4", 1)
    written = (tmp_path / SAMPLES).read_text("utf-8")
    assert json.loads(written)["completion"] == text


def test_nothing_to_forget(tmp_path: Path) -> None:
    RunDirectory(tmp_path).forget_after("w4a4", 0)
    assert list(tmp_path.iterdir()) == []
