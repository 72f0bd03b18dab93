"""A tiny prepared model, batches for it, and trainers that write into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from npu_qat.config import LoraSection, NoiseConfig, Recipe
from npu_qat.layers import QuantizedModel, add_lora, prepare_model
from tests.training.tiny import tiny_model

LORA = LoraSection(r=4, alpha=8)
NOISE = NoiseConfig(
    enabled=True,
    sigma_start=0.05,
    sigma_end=0.01,
    num_stages=2,
    zero_first_stage=False,
    apply_during="training",
)


def prepared(
    recipe: Recipe | None = None, dtype: torch.dtype = torch.bfloat16, **changes: object
) -> tuple[QuantizedModel, Any]:
    """The handle and the adapted model; the same numbers at every call."""
    model = tiny_model(dtype=dtype, **changes)
    handle = prepare_model(model, recipe or Recipe())
    adapted = add_lora(model, LORA, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # not zero, so that A has a gradient from the start
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.normal_(0, 0.02, generator=generator)
    return handle, adapted


class Rows(Dataset):  # type: ignore[type-arg]
    """``count`` rows of 12 tokens, the first four of which are the prompt."""

    def __init__(self, count: int = 16, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 96, (count, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        labels = ids.clone()
        labels[:4] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def arguments(folder: Path, **changes: Any) -> Any:
    """Four steps of four rows on the CPU."""
    from transformers import TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return TrainingArguments(**{**settings, **changes})


def adapters(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of parameters agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
