"""The kernels as PyTorch operators: schema, shape functions, and tracing without running them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

pytest.importorskip("triton", reason="the CUDA backend needs Triton")

from npu_qat.backends.cuda import ops
from npu_qat.backends.cuda.backend import CudaBackend
from npu_qat.numerics import fake_quant
from tests.backends.kernels import DEVICE, needs_kernels

pytestmark = needs_kernels
BACKEND = CudaBackend()
NAMES = [
    *("fake_quant", "quantize", "dequantize", "packed_linear"),
    *("rms_norm", "rms_norm_backward", "silu_mul", "silu_mul_backward"),
]
# What opcheck tests of operators without a derivative of their own.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(torch.bfloat16).to(DEVICE)


def arguments() -> dict[str, tuple[object, ...]]:
    x, weight = normal(4, 64), normal(64)
    q = BACKEND.quantize_packed(x, "ascend950")
    scale = torch.tensor(0.01, device=DEVICE)
    return {
        "fake_quant": (x, "nvfp4", 1, scale, False, 0.0),
        "quantize": (x, "ascend950", 0, None, True),
        "dequantize": (
            *(q.packed, q.scales, [4, 64], "ascend950", 1),
            *(torch.bfloat16, None, None, True),
        ),
        "packed_linear": (x, q.packed, q.scales, "ascend950", None),
        "rms_norm": (x, weight, 1e-6, "ascend950", None),
        "rms_norm_backward": (x, None, x, weight, 1e-6, scale),
        "silu_mul": (x, x.clone(), "", None),
        "silu_mul_backward": (x, x, x, x.clone(), None),
    }


@pytest.mark.parametrize("name", NAMES)
def test_operator(name: str) -> None:
    opcheck(getattr(ops, name), arguments()[name], test_utils=CHECKS)


@pytest.mark.parametrize("profile", ["ascend950", "ascend950-dual"])
def test_fake_quantize_has_the_shapes_of_the_real_one(profile: str) -> None:
    x = normal(3, 70)
    real = BACKEND.quantize(x, profile)
    with FakeTensorMode() as mode:
        fake = BACKEND.quantize(mode.from_tensor(x), profile)
    for kind in ("codes", "scales", "level0_scales"):
        a, b = getattr(real, kind), getattr(fake, kind)
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and a.dtype == b.dtype)


def test_a_compiled_function_calls_the_same_kernel() -> None:
    compiled = torch.compile(
        lambda x: BACKEND.fake_quant(x * 2, "ascend950") + 1, backend="aot_eager", fullgraph=True
    )
    x = normal(4, 64)
    assert torch.equal(compiled(x).cpu(), fake_quant((x * 2).cpu(), "ascend950") + 1)
