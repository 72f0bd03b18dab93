"""Whatever interrupts a checkpoint, or damages it later, the one before it is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from npu_qat.training import checkpoint as module
from npu_qat.training.checkpoint import Checkpoint, load_newest, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def state(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {f"p{i}": torch.randn(7, 5, generator=generator) for i in range(3)}
    return Checkpoint(step, tensors, {"updates": 4 * step, "method": {"cursor": 9 * step}})


def assert_same(found: Checkpoint | None, wanted: Checkpoint) -> None:
    assert found is not None
    assert (found.step, found.counters) == (wanted.step, wanted.counters)
    assert found.state.keys() == wanted.state.keys()
    assert all(torch.equal(found.state[k], wanted.state[k]) for k in wanted.state)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def unexpected(text: str) -> None:
    raise AssertionError(text)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "w4a4", state(10), keep=2)
    assert path == tmp_path / "w4a4" / "step-000010"
    assert_same(load_newest(tmp_path / "w4a4", unexpected), state(10))


def test_the_newest_is_taken_and_older_ones_are_deleted(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save_checkpoint(tmp_path, state(step), keep=2)
        assert_same(load_newest(tmp_path, unexpected), state(step))
    assert names(tmp_path) == ["step-000015", "step-000100"]


def test_a_copy_that_a_user_made_beside_them_is_left_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(10), keep=1)
    for copy in ("step-000010-best", "step-99", "step-000030.old"):
        shutil.copytree(tmp_path / "step-000010", tmp_path / copy)
    for step in (20, 5):  # removes what is older, then what is later
        save_checkpoint(tmp_path, state(step), keep=1)
        assert_same(load_newest(tmp_path, unexpected), state(step))
    assert names(tmp_path) == ["step-000005", "step-000010-best", "step-000030.old", "step-99"]


def test_a_million_steps_come_after_less(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert_same(load_newest(tmp_path, unexpected), state(1_000_000))
    assert names(tmp_path) == ["step-1000000", "step-999999"]


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "never", unexpected) is None
    assert load_newest(tmp_path, unexpected) is None


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(10), keep=1)
    again = Checkpoint(10, {"p0": torch.ones(2)}, {"updates": 1})
    save_checkpoint(tmp_path, again, keep=1)
    assert_same(load_newest(tmp_path, unexpected), again)
    assert names(tmp_path) == ["step-000010"]


# --- damage ---------------------------------------------------------------------------------


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "state: one bit": lambda p: flip_byte(p / module.STATE),
    "state: cut off": lambda p: cut(p / module.STATE),
    "state: empty": lambda p: (p / module.STATE).write_bytes(b""),
    "state: gone": lambda p: (p / module.STATE).unlink(),
    "counters: one bit": lambda p: flip_byte(p / module.COUNTERS),
    "counters: gone": lambda p: (p / module.COUNTERS).unlink(),
    "manifest: gone": lambda p: (p / module.MANIFEST).unlink(),
    "manifest: cut off": lambda p: cut(p / module.MANIFEST),
    "manifest: no object": lambda p: (p / module.MANIFEST).write_text("[]"),
    "manifest: no text": lambda p: (p / module.MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "manifest: empty object": lambda p: (p / module.MANIFEST).write_text("{}"),
    "everything gone": lambda p: [f.unlink() for f in p.iterdir()] and None,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, state(10), keep=3)
    save_checkpoint(tmp_path, state(20), keep=3)
    damage(tmp_path / "step-000020")
    said: list[str] = []
    assert_same(load_newest(tmp_path, said.append), state(10))
    assert len(said) == 1 and "step-000020 is damaged" in said[0]


def test_all_damaged_is_none_and_says_so(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, state(step), keep=2)
        cut(tmp_path / f"step-{step:06d}" / module.STATE)
    said: list[str] = []
    assert load_newest(tmp_path, said.append) is None
    assert len(said) == 3 and "starting at step 0" in said[-1]


def test_a_damaged_later_checkpoint_never_displaces_a_good_one(tmp_path: Path) -> None:
    """Found by going back to 10 and saving 15 with keep 1: 20 is newer, but of no use."""
    save_checkpoint(tmp_path, state(10), keep=2)
    save_checkpoint(tmp_path, state(20), keep=2)
    cut(tmp_path / "step-000020" / module.STATE)
    save_checkpoint(tmp_path, state(15), keep=1)
    assert_same(load_newest(tmp_path, lambda text: None), state(15))
    assert "step-000020" not in names(tmp_path)


# --- interruption ---------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the process as far as the code under test can tell."""


STAGES = ["save_file", "_sha256", "_flush", "rename", "rmtree"]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_stage_leaves_a_usable_checkpoint(
    stage: str, same_step: bool, keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the same step is written anew, as Ctrl-C right after a resume does."""
    save_checkpoint(tmp_path, state(10), keep=keep)
    new = state(10 if same_step else 20)
    # The n-th call of the stage, for every n that is ever reached.
    for nth in range(1, 20):
        calls = 0
        target = {"rename": os, "rmtree": shutil}.get(stage, module)
        real = getattr(target, stage)

        def die(
            *args: object, real: Callable[..., object] = real, nth: int = nth, **kw: object
        ) -> object:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise Killed
            return real(*args, **kw)

        with monkeypatch.context() as patch:
            patch.setattr(target, stage, die)
            try:
                save_checkpoint(tmp_path, new, keep=keep)
            except Killed:
                found = load_newest(tmp_path, unexpected)
                assert found is not None, f"killed at call {nth} of {stage}"
                assert_same(found, state(found.step))
                continue
        break
    assert_same(load_newest(tmp_path, unexpected), new)
    if not same_step and keep == 2:
        assert names(tmp_path) == ["step-000010", "step-000020"]


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, state(10), keep=2)

    def full(tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, state(20), keep=2)
    assert_same(load_newest(tmp_path, unexpected), state(10))
    save_checkpoint(tmp_path, state(20), keep=2)
    assert names(tmp_path) == ["step-000010", "step-000020"], "what was left over is gone"


def test_a_killed_process_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    """A real SIGKILL while another process writes one checkpoint after another."""
    script = textwrap.dedent(
        """
        import itertools, sys, torch
        from pathlib import Path
        from npu_qat.training.checkpoint import Checkpoint, save_checkpoint
        for step in itertools.count(1):
            tensors = {f"p{i}": torch.full((64, 64), float(step)) for i in range(8)}
            save_checkpoint(Path(sys.argv[1]), Checkpoint(step, tensors, {"updates": step}), 2)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "step-000003").exists() and time.monotonic() < deadline:
            if any(path.name > "step-000003" for path in tmp_path.glob("step-*")):
                break
            time.sleep(0.01)
        time.sleep(0.137)
    finally:
        process.kill()
        process.wait()
    found = load_newest(tmp_path, unexpected)
    assert found is not None and found.step >= 3
    assert found.counters == {"updates": found.step}
    assert all((tensor == found.step).all() for tensor in found.state.values())
