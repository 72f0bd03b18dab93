"""A checkpoint of N processes goes on with M, at any ZeRO stage: the same data, the same metrics.

In fp32, where another split of the rows changes the last digits only. The continued runs start from
a copy of a whole run from which everything after the checkpoint of step 2 was removed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.experiments.running import configuration, metrics
from tests.training.launching import launch
from tests.training.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.distributed

STEPS, KEPT = 4, 2


def run(processes: int, stage: int, model: Path, output: Path, *, resume: bool = False) -> Path:
    config = configuration(
        model,
        model={"dtype": "fp32"},
        train={"steps": STEPS, "checkpoint_every": 2, "keep_checkpoints": 9, "micro_batch_size": 3},
        evaluation={"problems": 7, "baselines": []},
        deepspeed={"zero_stage": stage},
    )
    path = output.parent / f"{output.name}.yaml"
    path.write_text(json.dumps(config))
    job = ["-m", "npu_qat", "train", str(path), "--output", str(output)]
    job += ["--resume", "auto"] if resume else []
    printed = launch("torchrun" if processes > 1 else "python", processes, job)
    assert ("going on after step 2 of 4" in printed) is resume
    return output


def cut(whole: Path, target: Path) -> Path:
    """A copy of a run as it was after the checkpoint of step ``KEPT``."""
    shutil.copytree(whole, target)
    shutil.rmtree(target / "checkpoints" / "w4a4" / f"step-{STEPS:06d}")
    for name in ("evaluations", "adapters"):
        shutil.rmtree(target / name)
    for name in ("summary.json", "audit.json", "report.html"):
        (target / name).unlink()
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("worlds")
    save_tiny_checkpoint(made / "model")
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    return run(1, 0, folder / "model", folder / "one")


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    return run(2, 2, folder / "model", folder / "two")


@pytest.mark.parametrize(
    ("begun", "processes", "stage"), [("one", 2, 2), ("two", 1, 0), ("two", 2, 3)]
)
def test_a_run_goes_on_with_another_number_of_processes(
    begun: str, processes: int, stage: int, folder: Path, request: pytest.FixtureRequest
) -> None:
    whole: Path = request.getfixturevalue(begun)
    target = cut(whole, folder / f"{begun}-on-{processes}-stage-{stage}")
    run(processes, stage, folder / "model", target, resume=True)
    assert_same(target, whole)


def assert_same(found: Path, whole: Path) -> None:
    mine, theirs = metrics(found), metrics(whole)
    assert len(mine) == len(theirs) == STEPS
    assert mine[:KEPT] == theirs[:KEPT], "what was before the checkpoint is kept"
    for line, other in zip(mine[KEPT:], theirs[KEPT:], strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
            else:
                assert value == other[key], key
    # The same problems in the same order, and the same completions of them.
    assert (found / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for name in ("w4a4_ptq", "w4a4_trained"):
        path = Path("evaluations") / f"{name}.jsonl"
        if (whole / path).exists():
            assert (found / path).read_text() == (whole / path).read_text()
    assert json.loads((found / "summary.json").read_text())["audit"] == "pass"
