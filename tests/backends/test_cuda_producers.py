"""Fused producers: y is the modules' but for a last bit, Q(y) is exact, gradients against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="the CUDA backend needs Triton")

from npu_qat.backends.cuda.backend import CudaBackend
from npu_qat.numerics import get_profile, quantize
from npu_qat.numerics.codec import dequantize
from tests.backends.kernels import DEVICE, INTERPRETED, needs_kernels
from tests.numerics.compare import bits, rms_norm, ulps

pytestmark = needs_kernels
EPS = 1e-6
BACKEND = CudaBackend()
SHAPES = [(3, 5, 96)] if INTERPRETED else [(3, 5, 96), (7, 128), (300, 1536), (2, 8960)]
DTYPES = [torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def reference_operand(y: Tensor, profile: str, scale: Tensor | None) -> Tensor:
    q = quantize(y.cpu(), profile, tensor_scale=None if scale is None else scale.cpu())
    return dequantize(q, y.dtype, apply_tensor_scale=False)


@pytest.mark.parametrize("profile", ["ascend950", "nvfp4", "ocp-rceil"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, profile: str) -> None:
    x = 3 * normal(*shape, dtype=dtype)
    weight = normal(shape[-1], dtype=dtype, seed=1)
    scale = torch.tensor(0.01, device=DEVICE) if get_profile(profile).tensor_scale else None
    y, q = BACKEND.rms_norm(x, weight, EPS, profile, scale)
    again, _ = BACKEND.rms_norm(x, weight, EPS, profile, scale)
    # The last bit of 1 / rms may flip the rounding of x / rms, once in thousands of elements; times
    # the weight that is up to two units in the last place. fp32 does not round in between.
    wanted = rms_norm(x, weight, EPS)
    assert ulps(y, wanted) <= (8 if dtype == torch.float32 else 2)
    assert dtype == torch.float32 or (bits(y) == bits(wanted)).float().mean() > 0.998
    assert torch.equal(y, again)
    assert q is not None and torch.equal(bits(q.cpu()), bits(reference_operand(y, profile, scale)))


def test_norm_with_an_fp32_weight_and_without_quantising() -> None:
    x, weight = normal(4, 96), normal(96, dtype=torch.float32, seed=1)
    y, q = BACKEND.rms_norm(x, weight, EPS)
    assert q is None and y.dtype == torch.bfloat16
    assert ulps(y, rms_norm(x, weight, EPS)) <= 1


@pytest.mark.parametrize("given", ["both", "y", "q"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_norm(shape: tuple[int, ...], given: str) -> None:
    x, weight = normal(*shape), normal(shape[-1], seed=1)
    dy = normal(*shape, seed=2) if given != "q" else None
    dq = normal(*shape, seed=3) if given != "y" else None
    slope = torch.tensor(2.5, device=DEVICE)
    dx = BACKEND.rms_norm_backward(dy, dq, x, weight, EPS, slope)
    exact = x.double().requires_grad_()
    y = weight.double() * exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + EPS)
    y.backward(_total(dy, dq, slope))
    assert exact.grad is not None
    torch.testing.assert_close(dx.double(), exact.grad, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("profile", ["ascend950", "nvfp4", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_times_up(shape: tuple[int, ...], profile: str | None) -> None:
    gate, up = 4 * normal(*shape), normal(*shape, seed=1)
    tensor_scale = profile is not None and get_profile(profile).tensor_scale
    scale = torch.tensor(0.01, device=DEVICE) if tensor_scale else None
    y, q = BACKEND.silu_mul(gate, up, profile, scale)
    # The last bit of exp may flip the rounding of SiLU, and that of the product.
    assert ulps(y, F.silu(gate) * up) <= 2
    assert (bits(y) == bits(F.silu(gate) * up)).float().mean() > 0.99
    if profile is None:
        assert q is None
    else:
        assert q is not None
        assert torch.equal(bits(q.cpu()), bits(reference_operand(y, profile, scale)))


@pytest.mark.parametrize("given", ["both", "y", "q"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_silu_times_up(shape: tuple[int, ...], given: str) -> None:
    gate, up = 4 * normal(*shape), normal(*shape, seed=1)
    dy = normal(*shape, seed=2) if given != "q" else None
    dq = normal(*shape, seed=3) if given != "y" else None
    slope = torch.tensor(0.5, device=DEVICE)
    d_gate, d_up = BACKEND.silu_mul_backward(dy, dq, gate, up, slope)
    a, b = gate.double().requires_grad_(), up.double().requires_grad_()
    (F.silu(a) * b).backward(_total(dy, dq, slope))
    assert a.grad is not None and b.grad is not None
    torch.testing.assert_close(d_gate.double(), a.grad, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(d_up.double(), b.grad, rtol=2**-7, atol=1e-5)


def _total(dy: Tensor | None, dq: Tensor | None, slope: Tensor) -> Tensor:
    parts = [] if dy is None else [dy.double()]
    parts += [] if dq is None else [dq.double() * slope.double()]
    return torch.stack(parts).sum(0)


def test_a_view_that_starts_between_16_bytes() -> None:
    memory = normal(5 * 96 + 1)
    x, weight = memory[1:].view(5, 96), normal(96, seed=1)
    for _ in range(2):
        y, _ = BACKEND.rms_norm(x, weight, EPS)
        assert ulps(y, rms_norm(x, weight, EPS)) <= 1
        product, _ = BACKEND.silu_mul(x, x.clone())
        assert ulps(product, F.silu(x) * x) <= 2
