"""Numbers that can be checked by hand, for the package and for the oracle alike.

The inputs are those on which public implementations disagree: beside powers of two, on ties, at
7 times a power of two, at the ends of the range.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from npu_qat.numerics import dequantize, fake_quant, quantize
from tests.numerics import oracle

INF, NAN = float("inf"), float("nan")

# (profile, dtype, input, decoded values); the rest of the block is zero.
CASES = [
    ("ocp", "bf16", [255, 17], [192, 16]),
    ("ocp", "fp32", [2**-20 - 2**-44], [0.75 * 2**-20]),
    ("ocp", "fp32", [4 - 2**-22, 3.6], [3, 3]),
    ("ocp", "bf16", [6, 2.5, 3.5, 5, 0.25, 0.75, -0.25], [6, 2, 4, 4, 0, 1, -0.0]),
    ("ascend950", "bf16", [6, 2.5, 3.5, 5, 0.25, 0.75, -0.25], [6, 3, 4, 6, 0.5, 1, -0.5]),
    ("ascend950-floor", "bf16", [6, 2.5, -2.5, 0.25, -0.25], [6, 2, -3, 0, -0.5]),
    ("fork-nvfp4-row", "bf16", [6, 2.5, 3.5, 5, 0.25, 0.75], [6, 2, 3, 4, 0, 0.5]),
    ("ocp", "bf16", [7, 3], [6, 3]),
    ("ocp-even", "bf16", [7, 3], [8, 3]),
    ("ocp-rceil", "bf16", [7, 3], [8, 3]),
    ("ocp-ceil", "bf16", [7, 3], [8, 3]),
    ("ascend950-alg2", "bf16", [7, 5], [8, 6]),
    ("ascend950-alg2", "bf16", [6, 3], [6, 3]),
    ("ascend950-alg2-max7", "bf16", [7, 3], [6, 3]),
    ("ascend950-alg2-max7", "bf16", [7.0625, 5], [8, 6]),
    ("ocp", "fp32", [2.0**-125], [2.0**-125]),
    ("ocp", "fp32", [2.0**-149], [0]),
    ("ascend950", "fp32", [2.0**-125], [0]),
    ("ascend950", "fp32", [-(2.0**-124)], [-(2.0**-124)]),
    ("ocp-even", "fp32", [3.2e38, 1e38], [INF, 2.0**126]),
    ("compressed-tensors", "fp32", [3.2e38, 1e38], [NAN, NAN]),
    ("compressed-tensors", "fp32", [2.9e38, 1e38], [1.5 * 2.0**127, 2.0**126]),
    ("ocp", "bf16", [1, INF], [NAN, NAN]),
    ("ocp", "bf16", [1, NAN], [NAN, NAN]),
    ("torchao-rceil", "bf16", [1, -INF], [0, -INF]),
    ("torchao-rceil", "bf16", [1, NAN], [NAN, NAN]),
    ("quant-compute-mxfp4", "bf16", [1, INF], [0, 6 * 2.0**125]),
    ("quant-compute-nvf4", "bf16", [500, INF], [448 * 1.0, 2688]),
    ("fork-nvfp4-row", "bf16", [480, INF], [480, 2880]),
    ("fork-nvfp4-row", "bf16", [2.0**-7], [2.0**-7]),
    ("fork-nvfp4-row", "bf16", [2.0**-10], [0]),
    ("fork-nvfp4-row", "bf16", [11.75], [11.25]),  # mantissa 1.958: carry cut at 1.875
    ("nvfp4-one-level", "bf16", [11.75], [12]),
    ("msmodelslim-weight", "bf16", [7, 5], [8, 6]),
    ("ascend950-mse", "fp32", [7, 1, 1, 1, 1, 1, 1, 1], [6, 1, 1, 1, 1, 1, 1, 1]),
    ("ascend950-mse", "fp32", [7.9, 0, 0], [8, 0, 0]),
]


@pytest.mark.parametrize(("name", "dtype", "given", "want"), CASES)
def test_values_worked_out_by_hand(
    name: str, dtype: str, given: list[float], want: list[float]
) -> None:
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    x = torch.tensor(given, dtype=torch_dtype)
    expected = torch.tensor(want, dtype=torch.float32)
    reference = torch.from_numpy(oracle.quantize(x.float().numpy(), name, dtype).values)
    for got in (dequantize(quantize(x, name)), fake_quant(x, name).float(), reference):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        finite = ~expected.isnan()
        assert torch.equal(got[finite].signbit(), expected[finite].signbit())


def test_small_block_of_a_large_nvfp4_tensor_keeps_its_element() -> None:
    x = torch.zeros(2, 16)
    x[0, 0] = 2688.0
    x[1, :2] = torch.tensor([6 * 2.0**-8, 2.0**-8])
    assert torch.equal(fake_quant(x, "nvfp4"), x)


def test_an_all_zero_nvfp4_tensor_gives_zeros() -> None:
    q = quantize(torch.zeros(4, 32), "nvfp4")
    assert q.tensor_scale == 0
    assert not q.scales.any() and not q.codes.any()
    assert torch.equal(dequantize(q), torch.zeros(4, 32))


def test_one_nan_spoils_one_nvfp4_block_and_not_the_tensor() -> None:
    x = torch.ones(2, 32)
    x[0, 3] = NAN
    y = fake_quant(x, "nvfp4")
    assert y[0, :16].isnan().all()
    assert not y[0, 16:].isnan().any() and not y[1].isnan().any()


@pytest.mark.parametrize("rounding", ["even", "away", "to smaller"])
def test_the_oracle_rounds_like_exact_fractions(rounding: str) -> None:
    grid = [Fraction(value) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
    for numerator in range(0, 6 * 64 + 1):
        v = Fraction(numerator, 64)
        distance = min(abs(v - value) for value in grid)
        nearest = [i for i, value in enumerate(grid) if abs(v - value) == distance]
        if rounding == "even" and len(nearest) == 2:
            nearest = [i for i in nearest if i % 2 == 0]
        want = max(nearest) if rounding == "away" else min(nearest)
        array = np.array([float(v)])
        assert oracle._round(array, rounding, array < 0)[0] == want, v
