"""Loading the 16-bit checkpoint and its tokenizer: local, offline first, checked."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from npu_qat.config import ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def model_source(config: ModelConfig) -> str:
    """The folder or hub name that ``config.path`` stands for."""
    if config.path == "demo":
        from npu_qat.assets import demo_model_path

        return str(demo_model_path())
    return config.path


def load_base(config: ModelConfig, device: torch.device) -> tuple[Any, Any]:
    """The model in ``config.dtype`` on ``device``, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: the path is no model folder and cannot be had from the hub either, or the
            tokenizer has no chat template.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_source(config)
    if config.path == "demo" or not sys.stderr.isatty():
        _hide_progress_bars()
    common = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[config.dtype], attn_implementation=config.attention, **common
        )
    except (OSError, ValueError, SafetensorError) as error:
        hint = "" if Path(source).exists() else " (no such folder; is the hub reachable?)"
        raise ValueError(f"model.path {config.path!r} cannot be loaded{hint}: {error}") from error
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {config.path!r} has no chat template; use a chat model")
    return model.to(device).eval(), tokenizer


def _hide_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    # transformers warns about a name that PEFT uses; the user can do nothing about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat prompt that asks for the assistant's answer."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(ids)


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of an assistant's answer, with the token that ends it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the generation config's and the tokenizer's.

    Raises:
        ValueError: there is none, so that no completion would ever end.
    """
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    found = sorted(i for i in ids if i is not None)
    if not found:
        raise ValueError(
            "no end-of-sequence token, neither in the model's generation config nor in its "
            "tokenizer, so no completion would ever end; set eos_token_id in one of them"
        )
    return found
