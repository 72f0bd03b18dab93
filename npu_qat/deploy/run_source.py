"""What an export takes from a finished run: its adapter, and evidence that the base is the same.

A run never changes its base, so the base is made again from ``model.path`` with the run's recipe.
The folder behind that path may have changed since; the run's audit holds the rounding error of
every weight, and the export compares.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from npu_qat.config import RunConfig

# The arm that trains without quantisation, as a baseline.
_BASELINE = "bf16_lora"


def trained_adapter(run_dir: Path) -> Path:
    """The folder of the adapter that the run trained on its quantised base.

    Raises:
        ValueError: there is none yet.
    """
    folders = [p for p in sorted((run_dir / "adapters").glob("*")) if p.name != _BASELINE]
    if len(folders) != 1:
        raise ValueError(
            f"{run_dir} holds no trained adapter yet; finish the run with --resume auto, or "
            "export the base alone with --adapter none"
        )
    return folders[0]


def trained_errors(run_dir: Path) -> dict[str, float]:
    """Linear -> relative rounding error of its weight, from ``audit.json``; empty without one."""
    audit = run_dir / "audit.json"
    if not audit.exists():
        return {}
    modules = json.loads(audit.read_text("utf-8"))["modules"]
    return {
        m["name"]: m["weight_rel_error"] for m in modules if m.get("weight_rel_error") is not None
    }


def calibrated_inputs(config: RunConfig) -> dict[str, torch.Tensor]:
    """Linear -> fp32 tensor scale of its input, calibrated as a run does (NVFP4).

    This needs activations, so it loads the whole model.
    """
    from npu_qat.backends import select
    from npu_qat.layers import prepare_model
    from npu_qat.layers.base_model import load_base
    from npu_qat.layers.calibration import CALIBRATION_PROMPTS, calibrate_on_prompts
    from npu_qat.tasks import load_task

    selection = select(config.run.device)
    model, tokenizer = load_base(config.model, selection.device)
    handle = prepare_model(model, config.quant, selection.backend)
    task = load_task(config.task)

    prompts = [task.messages(problem) for problem in task.train[:CALIBRATION_PROMPTS]]
    calibrate_on_prompts(handle, tokenizer, prompts)
    return {
        path: layer.input_tensor_scale.detach().cpu().clone()
        for path, layer in handle.layers.items()
        if hasattr(layer, "input_tensor_scale")
    }
