"""Models to measure: the architecture is real, the weights are random, nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npu_qat.backends import Selection
from npu_qat.config import LoraSection, Recipe

QWEN = "qwen2.5-1.5b"
DEMO = "demo"
LORA_RANK = 32
STORAGES = ("image", "packed")
# The same with ``matmul: fused`` where a backend offers that without taking it by itself.
FP8 = ("image-fp8", "packed-fp8")
FUSED = "bf16-fused"
_ARCHITECTURES = Path(__file__).parents[1] / "assets"
_FILES = {
    QWEN: _ARCHITECTURES / "architectures" / "Qwen--Qwen2.5-1.5B-Instruct.json",
    DEMO: _ARCHITECTURES / "demo_model" / "config.json",
}


def architecture(name: str, **changes: Any) -> Any:
    """The transformers configuration of ``name``, with some keys changed."""
    from transformers import AutoConfig

    keys = json.loads(_FILES[name].read_text(encoding="utf-8"))
    keys.pop("layer_types", None)  # one a layer; the number of layers may be changed
    return AutoConfig.for_model(**{**keys, **changes})


def random_model(config: Any, device: torch.device, seed: int = 0) -> Any:
    """A bf16 causal language model with random weights, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def sixteen_bit_lora(model: nn.Module) -> Any:
    """``model`` with adapters as PEFT makes them, all in bf16: the fastest plain LoRA."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def quantized_lora(model: nn.Module, recipe: Recipe, selection: Selection) -> tuple[Any, Any]:
    """``model`` quantised in place with this project's adapters, and its handle."""
    from npu_qat.layers import add_lora, prepare_model

    handle = prepare_model(model, recipe, selection.backend)
    return add_lora(model, LoraSection(r=LORA_RANK, alpha=LORA_RANK), seed=0), handle


def fused_lora(model: nn.Module, selection: Selection) -> Any:
    """A 16-bit ``model`` with everything of this project's that is not about 4 bits: fused norms
    and activations, and its adapters."""
    from npu_qat.layers import add_lora

    model.requires_grad_(False)
    return add_lora(fused(model, selection), LoraSection(r=LORA_RANK, alpha=LORA_RANK), seed=0)


def fuses(selection: Selection) -> bool:
    """Whether the backend has fused norms and activations, which help 16 bits as well."""
    from npu_qat.layers.fusion import ProducerBackend

    return isinstance(selection.backend, ProducerBackend)


def storages(selection: Selection) -> tuple[str, ...]:
    """Quantised arms: how the weight is stored, and who multiplies."""
    from npu_qat.backends import FusedOnRequest

    return (*STORAGES, *FP8) if isinstance(selection.backend, FusedOnRequest) else STORAGES


def arms(selection: Selection) -> tuple[str, ...]:
    """What stands beside the 16-bit baseline."""
    return (*storages(selection), *((FUSED,) if fuses(selection) else ()))


def arm_name(arm: str) -> str:
    """An arm in the name of a row."""
    return arm if arm == FUSED else f"{arm}-ascend950"


def fused(model: nn.Module, selection: Selection) -> nn.Module:
    """A 16-bit ``model`` with the backend's fused norms and activations, in place."""
    from npu_qat.layers.fusion import fuse
    from npu_qat.layers.quant_linear import QuantState

    fuse(model, QuantState(recipe("image"), selection.backend))
    return model


def recipe(arm: str, profile: str = "ascend950") -> Recipe:
    """W4A4 in ``profile`` with the base in ``image`` or ``packed`` storage; ``-fp8``: fused."""
    storage, _, fp8 = arm.partition("-")
    matmul = "fused" if fp8 else "auto"
    return Recipe(
        base_storage=storage, weight_profile=profile, activation_profile=profile, matmul=matmul
    )
