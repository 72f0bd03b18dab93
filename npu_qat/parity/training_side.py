"""The training side: the very modules that a run trains, put together again.

A run never changes its base, so base, recipe and adapter are the trained model. The weights are
kept packed here (``base_storage: packed`` holds the same values as ``image``), so that their codes
can be compared as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_qat.backends import Selection
from npu_qat.config import RunConfig
from npu_qat.deploy.checkpoint import open_checkpoint
from npu_qat.deploy.core import PackedCore
from npu_qat.deploy.formats import trained_activations
from npu_qat.deploy.run_source import TrainedBase
from npu_qat.layers import QuantizedModel, prepare_model
from npu_qat.layers.base_model import load_base
from npu_qat.layers.calibration import CALIBRATION_PROMPTS, calibrate_on_prompts
from npu_qat.tasks import Task, load_task


@dataclass
class TrainingSide:
    """A trained, or freshly quantised, model in phase ``evaluation``.

    Attributes:
        config: of the run, or made for ``--model``.
        model: with the adapter, if there is one.
        handle: of the quantised layers.
        tokenizer: of the 16-bit checkpoint.
        task: where prompts come from.
        core: the same base from its checkpoint, tensor by tensor.
        adapter: folder of the adapter, or None.
        selection: device and backend.
        base: what the run wrote about its base, or None.
    """

    config: RunConfig
    model: Any
    handle: QuantizedModel
    tokenizer: Any
    task: Task
    core: PackedCore
    adapter: Path | None
    selection: Selection
    base: TrainedBase | None = None

    @property
    def activations(self) -> str:
        """What training rounded the inputs of quantised linears to."""
        return trained_activations(self.core.recipe)


def open_training(
    config: RunConfig,
    adapter: Path | None,
    selection: Selection,
    base: TrainedBase | None = None,
) -> TrainingSide:
    """Prepare the model of ``config`` as training does, with ``adapter`` on it.

    ``base``: what a run wrote about its base; None if there is no run, or an old one.

    Raises:
        ValueError: model, recipe or adapter cannot be used, or nothing serves the recipe.
    """
    recipe = config.quant.model_copy(update={"base_storage": "packed"})
    core = PackedCore(open_checkpoint(config.model), recipe)
    model, tokenizer = load_base(config.model, selection.device)
    handle = prepare_model(model, recipe, selection.backend)
    task = load_task(config.task)
    for path, scale in (base.input_scales if base is not None else {}).items():
        handle.layers[path].input_tensor_scale.copy_(scale)
    prompts = [task.messages(problem) for problem in task.train[:CALIBRATION_PROMPTS]]
    calibrate_on_prompts(handle, tokenizer, prompts)
    if adapter is not None:
        from npu_qat.layers import load_lora

        model = load_lora(model, str(adapter)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    scales = {
        path: layer.input_tensor_scale.detach().cpu()
        for path, layer in handle.layers.items()
        if hasattr(layer, "input_tensor_scale")
    }
    core = PackedCore(core.checkpoint, recipe, input_scales=scales)
    return TrainingSide(config, model, handle, tokenizer, task, core, adapter, selection, base)
