"""The same steps by the package's own engine, in a process of its own: a process group of one stays
until the process ends, and a Trainer that finds one wraps its model for it.

Usage: engine_worker.py ROWS.pt RESULT.pt
"""

from __future__ import annotations

import sys

import torch

from npu_qat.config import DeepSpeedSection, TrainConfig
from npu_qat.noise import AQN
from npu_qat.training.batches import Sample, collate, completion_logp
from npu_qat.training.engine import Engine, launch_environment, shut_down
from tests.integrations.setting import NOISE, adapters, prepared


def main(rows: str, result: str) -> None:
    """One step for each [B, 12] in the file; losses and adapters go to ``result``."""
    given = torch.load(rows)
    launch_environment(torch.device("cpu"))
    handle, model = prepared(dtype=torch.float32)
    aqn = AQN(model, NOISE, total_steps=len(given["steps"]), seed=given["seed"])
    settings = TrainConfig(method="sft", lr=given["lr"], weight_decay=0.0)
    engine = Engine(model.train(), settings, DeepSpeedSection())
    engine.set_lr(given["lr"])
    losses = []
    for step, ids in enumerate(given["steps"]):
        samples = [Sample(row[:4], row[4:]) for row in ids.tolist()]
        batch = collate(samples, 0, engine.device)
        with handle.phase("training"), aqn.applied(step, "training"):
            loss = -(completion_logp(engine.ds, batch) * batch.mask).sum() / batch.mask.sum()
            engine.backward(loss, last=True)
            engine.step()
        losses.append(float(loss.detach()))
    torch.save({"losses": losses, "adapters": adapters(model)}, result)
    shut_down()


main(*sys.argv[1:])
