"""Four steps under DDP, by transformers' Trainer or by Accelerate and a loop of one's own.

Usage (under torchrun, or alone): ddp_worker.py trainer|accelerate FOLDER. Each rank prints a line
``RESULT {...}``: losses, a sum over the adapters, the noise that was on the norms.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from npu_qat.integrations import QATCallback
from npu_qat.layers import QuantizedModel
from npu_qat.noise import AQN
from tests.integrations.setting import NOISE, Rows, adapters, arguments, prepared

STEPS, LR, GLOBAL_BATCH = 4, 1e-2, 4


def by_trainer(handle: QuantizedModel, model: Any, folder: Path, world: int) -> list[float]:
    """The Trainer starts DDP by itself; ``ddp_backend`` because this machine has no GPU."""
    from transformers import Trainer

    args = arguments(
        folder,
        per_device_train_batch_size=GLOBAL_BATCH // world,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        ddp_backend="gloo" if world > 1 else None,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )
    trainer = Trainer(model, args, train_dataset=Rows(), callbacks=[QATCallback(handle, NOISE)])
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def by_accelerate(handle: QuantizedModel, model: Any, world: int) -> list[float]:
    """What docs/integrations.md shows, with the loss averaged over processes."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    aqn = AQN(model, NOISE, total_steps=STEPS, seed=7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=GLOBAL_BATCH // world)
    wrapped, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    losses = []
    for step, batch in zip(range(STEPS), loader, strict=False):
        with handle.phase("training"), aqn.applied(step, "training"):
            loss = wrapped(**batch).loss
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach()).mean()))
    handle.audit.verify(accelerator.unwrap_model(wrapped))
    return losses


def main(kind: str, folder: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    handle, model = prepared(dtype=torch.float32)
    norm, seen = handle.model.get_submodule("model.norm"), []
    norm.register_forward_pre_hook(lambda m, args: seen.append(m.weight.detach().sum().item()))
    if kind == "trainer":
        losses = by_trainer(handle, model, Path(folder), world)
    else:
        losses = by_accelerate(handle, model, world)
    total = sum(value.double().abs().sum().item() for value in adapters(model).values())
    result = {"losses": losses, "adapters": total, "noise": seen, "clean": norm.weight.sum().item()}
    print(f"RESULT {json.dumps(result)}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


main(*sys.argv[1:])
