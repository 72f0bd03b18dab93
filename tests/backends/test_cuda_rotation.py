"""Rotated layers on the CUDA backend: one pass, the same numbers, the same gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA backend needs Triton")

from npu_qat.backends import EmulationBackend
from npu_qat.backends.base import Backend
from npu_qat.backends.cuda.backend import CudaBackend
from npu_qat.config import Recipe
from npu_qat.layers import prepare_model
from npu_qat.layers import quant_linear as module
from npu_qat.layers.rotation import rotate_blocks
from tests.backends.kernels import DEVICE, needs_kernels
from tests.layers.test_rotation import block

pytestmark = needs_kernels
BACKEND = CudaBackend()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_are_rotated_as_the_reference_does(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = BACKEND.rotate(x.to(DEVICE).transpose(0, 1), 0.25).cpu()
    assert torch.equal(found, rotate_blocks(x.transpose(0, 1), 0.25))


def result_and_gradient(backend: Backend, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = block().bfloat16().to(device)
    handle = prepare_model(model, Recipe(rotation="hadamard32"), backend)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = x.to(device).requires_grad_()
    y = model(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    handle.audit.verify(model)
    return y.detach().cpu(), grad.cpu()


def test_a_rotated_layer_quantises_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = result_and_gradient(EmulationBackend(), "cpu")

    def separate(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the input was rotated by itself")

    monkeypatch.setattr(module, "rotate_input", separate)
    for found, right in zip(result_and_gradient(BACKEND, DEVICE), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=2**-6, atol=2**-6)
