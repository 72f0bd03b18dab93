"""What the callback refuses before training: settings and models that would train something else.

Each would run without an error and without the 4-bit numbers, or fail far from its cause.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import TrainingArguments

from npu_qat.layers import QuantizedModel
from npu_qat.layers.lora import QatLoraLinear


def refuse_settings(args: TrainingArguments) -> None:
    """Raise ``ValueError`` for a trainer that goes past the prepared modules."""
    for reason in _reasons(args):
        raise ValueError(f"QATCallback refuses {reason}")


def _reasons(args: TrainingArguments) -> Iterator[str]:
    if getattr(args, "use_vllm", False):
        yield (
            "use_vllm: TRL merges the adapters into 16-bit weights and sends those to vLLM, so "
            "rollouts would come from another model than the one that is trained. Set "
            "use_vllm=False, or use npu-qat train with rollout.engine: vllm, which loads the "
            "4-bit base once and sends only the adapters"
        )
    if getattr(args, "use_transformers_continuous_batching", False):
        yield (
            "use_transformers_continuous_batching: it casts the whole model, the fp32 master "
            "weights of the adapters included, and calls another method than generate; set it to "
            "False"
        )
    if args.torch_compile:
        yield "torch_compile: the audit cannot look into compiled layers; set it to False"
    if args.n_gpu > 1 and args.parallel_mode.value == "not_distributed":
        yield (
            "several GPUs in one process (DataParallel), which copies the modules behind the "
            "audit's back; start one process a GPU with torchrun or accelerate launch, or show "
            "one GPU only"
        )
    if _shards_weights(args):
        yield (
            "ZeRO-3 and FSDP, which shard the frozen weights that the audit reads; use DDP or "
            "ZeRO-2 here, or npu-qat train, which runs at every ZeRO stage"
        )


def _shards_weights(args: TrainingArguments) -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

    return bool(args.fsdp) or is_fsdp_enabled() or is_deepspeed_zero3_enabled()


def refuse_model(quantized: QuantizedModel, model: nn.Module, args: TrainingArguments) -> None:
    """Raise ``ValueError`` if ``model`` cannot train as its recipe says."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing of this model is trainable: prepare_model froze the base; add adapters by "
            "npu_qat.add_lora, or give the trainer a peft_config"
        )
    if quantized.needs_calibration:
        raise ValueError(
            "the activation profile has static scales that are not set yet; run "
            "handle.calibrate(...) on some prompts before training"
        )
    recipe = quantized.recipe
    special = {recipe.lora_input, recipe.lora_output} != {"full"}
    if special and not any(isinstance(m, QatLoraLinear) for m in model.modules()):
        raise ValueError(
            "PEFT's own LoRA layer does not know the recipe's lora_input and lora_output; add the "
            "adapters by npu_qat.add_lora"
        )
    # The layers compute in the dtype that they were prepared in.
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    for path, layer in quantized.layers.items():
        if autocast not in (None, layer.dtype):
            raise ValueError(
                f"the trainer computes in {autocast} (bf16 or fp16 in its arguments; TRL sets bf16 "
                f"by default), but {path} was prepared in {layer.dtype}; load the model with "
                f"dtype={autocast}, or set bf16=False and fp16=False"
            )
