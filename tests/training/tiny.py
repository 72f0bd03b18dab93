"""Small random models and batches for tests: seconds on one core, every mechanism of a real one."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from npu_qat.assets import DEMO_MODEL
from npu_qat.training.batches import Sample

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}


def tiny_model(
    family: str = "qwen2", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> torch.nn.Module:
    """A random decoder of ``family`` with weights large enough that quantisation matters."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**COMMON, **extra, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
    return model.to(dtype).eval()


def tiny_samples(count: int = 16, seed: int = 1) -> list[Sample]:
    """Prompts and completions of mixed lengths, both signs of advantage, some filtered out."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 96) for _ in range(rng.randint(low, high))]

    samples = []
    for i in range(count):
        completion = tokens(2, 9)
        samples.append(
            Sample(
                prompt=tokens(3, 8),
                completion=completion,
                weight=0.0 if i % 7 == 3 else 1.0,
                advantage=rng.uniform(-1.5, 1.5),
                rollout_logp=[rng.uniform(-5, -3) for _ in completion],
                old_logp=[rng.uniform(-5, -3.5) for _ in completion],
            )
        )
    return samples


def save_tiny_checkpoint(folder: Path, *, chat_template: bool = True, **changes: object) -> Path:
    """A random Qwen2 with the demo model's tokenizer, in Hugging Face's layout.

    Every sixth token ends a completion, so that a random model ends some of them.
    """
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    if not chat_template:
        tokenizer.chat_template = None
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512, **changes)
    stop = [tokenizer.eos_token_id, *range(20, len(tokenizer), 6)]
    model.generation_config.eos_token_id = stop
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
