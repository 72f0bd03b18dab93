"""Every profile against the oracle: all 16-bit patterns, and a dense sweep of fp32.

For bf16 and fp16, each of the 65,536 patterns is the largest number of a block, and is an element
under 16 larger or equal maxima that lie on and beside every decision point. For fp32, each
exponent with mantissas around the rules' thresholds is a maximum, over elements on and one ulp
beside each rounding tie; then random bits, over the whole range and within a few binades.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import adversarial
from tests.numerics.compare import DTYPES, assert_as_oracle
from tests.numerics.oracle import FINITE_ONLY, SPECS


def check(x: Tensor, name: str) -> None:
    if name in FINITE_ONLY:
        x = torch.where(x.isfinite(), x, 0.0)
    for scale in adversarial.TENSOR_SCALES.get(name, (None,)):
        assert_as_oracle(x, name, scale)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SPECS)
def test_each_16_bit_pattern_as_the_maximum(name: str, dtype: str) -> None:
    check(adversarial.patterns_as_maximum(DTYPES[dtype]), name)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SPECS)
def test_each_16_bit_pattern_as_an_element_under_16_maxima(name: str, dtype: str) -> None:
    check(adversarial.patterns_under_maxima(DTYPES[dtype], SPECS[name].block), name)


@pytest.mark.parametrize("name", SPECS)
def test_fp32_exponent_sweep_on_and_beside_ties(name: str) -> None:
    check(adversarial.fp32_sweep(), name)


@pytest.mark.parametrize("name", SPECS)
def test_fp32_random_bits(name: str) -> None:
    for x in adversarial.fp32_random_bits():
        check(x, name)
