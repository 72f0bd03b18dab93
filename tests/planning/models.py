"""Small decoders, quantised and with adapters, for the tests of the plan."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from npu_qat.backends import Backend, EmulationBackend
from npu_qat.bench.models import random_model
from npu_qat.config import LoraSection, ModelConfig, Recipe, RunConfig
from npu_qat.layers import QuantizedModel, add_lora, prepare_model
from npu_qat.layers.plan import plan_linears
from npu_qat.planning.facts import ModelFacts, model_facts
from npu_qat.planning.model import architecture, build_on_meta

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


class FusingBackend(EmulationBackend):
    """The emulation, with norms and activations that go through the fused modules as CUDA's do."""

    name = "fusing"

    def fuses(self, x: torch.Tensor, profile: str | None, *, row: bool) -> bool:
        return True

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        profile: str | None = None,
        tensor_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        y = F.rms_norm(x, weight.shape, weight, eps)
        return y, None if profile is None else self.fake_quant(y, profile)

    def rms_norm_backward(self, grad_y: Any, grad_q: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(x)

    def silu_mul(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        profile: str | None = None,
        tensor_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        y = F.silu(gate) * up
        return y, None if profile is None else self.fake_quant(y, profile)

    def silu_mul_backward(
        self, grad_y: Any, grad_q: Any, gate: torch.Tensor, up: torch.Tensor, slope: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(gate), torch.zeros_like(up)


def run_config(
    storage: str = "image", rank: int = 8, profile: str = "ascend950", dtype: str = "bf16"
) -> RunConfig:
    """A run with adapters on every linear. ``profile``: of the activations."""
    return RunConfig(
        model=ModelConfig(dtype=dtype),
        quant=Recipe(base_storage=storage, activation_profile=profile),
        lora=LoraSection(r=rank, alpha=rank),
    )


def small_architecture(name: str = "qwen2.5-1.5b", **changes: int) -> Any:
    """A narrow model of the architecture ``name``."""
    shape = SMALL | ({"head_dim": 32} if name.startswith("qwen3") else {}) | changes
    return architecture(name, **shape)


def facts_of_small(
    name: str = "qwen2.5-1.5b", storage: str = "image", rank: int = 8, **changes: int
) -> ModelFacts:
    """The counts of ``adapted_model`` with the same arguments."""
    config, shape = run_config(storage, rank), small_architecture(name, **changes)
    model = build_on_meta(shape, config.model)
    return model_facts(model, shape, plan_linears(model, config.quant), config)


def adapted_model(
    name: str = "qwen2.5-1.5b",
    storage: str = "image",
    rank: int = 8,
    backend: Backend | None = None,
    **changes: int,
) -> tuple[Any, QuantizedModel]:
    """The real thing: a random model, quantised, with adapters, in training mode."""
    config = run_config(storage, rank)
    model = random_model(small_architecture(name, **changes), torch.device("cpu"))
    handle = prepare_model(model, config.quant, backend)
    adapted = add_lora(model, config.lora, seed=0)
    return adapted.train(), handle
