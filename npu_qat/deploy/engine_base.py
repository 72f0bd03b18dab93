"""The quantised base as a folder that a rollout engine loads at the start of a run.

It is written once and never changes, since the base is frozen; a resumed run finds it again. The
adapter is not in it: the engine gets that each step.

The readers of a format round the inputs of linears by a rule of their own (``formats``). Where
training has another one, the engine could not compute what is trained, and the comparison before
the first step would stop the run after model and engine were loaded. Recipe and format are enough
to know that, so ``check_engine_base`` says it before anything is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from npu_qat.config import RunConfig
from npu_qat.deploy.ascend import AscendWriter
from npu_qat.deploy.checkpoint import open_checkpoint
from npu_qat.deploy.compressed_tensors import CompressedTensorsWriter
from npu_qat.deploy.core import PackedCore, fingerprint_of
from npu_qat.deploy.export import export
from npu_qat.deploy.formats import Writer
from npu_qat.deploy.reader import open_export
from npu_qat.deploy.run_source import trained_base
from npu_qat.deploy.validate import validate
from npu_qat.numerics.profiles import PROFILES
from npu_qat.training.samplers import OTHER_MODEL

FOLDER = "engine-base"


def check_engine_base(config: RunConfig, device: str) -> None:
    """Refuse a run whose engine would round the inputs of linears otherwise than training does.

    Args:
        config: of the run; ``rollout.engine: hf`` always passes.
        device: type of the run's device.

    Raises:
        ValueError: it would.
    """
    rollout = config.rollout
    if rollout.engine == "hf":
        return
    writer = _writer(config, device)
    rules = writer.activations(config.quant)
    if rules.same:
        return
    asked = f"auto on {device}" if rollout.engine_format == "auto" else writer.format
    cure = "quant.injection_point: weight"
    if rules.served in PROFILES:
        cure = f"quant.injection_point: both and quant.activation_profile: {rules.served}"
    raise ValueError(
        f"{OTHER_MODEL.format(rollout.engine)}: with a base in format {writer.format} "
        f"(rollout.engine_format: {asked}) it makes the inputs of linears {rules.served!r}, but "
        f"training makes them {rules.trained!r}. Nothing was loaded. Train with {cure}, or sample "
        "with rollout.engine: hf"
    )


def write_engine_base(config: RunConfig, folder: Path, device: str) -> None:
    """Export the base of ``config`` into ``folder``, unless an intact export is there.

    Args:
        config: ``rollout.engine_format`` chooses the format; auto is ``ascend`` on an NPU, else
            ``compressed-tensors``.
        folder: in the run directory, whose ``base.json`` holds the calibrated scales of NVFP4
            inputs; replaced if it is another base or damaged.
        device: type of the run's device.

    Raises:
        ValueError: the model or the recipe cannot be exported in that format.
    """
    base = trained_base(folder.parent)
    scales = {} if base is None else base.input_scales
    core = PackedCore(open_checkpoint(config.model), config.quant, input_scales=scales)
    writer = _writer(config, device)
    if folder.exists():
        if _is_intact(folder, writer.format, fingerprint_of(core).hexdigest()):
            return
        shutil.rmtree(folder)
    # Of a run that was killed here: no other process writes it.
    shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
    export(core, writer, folder)


def _writer(config: RunConfig, device: str) -> Writer:
    """Of ``rollout.engine_format``."""
    wanted = config.rollout.engine_format
    if wanted == "auto":
        wanted = "ascend" if device == "npu" else "compressed-tensors"
    return AscendWriter() if wanted == "ascend" else CompressedTensorsWriter()


def _is_intact(folder: Path, format: str, fingerprint: str) -> bool:
    if validate(folder):
        return False
    there = open_export(folder)
    return there.format == format and there.fingerprint() == fingerprint
