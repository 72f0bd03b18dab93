"""Two ranks, one of which computes NaN: both must end, and say where it came from.

Usage: torchrun ... nan_worker.py FOLDER STAGE ...; writes the messages to FOLDER/RANK-STAGE.txt,
since lines that two processes print can run into each other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from npu_qat.training.engine import TrainingError, launch_environment, shut_down, world
from tests.training.learning import make_learner, run_config


def run_case(stage: int, rank: int, folder: Path) -> str:
    """The message with which the second step ends."""
    config = run_config(train={"method": "sft"}, deepspeed={"zero_stage": stage})
    learner = make_learner(folder / f"{rank}-{stage}", config)
    learner.method.step(0)
    if rank == 1:
        norm = learner.engine.model.base_model.model.model.layers[1].input_layernorm
        norm.register_forward_pre_hook(lambda module, args: (args[0] * float("nan"),))
    try:
        learner.method.step(1)
    except TrainingError as error:
        return str(error)
    return "no error"


def main() -> None:
    launch_environment(torch.device("cpu"))
    rank, _ = world()
    folder = Path(sys.argv[1])
    for stage in sys.argv[2:]:
        message = run_case(int(stage), rank, folder)
        (folder / f"{rank}-{stage}.txt").write_text(message)
    shut_down()


if __name__ == "__main__":
    main()
