"""``train-step``: a whole LoRA step, beside 16-bit LoRA by PEFT.

Forward, next-token loss over the vocabulary, backward, AdamW on the adapters. Both have rank 32 on
every linear. The baseline is PEFT's own layer in pure bf16; ours keeps fp32 master weights of the
adapters. What of this project is not about 4 bits (fused norms and activations where the backend
has them, adapters that are added by the matmul) is a 16-bit row of its own, ``bf16-fused``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from npu_qat.bench import models
from npu_qat.bench.rows import Row, Setup, working
from npu_qat.bench.timing import accelerator

GPU_BATCH, CPU_BATCH, QUICK_BATCH = (4, 2048), (64, 96), (2, 32)


@dataclass
class Trainee:
    """A model with adapters and the optimiser of them."""

    model: Any
    optimizer: torch.optim.Optimizer
    ids: torch.Tensor

    def step(self) -> None:
        """One update; the model is in training mode."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()


def rows(setup: Setup) -> Iterator[Row]:
    """Rows with and without gradient checkpointing, for both storages."""
    name = models.QWEN if setup.on_gpu else models.DEMO
    changes = {"num_hidden_layers": 2} if setup.quick and setup.on_gpu else {}
    batch = QUICK_BATCH if setup.quick else GPU_BATCH if setup.on_gpu else CPU_BATCH
    for checkpointing in (False, True):
        yield from steps(setup, name, models.architecture(name, **changes), batch, checkpointing)


def steps(
    setup: Setup,
    name: str,
    config: Any,
    batch: tuple[int, int],
    checkpointing: bool,
    arms: tuple[str, ...] | None = None,
    label: str = "",
) -> Iterator[Row]:
    """Rows of ``arms`` on one architecture and one batch [sequences, tokens]."""
    arms = models.arms(setup.selection) if arms is None else arms
    trainees = {arm: _trainee(setup, config, batch, arm, checkpointing) for arm in ("bf16", *arms)}
    mode = "checkpointing" if checkpointing else "plain"
    label = label or f"{name}/{batch[0]}x{batch[1]}-tokens/{mode}"
    calls = working({arm: t.step for arm, t in trainees.items()}, label, setup.note)
    times = setup.clock.measure(calls, repeats=max(5, setup.clock.repeats // 2))
    peak = {arm: _peak(setup, step) for arm, step in calls.items()}
    for arm in list(calls)[1:]:
        yield Row.of_times(
            f"train-step/{models.arm_name(arm)}/{label}",
            times[arm],
            times["bf16"],
            peak_gib=peak[arm],
            baseline_peak_gib=peak["bf16"],
        )
    del trainees, calls
    gc.collect()
    if setup.on_gpu:
        accelerator(setup.selection.device).empty_cache()


def _trainee(
    setup: Setup, config: Any, batch: tuple[int, int], arm: str, checkpointing: bool
) -> Trainee:
    device = setup.selection.device
    base = models.random_model(config, device)
    if arm == models.FUSED:
        model = models.fused_lora(base, setup.selection)
    elif arm == "bf16":
        model = models.sixteen_bit_lora(base)
    else:
        model, _ = models.quantized_lora(base, models.recipe(arm), setup.selection)
    if checkpointing:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type in ("cuda", "cpu"))
    ids = torch.randint(0, config.vocab_size, batch, device=device)
    return Trainee(model, optimizer, ids)


def _peak(setup: Setup, step: Callable[[], None]) -> float:
    """GiB that one step adds to what was allocated before it; 0 on a CPU."""
    if not setup.on_gpu:
        return 0.0
    device = accelerator(setup.selection.device)
    device.synchronize()
    device.reset_peak_memory_stats()
    before = device.memory_allocated()
    step()
    device.synchronize()
    return float(device.max_memory_allocated() - before) / 2**30
