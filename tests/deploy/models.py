"""Small checkpoints on disk, exports of them, and the tools to damage one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from npu_qat.config import ModelConfig, Recipe
from npu_qat.deploy import AscendWriter, CompressedTensorsWriter, PackedCore, open_checkpoint
from npu_qat.deploy.checksums import CHECKSUMS, write_checksums
from npu_qat.deploy.export import Exported, export

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
NVFP4 = Recipe(injection_point="weight", weight_profile="nvfp4")
W4A16 = Recipe(injection_point="weight")
WRITERS = {"ascend": AscendWriter, "compressed-tensors": CompressedTensorsWriter}


def tiny(family: str = "qwen2", *, seed: int = 0, **changes: Any) -> Any:
    """A random model in bf16, biases and norms not at their trivial values."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, "tie_word_embeddings": True, **extra, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1 * ("norm" in name or 1))
    return model.to(torch.bfloat16).eval()


def save(folder: Path, family: str = "qwen2", *, shard: str = "5GB", **changes: Any) -> Path:
    """A checkpoint in Hugging Face's layout, without a tokenizer."""
    tiny(family, **changes).save_pretrained(folder, max_shard_size=shard)
    return folder


def core_of(source: Path, recipe: Recipe | None = None, **options: Any) -> PackedCore:
    dtype = options.pop("dtype", "bf16")
    checkpoint = open_checkpoint(ModelConfig(path=str(source), dtype=dtype))
    return PackedCore(checkpoint, recipe or Recipe(), **options)


def export_tiny(
    folder: Path,
    format: str = "ascend",
    recipe: Recipe | None = None,
    *,
    source: Path | None = None,
    **changes: Any,
) -> Exported:
    """An export of a random model into ``folder / "served"``."""
    source = source or save(folder / "source", **changes)
    return export(core_of(source, recipe), WRITERS[format](), folder / "served")


def save_adapter(folder: Path, seed: int = 0, size: float = 0.02, **changes: Any) -> Path:
    """A random LoRA adapter for ``tiny`` with B not zero, in PEFT's format."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny(**changes), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, size)
    model.save_pretrained(folder)
    return folder


def damage(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], *, reseal: bool = True
) -> None:
    """Change the tensors of an export of one file and bring index and checksums up to date."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    (index,) = folder.glob("*.index.json")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
    if reseal:
        write_checksums(folder)


def damage_json(
    folder: Path, name: str, edit: Callable[[dict[str, Any]], object], *, reseal: bool = True
) -> None:
    """Change a JSON file of an export and bring the checksums up to date."""
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))
    if reseal and (folder / CHECKSUMS).exists():
        write_checksums(folder)
