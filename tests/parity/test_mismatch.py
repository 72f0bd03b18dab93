"""Every difference between two quantisations is found, and gets the right cause."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from npu_qat.numerics import QuantizedTensor, get_profile, quantize
from npu_qat.parity.mismatch import KINDS, Mismatches, compare_codes


def numbers(rows: int = 3, n: int = 80, seed: int = 0) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).bfloat16()


def changed(q: QuantizedTensor, at: tuple[int, ...], code: int) -> QuantizedTensor:
    codes = q.codes.clone()
    codes[at] = code
    return replace(q, codes=codes)


def test_equal_codes_have_no_mismatch() -> None:
    q = quantize(numbers(), "ascend950")
    found = compare_codes(q, replace(q, profile=get_profile("ocp")))
    assert (found.total, found.elements, found.blocks, found.first) == (0, 240, 9, None)


def test_other_ties_are_ties_and_nothing_else() -> None:
    x = numbers(64, 256)
    found = compare_codes(quantize(x, "ascend950"), quantize(x, "ascend950-rint"), x, where="x")
    assert set(found.codes) == {"tie"} and found.codes["tie"] > 20 and not found.scales
    assert found.first is not None and found.first.source == float(x[found.first.index])
    # Without the numbers themselves nobody can tell a tie.
    assert set(compare_codes(quantize(x, "ascend950"), quantize(x, "ascend950-rint")).codes) == {
        "other"
    }


def test_another_rounding_mode_is_more_than_ties() -> None:
    x = numbers(64, 256)
    found = compare_codes(quantize(x, "ascend950"), quantize(x, "ascend950-floor"), x)
    assert found.codes["other"] > found.codes.get("tie", 0)


def test_another_scale_rule_is_a_scale_off_by_one_with_the_elements_that_follow() -> None:
    x = numbers(64, 256)
    found = compare_codes(quantize(x, "ocp"), quantize(x, "ocp-even"), x)
    assert set(found.scales) == {"scale off by one"} and set(found.codes) == {"scale off by one"}
    assert found.codes["scale off by one"] > 10 * found.scales["scale off by one"]


def test_a_number_beyond_the_grid_is_a_clip() -> None:
    x = torch.ones(1, 32)
    x[0, 5] = 7.9
    q = quantize(x, "ocp")
    assert q.codes[0, 5] == 7
    assert dict(compare_codes(q, changed(q, (0, 5), 6), x).codes) == {"clip": 1}


def test_the_sign_of_zero_has_a_name() -> None:
    x = torch.ones(1, 32)
    x[0, 3] = -0.0
    q = quantize(x, "ocp")
    assert dict(compare_codes(q, changed(q, (0, 3), 0), x).codes) == {"sign of zero": 1}


def test_a_flushed_block_has_a_name() -> None:
    x = torch.full((1, 32), 2.0**-125)
    found = compare_codes(quantize(x, "ascend950"), quantize(x, "ocp"), x)
    assert dict(found.codes) == {"flush": 32} and not found.scales
    q = quantize(torch.ones(1, 32), "ocp")
    lost = replace(q, codes=torch.zeros_like(q.codes), scales=torch.zeros_like(q.scales))
    found = compare_codes(q, lost)
    assert dict(found.scales) == {"flush": 1} and dict(found.codes) == {"flush": 32}


def test_a_flipped_code_is_something_else() -> None:
    x = numbers()
    q = quantize(x, "ascend950")
    found = compare_codes(q, changed(q, (1, 70), int(q.codes[1, 70]) ^ 0b100), x, where="w")
    assert dict(found.codes) == {"other": 1}
    assert found.first is not None
    assert (found.first.where, found.first.index, found.first.block) == ("w", (1, 70), 2)
    assert str(found.first).startswith("w [1, 70], block 2 of ")


def test_a_scale_that_is_nan_on_both_sides_hides_the_codes_and_on_one_side_does_not() -> None:
    x = torch.ones(1, 64)
    x[0, 0] = torch.nan
    q = quantize(x, "ocp")
    assert q.scales[0, 0] == 255
    assert compare_codes(q, changed(q, (0, 1), 5), x).total == 0
    scales = q.scales.clone()
    scales[0, 0] = 254
    found = compare_codes(q, replace(q, scales=scales), x)
    assert dict(found.scales) == {"other": 1}
    assert found.first is not None and found.first.index == (0, 0)


def test_blocks_may_run_along_another_axis() -> None:
    x = numbers(64, 5)
    q = quantize(x, "ocp", 0)
    found = compare_codes(q, changed(q, (40, 2), int(q.codes[40, 2]) ^ 0b100), x)
    assert found.first is not None and (found.first.index, found.first.block) == ((40, 2), 1)


def test_nvfp4_compares_the_divisor_of_the_tensor_scale() -> None:
    x = numbers()
    q = quantize(x, "nvfp4")
    assert q.tensor_scale is not None
    # As a file gives it back.
    again = replace(q, tensor_scale=q.tensor_scale.reciprocal().reciprocal())
    assert compare_codes(q, again).total == 0
    found = compare_codes(q, replace(q, tensor_scale=q.tensor_scale * 1.001))
    assert dict(found.scales) == {"other": 1} and not found.codes


def test_sums_keep_the_first_example() -> None:
    x = numbers()
    q = quantize(x, "ascend950")
    one = compare_codes(q, changed(q, (0, 0), int(q.codes[0, 0]) ^ 4), where="a")
    two = compare_codes(q, changed(q, (2, 2), int(q.codes[2, 2]) ^ 4), where="b")
    total = Mismatches() + one + two
    assert total.total == 2 and total.elements == 480
    assert total.first is not None and total.first.where == "a"
    assert "2 of 480 codes and 0 of 18 scales differ (2 codes: other); first a" in str(total)
    assert set(total.as_dict()["codes"]) <= set(KINDS)


def test_what_cannot_be_compared_is_refused() -> None:
    x = numbers(2, 64)
    with pytest.raises(ValueError, match="w: cannot compare codes"):
        compare_codes(quantize(x, "ocp"), quantize(x, "nvfp4"), where="w")
    with pytest.raises(ValueError, match="dual-level"):
        compare_codes(quantize(x, "ascend950-dual"), quantize(x, "ascend950-dual"))
