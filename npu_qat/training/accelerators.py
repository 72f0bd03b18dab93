"""What DeepSpeed needs on one kind of device and not on another.

Ascend NPUs (all read, nothing run on one; docs/ascend.md has the sources):

* The collective library is HCCL.
* ZeRO stage 2 by default when several processes train adapters: the setting that others have
  verified there for LoRA. Stage 3 was several times slower and saves little, since a frozen base
  has no optimiser state.
* Buckets of 2e8 elements and contiguous gradients, as in ms-swift's configuration for NPUs; the
  default buckets of 5e8 take memory that these cards want for activations. No overlap of
  communication and computation.
* Nothing that DeepSpeed would compile: the optimiser is torch's AdamW, handed in. Offloading the
  optimiser builds a C++ Adam against CANN's headers, and ZeRO++'s quantised communication has
  crashed there: both are refused.
* bf16 without a loss scale. DeepSpeed is told that it trains fp32 master weights, as everywhere.

ZeRO-3 gathers the packed 4-bit base as uint8. A communication library that cannot is given the
same bytes as int8 (``gather_bytes``); quantised layers read them as uint8 either way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
NPU_BUCKET = 200_000_000
# zero_optimization keys that must not be set on an NPU, with the reason.
REFUSED_ON_NPU = {
    "offload_optimizer": "it compiles a C++ Adam against CANN's headers, which fails on many hosts",
    "zero_quantized_weights": "DeepSpeed's quantised communication crashes on NPUs",
    "zero_quantized_nontrainable_weights": "DeepSpeed's quantised communication crashes on NPUs",
    "zero_quantized_gradients": "DeepSpeed's quantised communication crashes on NPUs",
}


def resolve_stage(stage: Literal["auto"] | int, device: str, processes: int) -> int:
    """The ZeRO stage of ``deepspeed.zero_stage``: auto is 2 on several NPUs, else 0."""
    if stage != "auto":
        return stage
    return 2 if device == "npu" and processes > 1 else 0


def zero_settings(stage: int, device: str) -> dict[str, Any]:
    """DeepSpeed's ``zero_optimization``, before the user's overrides."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        # Adapters are small: without this nearly all of them would stay whole on every rank.
        zero["stage3_param_persistence_threshold"] = 0
        # DeepSpeed would replace torch's linear, for the whole process, by one that rounds the
        # product before it adds the bias: in 16 bits that is another model than at other stages.
        zero["memory_efficient_linear"] = False
    if device == "npu":
        zero |= {
            "contiguous_gradients": True,
            "allgather_bucket_size": NPU_BUCKET,
            "reduce_bucket_size": NPU_BUCKET,
        }
    return zero


def check_zero_overrides(overrides: Mapping[str, Any], device: str) -> None:
    """Raise ValueError for ``zero_optimization`` keys that do not work on ``device``."""
    if device != "npu":
        return
    for key, reason in REFUSED_ON_NPU.items():
        if overrides.get(key):
            raise ValueError(
                f"deepspeed.overrides: zero_optimization.{key} cannot be used on an NPU: {reason}"
            )


def check_accelerator(device: str) -> None:
    """Raise ValueError if DeepSpeed, imported earlier, has settled on another accelerator."""
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator()._name
    if found != device:
        raise ValueError(
            f"DeepSpeed has chosen the accelerator {found!r} before this run, which is on "
            f"{device!r}, could say so. Set DS_ACCELERATOR={device} before the first import of "
            "deepspeed (or of a library that imports it)"
        )


def gather_bytes(model: nn.Module, device: torch.device) -> bool:
    """Store packed weights as int8 if the process group cannot gather uint8.

    Call before ZeRO-3 partitions the model. Returns whether it had to. Same bytes, so nothing that
    reads them through ``PackedWeight`` changes.
    """
    stored = [p for p in model.parameters() if p.dtype == torch.uint8]
    if not stored or _gathers_uint8(device):
        return False
    for parameter in stored:
        parameter.data = parameter.data.view(torch.int8)
    logging.getLogger(__name__).warning(
        "the process group cannot gather uint8; the packed base travels as int8"
    )
    return True


def _gathers_uint8(device: torch.device) -> bool:
    """One all-gather of a byte. Libraries refuse an unknown dtype before they communicate."""
    mine = torch.ones(1, dtype=torch.uint8, device=device)
    everyone = mine.new_zeros(torch.distributed.get_world_size())
    try:
        torch.distributed.all_gather_into_tensor(everyone, mine)
    except (RuntimeError, TypeError, ValueError):
        return False
    return bool((everyone == 1).all())
