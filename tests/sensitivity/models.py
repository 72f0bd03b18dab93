"""Small models and texts to scan."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from npu_qat.sensitivity import Text

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": False}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
}


def tiny(architecture: str = "qwen2", **changes: Any) -> Any:
    """A random decoder in bf16."""
    config, model, extra = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    return model(config(**{**SHAPE, **extra, **changes})).to(torch.bfloat16).eval()


def texts(count: int = 5) -> list[Text]:
    """Texts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(0, 64, (12 + 3 * i,), generator=generator).tolist()
        made.append(Text(tuple(ids[: 5 + i]), tuple(ids[5 + i :])))
    return made
