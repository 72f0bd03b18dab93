"""Calibrating the static activation scales of NVFP4 on prompts of the task.

Training and export calibrate by this one function, so that an exported scale is the trained one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from npu_qat.layers.base_model import prompt_ids
from npu_qat.layers.prepare import QuantizedModel

# Enough for a largest magnitude that further prompts seldom exceed, and quick on a CPU.
CALIBRATION_PROMPTS = 32


def calibrate_on_prompts(
    handle: QuantizedModel, tokenizer: Any, prompts: Iterable[list[dict[str, str]]]
) -> None:
    """Set the scales of ``handle`` from chat ``prompts``; does nothing if none is missing."""
    if not handle.needs_calibration:
        return
    device = next(handle.model.parameters()).device

    def run(model: Any) -> None:
        for messages in prompts:
            model(input_ids=torch.tensor([prompt_ids(tokenizer, messages)], device=device))

    handle.calibrate(run)
