"""Rollouts by an engine in the DeepSpeed processes of one machine: one engine a process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.running import configuration, metrics
from tests.training.launching import environment, launch
from tests.training.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.distributed

STEPS = 2


def run(folder: Path, processes: int) -> tuple[Path, list[dict[str, Any]]]:
    """The run's folder, and what each engine saw."""
    folder.mkdir()
    config = configuration(
        save_tiny_checkpoint(folder / "model"),
        rollout={"engine": "vllm", "engine_format": "ascend", "num_generations": 4}
        | {"max_new_tokens": 6, "max_prompt_tokens": 256},
        noise={"norm_dtype": "model", "zero_first_stage": False},
        train={"steps": STEPS, "checkpoint_every": 2},
        dapo={"prompts_per_rollout": 2, "generation_prompts": 2, "updates_per_rollout": 1}
        | {"overlong_buffer": 4},
        evaluation={"problems": 4, "baselines": []},
    )
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    worker = str(Path(__file__).with_name("engine_worker.py"))
    launcher = "torchrun" if processes > 1 else "python"
    env = environment({"DS_ACCELERATOR": "cpu"})
    launch(launcher, processes, [worker, str(path), str(folder / "run")], env=env)
    saw = [json.loads((folder / f"engine-{r}.json").read_text()) for r in range(processes)]
    return folder / "run", saw


def test_each_process_has_an_engine_of_its_own_and_the_policy_reaches_all(tmp_path: Path) -> None:
    alone, (single,) = run(tmp_path / "one", 1)
    shared, both = run(tmp_path / "two", 2)
    for saw in (single, *both):
        assert saw["launcher"] == [], "the engine would take the run's process group for its own"
        # At the start and after every update but the last, whose policy is not sampled from.
        assert saw["adapters"] >= STEPS
        assert sum(saw["norms"]) > 5, "the noise of AQN was pushed, and taken away"
    # The share of the rows that the other process has is not sampled here.
    assert all(0 < saw["rows"] < single["rows"] for saw in both)
    for folder in (alone, shared):
        audit = json.loads((folder / "audit.json").read_text())
        assert audit["verdict"] == "pass"
        (proof,) = (c for c in audit["checks"] if c["name"].startswith("rollouts by vllm"))
        assert proof["ok"]
    # Before the first update, both sample the same completions of the same policy.
    mine, other = metrics(shared)[0], metrics(alone)[0]
    for key in ("reward_mean", "completion_length_mean", "engine_gap_mean"):
        assert mine[key] == pytest.approx(other[key], abs=1e-6), key
