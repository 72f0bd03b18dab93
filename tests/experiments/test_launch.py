"""The same run by plain Python, torchrun and the deepspeed launcher: the same results.

In fp32, where another split of the rows over processes changes nothing but the last digits.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.running import configuration, metrics
from tests.training.launching import environment, launch
from tests.training.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.distributed


def job(folder: Path, **sections: dict[str, Any]) -> list[str]:
    """``npu-qat train`` of both arms into ``folder/run``, on a checkpoint of its own."""
    model = save_tiny_checkpoint(folder / "model")
    config = configuration(
        model,
        model={"dtype": "fp32"},
        evaluation={"problems": 7, "baselines": ["bf16", "ptq", "bf16_lora"], "every": 2},
        train={"steps": 3, "checkpoint_every": 2, "micro_batch_size": 3},
        **sections,
    )
    path = folder / "config.yaml"  # JSON is YAML
    path.write_text(json.dumps(config))
    output = str(folder / "run")
    return ["-m", "npu_qat", "train", str(path), "--device", "cpu", "--output", output]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process without a launcher, a compiler or MPI in reach."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "bin").mkdir()
    extensions = folder / "extensions"
    env = environment({"PATH": str(folder / "bin"), "TORCH_EXTENSIONS_DIR": str(extensions)})
    for name in ("CC", "CXX"):
        env.pop(name, None)
    launch("python", 1, job(folder), env=env)
    assert not extensions.exists(), "something was compiled"
    return folder / "run"


def test_plain_python_needs_no_launcher_no_compiler_and_no_mpi(plain: Path) -> None:
    assert importlib.util.find_spec("mpi4py") is None, "this environment proves nothing about MPI"
    assert json.loads((plain / "summary.json").read_text())["audit"] == "pass"


@pytest.mark.parametrize(
    ("launcher", "stage", "storage"), [("torchrun", 2, "packed"), ("deepspeed", 3, "image")]
)
def test_two_processes_give_the_same_run(
    launcher: str, stage: int, storage: str, plain: Path, tmp_path: Path
) -> None:
    sections = {"deepspeed": {"zero_stage": stage}, "quant": {"base_storage": storage}}
    # The launcher asks DeepSpeed's accelerator how many devices there are.
    env = environment({"DS_ACCELERATOR": "cpu"})
    printed = launch(launcher, 2, job(tmp_path, **sections), env=env)
    assert_same_run(tmp_path / "run", plain)
    assert printed.count("w4a4 3/3") == 1, "one rank speaks"


def assert_same_run(found: Path, wanted: Path) -> None:
    for name in (path.name for path in (wanted / "evaluations").iterdir()):
        assert (found / "evaluations" / name).read_text() == (
            wanted / "evaluations" / name
        ).read_text(), name
    mine, theirs = metrics(found), metrics(wanted)
    assert len(mine) == len(theirs) == 8
    for line, other in zip(mine, theirs, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            if isinstance(value, float):
                # Losses and gaps that cancel to nothing are nothing but rounding.
                assert value == pytest.approx(other[key], rel=2e-3, abs=2e-5), key
            else:
                assert value == other[key], key
    summary, audit = (json.loads((found / f"{n}.json").read_text()) for n in ("summary", "audit"))
    assert summary["audit"] == "pass" and len(summary["arms"]) == 5
    assert all(check["ok"] for check in audit["checks"])
