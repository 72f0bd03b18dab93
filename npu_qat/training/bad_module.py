"""Where NaN or Inf first appears in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from npu_qat.training.batches import Batch


@torch.no_grad()
def first_bad_module(model: nn.Module, batch: Batch) -> str:
    """The first module, in order of execution, whose output holds NaN or Inf on ``batch``."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            floating = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            if floating and not found and not torch.isfinite(tensor).all():
                found.append(name)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "none (the logits are finite, the loss itself is not)"
