"""The CUDA backend: Triton kernels that compute what ``numerics`` says, in one pass over memory.

``tiles`` holds the arithmetic, shared by all kernels; ``kernels`` and ``elementwise`` encode and
decode; ``producers`` fuse quantising into RMSNorm and SiLU * up; ``matmul`` multiplies with packed
weights; ``ops`` makes PyTorch operators of all that, and ``backend`` the ``Backend``.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

import torch

from npu_qat.backends.base import BackendUnavailable

if TYPE_CHECKING:
    from npu_qat.backends.cuda.backend import CudaBackend

# bf16 arithmetic on two numbers at a time, which the matmul kernel uses, needs Ampere.
_CAPABILITY = (8, 0)


def load(device: torch.device) -> CudaBackend:
    """The backend on ``device``.

    Raises:
        BackendUnavailable: no Triton, or a GPU older than its kernels need.
    """
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("Triton is not installed (pip install 'npu-qat[gpu]')")
    if torch.version.hip is not None:
        raise BackendUnavailable(
            "the kernels are written for NVIDIA GPUs, and this torch is ROCm's"
        )
    if not torch.cuda.is_available():
        raise BackendUnavailable("torch sees no NVIDIA GPU")
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        raise BackendUnavailable(
            f"the kernels need compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]}, "
            f"this GPU has {capability[0]}.{capability[1]}"
        )
    backend = importlib.import_module("npu_qat.backends.cuda.backend")
    matmul = importlib.import_module("npu_qat.backends.cuda.matmul")
    matmul.prepare(device)
    cuda: CudaBackend = backend.CudaBackend()
    return cuda
