"""Whole runs on a tiny random model: every stage of a real one in seconds.

Usage as a program: running.py CONFIG.json RUN_DIR; prints one line a step.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from npu_qat.config import RunConfig
from npu_qat.experiments.run import execute

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"device": "cpu", "threads": 1},
    "model": {"dtype": "bf16"},
    "quant": {},
    "lora": {"r": 4, "alpha": 8},
    "noise": {
        "enabled": True,
        "sigma_start": 0.05,
        "sigma_end": 0.01,
        "num_stages": 3,
    },
    "task": {"levels": [1], "train_size": 40, "test_size": 20},
    "train": {
        "steps": 3,
        "lr": 1e-3,
        "warmup_steps": 1,
        "micro_batch_size": 4,
        "checkpoint_every": 1,
    },
    # Rewards of a random model are zero; what differs in a group is the penalty for length.
    "dapo": {
        "dynamic_sampling": False,
        "prompts_per_rollout": 4,
        "generation_prompts": 4,
        "updates_per_rollout": 2,
        "overlong_buffer": 10,
        "gap_prompts": 2,
        # 4 bits magnify what bf16 rounds differently in another batch, and random models most.
        "logp_gap_limit": 0.5,
    },
    "rollout": {"num_generations": 4, "max_new_tokens": 12},
    "sft": {"batch_size": 8},
    "evaluation": {"problems": 8, "baselines": ["bf16", "ptq"]},
}

CLOCKS = {"time", "seconds", "rollout_seconds", "update_seconds", "tokens_per_second"}


def configuration(checkpoint: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """``SECTIONS`` on the model in ``checkpoint``, with the given keys changed."""
    names = {*SECTIONS, *sections}
    merged = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in names}
    merged["model"]["path"] = str(checkpoint)
    return merged


def carry_out(config: dict[str, Any], run_dir: Path, *, resume: bool = False) -> dict[str, Any]:
    """``execute`` with what it says kept in ``run_dir/../said.txt``."""
    config = {**config, "run": {**config["run"], "resume": "auto" if resume else "no"}}
    said = io.StringIO()
    try:
        return execute(RunConfig.model_validate(config), run_dir, Console(file=said, width=200))
    finally:
        run_dir.parent.joinpath("said.txt").write_text(said.getvalue())


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of the metrics, without what a clock decides."""
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [{k: v for k, v in json.loads(x).items() if k not in CLOCKS} for x in lines]


def results(run_dir: Path) -> dict[str, bytes]:
    """Everything that must not depend on interruptions: adapters, evaluations, samples."""
    files = [
        *run_dir.glob("adapters/*/adapter_model.safetensors"),
        *run_dir.glob("evaluations/*.jsonl"),
        *run_dir.glob("evaluations.json"),
        *run_dir.glob("samples.jsonl"),
        *run_dir.glob("checkpoints/*/*/state.safetensors"),
    ]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


if __name__ == "__main__":
    execute(
        RunConfig.model_validate_json(Path(sys.argv[1]).read_text()),
        Path(sys.argv[2]),
        Console(width=200),
    )
