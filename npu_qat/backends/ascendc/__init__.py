"""Ascend A2 and A3: this project's AscendC kernels (``kernels_ascendc/``), if they are built.

These chips have no FP4 operators. In plain PyTorch the fake-quantisation of an activation is ten
and more passes over memory; the kernels need one. They compute some MXFP4 profiles along the last
dimension, among them the one of the 950, so that an A2 in emulation computes what a 950 computes.
Weights in another profile, or blocked along another dimension, are encoded by the reference
arithmetic: that happens once, and gives the same bytes. Not run on a chip yet.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.backends.ascendc.backend import AscendcBackend
from npu_qat.backends.ascendc.rules import KernelRule, kernel_profiles, kernel_rule
from npu_qat.backends.base import BackendUnavailable

if TYPE_CHECKING:
    import torch

__all__ = ["AscendcBackend", "KernelRule", "kernel_profiles", "kernel_rule", "load"]

LIBRARY = "libnpu_qat_ascendc.so"
LIBRARY_VARIABLE = "NPU_QAT_ASCENDC_LIBRARY"


def load(device: torch.device) -> AscendcBackend:
    """The backend on ``device``; BackendUnavailable for another chip, or without the kernels."""
    import torch

    from npu_qat.backends.npu.soc import current_soc

    npu: Any = getattr(torch, "npu", None)  # exists once torch_npu is imported
    if npu is None:
        raise BackendUnavailable("torch_npu is not imported")
    soc = current_soc(npu)
    if soc.family not in ("A2", "A3"):
        raise BackendUnavailable(f"the AscendC kernels are for A2 and A3, this is {soc}")
    library = find_library()
    torch.ops.load_library(str(library))
    return AscendcBackend(torch.ops.npu_qat, str(library))


def find_library() -> Path:
    """The built kernels: where the variable says, or in this folder.

    Raises BackendUnavailable that says how to build them.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    library = Path(named) if named else Path(__file__).with_name(LIBRARY)
    if library.is_file():
        return library
    where = f"{LIBRARY_VARIABLE} names {library}, which" if named else f"{library}"
    raise BackendUnavailable(
        f"the AscendC kernels are not built ({where} does not exist); in a checkout, with CANN's "
        "set_env.sh sourced, run: python -m kernels_ascendc.build npu"
    )
