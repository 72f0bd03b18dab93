"""What an export takes from a finished run: its adapter, and evidence that the base is the same.

A run never changes its base, so the base is made again from ``model.path`` with the run's recipe.
The folder behind that path may have changed since. So training writes ``base.json``: the
fingerprint of the base that it quantised, and the calibrated scales of its inputs (NVFP4), which
another machine would not calibrate to the last bit. Runs from before that have the rounding error
of every weight in their audit, and the export compares those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from npu_qat.config import LoraSection, RunConfig
from npu_qat.deploy.adapter import Adapter
from npu_qat.deploy.checkpoint import open_checkpoint
from npu_qat.deploy.core import PackedCore, fingerprint_of
from npu_qat.training.rundir import BASE

if TYPE_CHECKING:
    from npu_qat.layers import QuantizedModel

# The arm that trains without quantisation, as a baseline.
_BASELINE = "bf16_lora"


@dataclass(frozen=True)
class TrainedBase:
    """The base that a run trained on.

    Attributes:
        fingerprint: of weights and 16-bit tensors, without input scales; None if no format can hold
            the run's recipe.
        input_scales: linear -> fp32 tensor scale of its input (NVFP4), else empty.
    """

    fingerprint: str | None
    input_scales: Mapping[str, torch.Tensor]


def describe_base(config: RunConfig, handle: QuantizedModel) -> dict[str, Any]:
    """The content of ``base.json`` for the base of ``config`` as ``handle`` holds it.

    The checkpoint is read and quantised once more, tensor by tensor, by the code that exports it.
    """
    scales = {
        path: float(layer.input_tensor_scale)
        for path, layer in handle.layers.items()
        if hasattr(layer, "input_tensor_scale")
    }
    try:
        core = PackedCore(open_checkpoint(config.model), config.quant)
    except ValueError as error:
        return {"fingerprint": None, "reason": str(error), "input_scales": scales}
    return {"fingerprint": fingerprint_of(core).hexdigest(), "input_scales": scales}


def trained_base(run_dir: Path) -> TrainedBase | None:
    """The base of a run, or None for a run from before ``base.json``.

    Raises:
        ValueError: the file is damaged.
    """
    path = run_dir / BASE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        scales = {
            name: torch.tensor(value, dtype=torch.float32)
            for name, value in content["input_scales"].items()
        }
        return TrainedBase(content["fingerprint"], scales)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}; restore it") from error


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


def check_scale(adapter: Adapter, lora: LoraSection) -> None:
    """Refuse the adapter of a run whose files have another rank or scale than it trained with.

    A run's adapter says so itself (``refuse_changed``); those of older runs do not.

    Raises:
        ValueError: they have.
    """
    trained = {"r": lora.r, "lora_alpha": lora.alpha, "use_rslora": False}
    found = {key: adapter.config.get(key, False) for key in trained}
    if found != trained:
        raise ValueError(
            f"{adapter.folder}/adapter_config.json has {found}, but the run trained with {trained} "
            "(its config.yaml): engines would apply another adapter than was trained. Restore the "
            "file, or name the adapter with --adapter-dir to export it as it is"
        )


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

    selection = select(config.run.device, config.run.backend)
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
