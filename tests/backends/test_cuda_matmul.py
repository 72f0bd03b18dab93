"""The packed matmul equals the product of decoded weights, in every split, the same every time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="the CUDA backend needs Triton")

from npu_qat.backends.base import PackedWeight
from npu_qat.backends.cuda import matmul
from npu_qat.backends.cuda.backend import CudaBackend
from npu_qat.numerics import fake_quant, get_profile
from tests.backends.kernels import DEVICE, INTERPRETED, needs_kernels

pytestmark = needs_kernels
BACKEND = CudaBackend()
# (rows, N, K): rows on both sides of a tile, N and K that no tile divides.
SHAPES = [(3, 80, 160)] if INTERPRETED else [(1, 256, 1536), (8, 80, 160), (33, 1000, 1504)]
TILINGS = [(32, 64, 2, 4, 3), (16, 128, 1, 4, 2)]


def operands(
    rows: int, n: int, k: int, name: str, dtype: torch.dtype
) -> tuple[Tensor, PackedWeight]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    weight = (torch.randn(n, k, generator=generator) * 0.05).to(dtype)
    weight[0, 0] = 100.0  # one block whose scale is large
    weight[1] *= 1e-4
    q = BACKEND.quantize_packed(weight.to(DEVICE), name)
    activation = "ascend950" if get_profile(name).tensor_scale else name
    return fake_quant(x, activation).to(DEVICE), replace(q, tensor_scale=None)


@pytest.mark.parametrize("tiling", [None, *TILINGS], ids=str)
@pytest.mark.parametrize("name", ["ascend950", "nvfp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(
    shape: tuple[int, int, int], name: str, tiling: tuple[int, int, int, int, int] | None
) -> None:
    dtypes = [torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float16]
    for dtype in dtypes:
        x, weight = operands(*shape, name, dtype)
        bias = torch.linspace(-1, 1, shape[1]).to(dtype).to(DEVICE)
        decoded = BACKEND.dequantize(weight, dtype)
        exact = F.linear(x.double(), decoded.double(), bias.double())
        y = matmul.packed_linear(x, weight.packed, weight.scales, get_profile(name), bias, tiling)
        # One rounding to 16 bits, and fp32 sums.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            y.double(), exact, rtol=eps, atol=1e-4 * float(exact.abs().max())
        )
        again = matmul.packed_linear(
            x, weight.packed, weight.scales, get_profile(name), bias, tiling
        )
        assert torch.equal(y, again)


def test_linear_reads_packed_bytes_for_few_rows_and_decodes_for_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    real = matmul.packed_linear
    monkeypatch.setattr(matmul, "packed_linear", lambda *a: calls.append(1) or real(*a))
    for rows, packed in ((2, True), (matmul.MAX_ROWS + 1, False)):
        calls.clear()
        x, weight = operands(rows, 48, 64, "ascend950", torch.bfloat16)
        y = BACKEND.linear(x, weight, None)
        decoded = F.linear(x.float(), BACKEND.dequantize(weight, torch.float32))
        torch.testing.assert_close(y.float(), decoded, rtol=1e-2, atol=1e-3)
        assert bool(calls) == packed


def test_nan_blocks_make_their_outputs_nan_and_no_others() -> None:
    x, weight = operands(2, 48, 64, "ascend950", torch.bfloat16)
    weight.scales[5, 1] = 0xFF
    y = BACKEND.linear(x, weight, None)
    assert y[:, 5].isnan().all() and y.isnan().sum() == 2
