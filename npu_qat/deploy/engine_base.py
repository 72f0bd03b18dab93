"""The quantised base as a folder that a rollout engine loads at the start of a run.

It is written once and never changes, since the base is frozen; a resumed run finds it again. The
adapter is not in it: the engine gets that each step.
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
from npu_qat.deploy.reader import open_export
from npu_qat.deploy.run_source import trained_base
from npu_qat.deploy.validate import validate

FOLDER = "engine-base"


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
    wanted = config.rollout.engine_format
    if wanted == "auto":
        wanted = "ascend" if device == "npu" else "compressed-tensors"
    if folder.exists():
        if _is_intact(folder, wanted, fingerprint_of(core).hexdigest()):
            return
        shutil.rmtree(folder)
    # Of a run that was killed here: no other process writes it.
    shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
    export(core, AscendWriter() if wanted == "ascend" else CompressedTensorsWriter(), folder)


def _is_intact(folder: Path, format: str, fingerprint: str) -> bool:
    if validate(folder):
        return False
    there = open_export(folder)
    return there.format == format and there.fingerprint() == fingerprint
