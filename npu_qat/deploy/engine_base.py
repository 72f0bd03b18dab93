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
from npu_qat.deploy.validate import validate

FOLDER = "engine-base"


def write_engine_base(config: RunConfig, folder: Path, device: str) -> None:
    """Export the base of ``config`` into ``folder``, unless an intact export is there.

    Args:
        config: ``rollout.engine_format`` chooses the format; auto is ``ascend`` on an NPU, else
            ``compressed-tensors``.
        folder: replaced if it is another base or damaged.
        device: type of the run's device.

    Raises:
        ValueError: the model or the recipe cannot be exported in that format.
    """
    core = PackedCore(open_checkpoint(config.model), config.quant)
    wanted = config.rollout.engine_format
    if wanted == "auto":
        wanted = "ascend" if device == "npu" else "compressed-tensors"
    if folder.exists():
        if _is_intact(folder, wanted, fingerprint_of(core).hexdigest()):
            return
        shutil.rmtree(folder)
    export(core, AscendWriter() if wanted == "ascend" else CompressedTensorsWriter(), folder)


def _is_intact(folder: Path, format: str, fingerprint: str) -> bool:
    if validate(folder):
        return False
    there = open_export(folder)
    return there.format == format and there.fingerprint() == fingerprint
