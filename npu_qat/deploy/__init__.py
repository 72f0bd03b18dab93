"""What leaves the house: the quantised model as a folder that serving engines load, and its check.

    core = PackedCore(open_checkpoint(ModelConfig(path="demo")), Recipe())
    export(core, AscendWriter(), Path("served"))
    assert validate(Path("served")) == []

``checkpoint`` reads the 16-bit model; ``core`` makes of it, one layer at a time, the bytes that
training computed with; ``ascend`` and ``compressed_tensors`` give them the names and types of one
reader each; ``export`` writes the folder; ``reader`` reads it back; ``validate`` finds what the
serving engines would accept silently; ``adapter`` keeps an adapter and its base together.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_qat.deploy.adapter import AdapterMismatch as AdapterMismatch
    from npu_qat.deploy.adapter import check_adapter as check_adapter
    from npu_qat.deploy.adapter import read_adapter as read_adapter
    from npu_qat.deploy.ascend import AscendWriter as AscendWriter
    from npu_qat.deploy.checkpoint import open_checkpoint as open_checkpoint
    from npu_qat.deploy.compressed_tensors import (
        CompressedTensorsWriter as CompressedTensorsWriter,
    )
    from npu_qat.deploy.core import PackedCore as PackedCore
    from npu_qat.deploy.reader import open_export as open_export
    from npu_qat.deploy.validate import Finding as Finding

# Functions that share their module's name (export, validate) are imported from it.
_HOME = {
    "AdapterMismatch": "adapter",
    "AscendWriter": "ascend",
    "CompressedTensorsWriter": "compressed_tensors",
    "Finding": "validate",
    "PackedCore": "core",
    "check_adapter": "adapter",
    "open_checkpoint": "checkpoint",
    "open_export": "reader",
    "read_adapter": "adapter",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
