"""A learner on a tiny random model and the demo's tokenizer, for the tests of the loops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from npu_qat.assets import DEMO_MODEL
from npu_qat.config import RunConfig
from npu_qat.layers import QuantizedModel, add_lora, prepare_model
from npu_qat.noise import AQN
from npu_qat.tasks import load_task
from npu_qat.training.engine import Engine
from npu_qat.training.loop import Learner
from npu_qat.training.rundir import RunDirectory
from tests.training.tiny import tiny_model

BASE: dict[str, Any] = {
    "model": {"dtype": "fp32"},
    "lora": {"r": 4, "alpha": 8},
    "task": {"levels": [1], "train_size": 40, "test_size": 20},
    "train": {"steps": 3, "lr": 1e-3, "warmup_steps": 0, "micro_batch_size": 8},
    "dapo": {
        "prompts_per_rollout": 4,
        "generation_prompts": 4,
        "updates_per_rollout": 2,
        "dynamic_sampling": False,
        "overlong_buffer": 4,
        "gap_prompts": 2,
    },
    "rollout": {"num_generations": 4, "max_new_tokens": 10},
    "sft": {"batch_size": 8},
}


def run_config(**sections: dict[str, Any]) -> RunConfig:
    """``BASE`` with the given keys of the given sections changed."""
    names = {*BASE, *sections}
    merged = {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in names}
    return RunConfig.model_validate(merged)


@functools.cache
def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def adapted_model(
    config: RunConfig, *, live: bool = False
) -> tuple[nn.Module, QuantizedModel | None]:
    """A tiny model that speaks the demo's tokens, quantised, with adapters."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.dtype]
    vocabulary = len(demo_tokenizer())
    model = tiny_model(dtype=dtype, vocab_size=vocabulary, max_position_embeddings=512)
    handle = None
    if config.quant.injection_point != "none":
        handle = prepare_model(model, config.quant)
    adapted = add_lora(model, config.lora, config.run.seed)
    if live:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    generator = torch.Generator().manual_seed(sum(map(ord, name)))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted.train(), handle


def make_learner(
    folder: Path,
    config: RunConfig | None = None,
    *,
    live: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Learner:
    """A learner whose records go to ``folder``; ``learner.said`` collects its lines."""
    config = config or run_config()
    adapted, handle = adapted_model(config, live=live)
    steps = config.train.steps or 3
    aqn = None
    if config.noise.enabled:
        aqn = AQN(adapted, config.noise, total_steps=steps, seed=config.run.seed)
    rundir = RunDirectory(folder)
    rundir.prepare(resume=True, bytes_needed=0)
    said: list[str] = []
    tokenizer = demo_tokenizer()
    learner = Learner(
        "w4a4",
        config,
        Engine(adapted, config.train, config.deepspeed),
        handle,
        aqn,
        tokenizer,
        # Many, so that a random model ends some of its completions.
        [tokenizer.eos_token_id, *range(20, len(tokenizer), 6)],
        load_task(config.task),
        steps,
        rundir,
        said.append,
        should_stop,
    )
    learner.said = said
    return learner


def adapters(learner: Learner) -> dict[str, torch.Tensor]:
    """A copy of the trained parameters by name."""
    return {n: p.detach().clone() for n, p in learner.engine.trainable.items()}
