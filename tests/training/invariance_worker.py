"""Run a few updates on a fixed global batch and print what must not depend on the launch.

Usage: torchrun ... invariance_worker.py STAGE:MICRO_BATCH:DTYPE ...; one line of JSON a case.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

from npu_qat.config import DapoConfig, DeepSpeedSection, LoraSection, Recipe, RunConfig, TrainConfig
from npu_qat.layers import add_lora, prepare_model
from npu_qat.training.dapo import Dapo, _Totals
from npu_qat.training.engine import Engine, launch_environment, shut_down
from tests.training.tiny import tiny_model, tiny_samples


def run_case(stage: int, micro: int, dtype: torch.dtype) -> dict[str, Any]:
    """Four updates, with a state that goes out and in after the third."""
    model = tiny_model(dtype=dtype)
    handle = prepare_model(model, Recipe(base_storage="packed"))
    adapted = add_lora(model, LoraSection(r=4, alpha=8), seed=3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    # Sums in another order differ in their last bits. Through a larger step that is enough to move
    # an activation across the threshold between two 4-bit codes, which is no last bit any more.
    train = TrainConfig(lr=3e-4, micro_batch_size=micro, weight_decay=0.1)
    engine = Engine(adapted.train(), train, DeepSpeedSection(zero_stage=stage))
    config = RunConfig(
        train=train,
        dapo=DapoConfig(
            prompts_per_rollout=4, updates_per_rollout=1, clip_ratio_c=3.0, overlong_buffer=4
        ),
    )
    learner = SimpleNamespace(
        config=config,
        engine=engine,
        pad_id=0,
        teacher=None,
        check_loss=lambda *a: None,
        optimizer_step=lambda step: engine.step(),
    )
    dapo = Dapo(learner)
    norms, metrics = [], []
    with handle.phase("training"):
        for step in range(3):
            totals = _Totals()
            norms.append(dapo._update(step, tiny_samples(seed=step), totals))
            metrics.append(totals.metrics(engine, "off"))
    state = engine.state()
    engine.set_adam_step(7)
    engine.load_state(state, 3)
    again = engine.state()
    assert all(torch.equal(state[k], again[k]) for k in state), "state does not round-trip"
    with engine.for_generation() as whole, torch.no_grad():
        logits = whole(input_ids=torch.arange(3, 19)[None]).logits.double().sum().item()
    with handle.phase("training"):
        norms.append(dapo._update(3, tiny_samples(seed=3), _Totals()))
    sums = {k: v.double().abs().sum().item() for k, v in sorted(engine.state().items())}
    return {
        "norms": norms,
        "metrics": metrics,
        "sums": sums,
        "logits": logits,
        "first": dict(sorted(engine.first_gradients.items())),
        "rank": engine.rank,
        "world_size": engine.world_size,
    }


def main() -> None:
    launch_environment(torch.device("cpu"))
    for case in sys.argv[1:]:
        stage, micro, dtype = case.split(":")
        result = run_case(int(stage), int(micro), getattr(torch, dtype))
        if result["rank"] == 0:
            print("RESULT " + json.dumps({"case": case, **result}), flush=True)
    shut_down()


if __name__ == "__main__":
    main()
