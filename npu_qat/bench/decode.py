"""``decode``: sampling tokens as rollouts do, beside the 16-bit model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from npu_qat.bench import models
from npu_qat.bench.rows import Row, Setup, working

BATCHES = (8, 64)
PROMPT_TOKENS, GPU_TOKENS, CPU_TOKENS = 64, 256, 64


def rows(setup: Setup) -> Iterator[Row]:
    """Rows a batch size and storage; ``ms`` is one decoding step of the whole batch.

    Every row of a batch samples to the limit (no token ends a completion), by the same sampler
    that trains and evaluates, prefill included.
    """
    name = models.QWEN if setup.on_gpu else models.DEMO
    changes = {"num_hidden_layers": 2} if setup.quick and setup.on_gpu else {}
    config = models.architecture(name, **changes)
    # FP8 is not for few rows, which read the packed weight.
    names = [arm for arm in models.arms(setup.selection) if arm not in models.FP8]
    arms = {arm: _model(setup, config, arm) for arm in ("bf16", *names)}
    new_tokens = 8 if setup.quick else GPU_TOKENS if setup.on_gpu else CPU_TOKENS
    for batch in BATCHES[:1] if setup.quick else BATCHES:
        samplers = {a: partial(_sample, model, batch, new_tokens) for a, model in arms.items()}
        calls = working(samplers, f"batch-{batch}", setup.note)
        times = setup.clock.measure(calls, repeats=max(3, setup.clock.repeats // 3))
        for arm in list(calls)[1:]:
            row = Row.of_times("", times[arm], times["bf16"])
            per_step = 1 / new_tokens
            yield Row(
                f"decode/{models.arm_name(arm)}/{name}/batch-{batch}/{new_tokens}-tokens",
                row.value * per_step,
                row.baseline * per_step,
                details={
                    "tokens_per_second": batch * new_tokens / row.value * 1e3,
                    "baseline_tokens_per_second": batch * new_tokens / row.baseline * 1e3,
                },
            )


def _model(setup: Setup, config: Any, arm: str) -> Any:
    from npu_qat.layers import prepare_model

    model = models.random_model(config, setup.selection.device)
    if arm in models.STORAGES:
        prepare_model(model, models.recipe(arm), setup.selection.backend)
    return models.fused(model, setup.selection) if arm == models.FUSED else model


def _sample(model: Any, batch: int, new_tokens: int) -> None:
    from npu_qat.training.rollout import SamplingParams, sample

    prompts = [[1 + (i + j) % 500 for j in range(PROMPT_TOKENS)] for i in range(batch)]
    sample(
        model,
        prompts,
        [(i,) for i in range(batch)],
        SamplingParams(new_tokens),
        eos_ids=[-1],
        pad_id=0,
        batch_size=batch,
    )
