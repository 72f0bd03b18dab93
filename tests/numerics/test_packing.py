"""Two codes a byte, and the NPU operator's own layout."""

from __future__ import annotations

import pytest
import torch

from npu_qat.numerics import (
    dequantize,
    from_npu_layout,
    pack,
    quantize,
    to_npu_layout,
    unpack,
)
from npu_qat.numerics.npu_layout import pair_scales, unpair_scales


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_the_even_index_is_in_the_low_nibble() -> None:
    codes = torch.tensor([1, 2, 3, 15, 8], dtype=torch.uint8)
    assert pack(codes).tolist() == [0x21, 0xF3, 0x08]
    assert unpack(pack(codes), 5).tolist() == codes.tolist()


@pytest.mark.parametrize("shape", [(6,), (7,), (3, 8), (3, 9), (4, 5, 6), (0, 4), (4, 0)])
def test_unpack_is_the_inverse_of_pack_on_every_axis(shape: tuple[int, ...]) -> None:
    codes = random_codes(*shape)
    for axis in range(-len(shape), len(shape)):
        packed = pack(codes, axis)
        assert packed.shape[axis] == -(-shape[axis] // 2)
        assert torch.equal(unpack(packed, shape[axis], axis), codes)


def test_wrong_dtypes_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(4))
    with pytest.raises(ValueError, match="uint8"):
        unpack(torch.zeros(4), 8)
    with pytest.raises(ValueError, match="4 bytes"):
        unpack(torch.zeros(5, dtype=torch.uint8), 8)


@pytest.mark.parametrize(
    ("axis", "scale_shape"), [(-1, (1536, 140, 2)), (0, (24, 8960, 2)), (1, (1536, 140, 2))]
)
def test_shapes_are_those_of_the_operator(axis: int, scale_shape: tuple[int, ...]) -> None:
    codes, scales = to_npu_layout(quantize(torch.zeros(1536, 8960), "ascend950", axis))
    assert codes.shape == (1536, 4480) and scales.shape == scale_shape
    assert codes.dtype == scales.dtype == torch.uint8


def test_scale_pairs_lie_side_by_side_on_the_last_axis() -> None:
    scales = torch.arange(1, 7, dtype=torch.uint8).view(2, 3)
    paired = pair_scales(scales, -1)
    assert paired.tolist() == [[[1, 2], [3, 0]], [[4, 5], [6, 0]]]
    assert torch.equal(unpair_scales(paired, -1, 3), scales)


def test_scale_pairs_interleave_on_another_axis() -> None:
    scales = torch.arange(1, 16, dtype=torch.uint8).view(5, 3)
    paired = pair_scales(scales, 0)
    assert paired.shape == (3, 3, 2)
    for block in range(5):
        for column in range(3):
            assert paired[block // 2, column, block % 2] == scales[block, column]
    assert not paired[2, :, 1].any()
    assert torch.equal(unpair_scales(paired, 0, 5), scales)


@pytest.mark.parametrize(("shape", "axis"), [((4, 96), -1), ((96, 4), 0), ((2, 70, 6), 1)])
def test_the_operator_layout_comes_back(shape: tuple[int, ...], axis: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = quantize(x, "ascend950", axis)
    codes, scales = to_npu_layout(q)
    again = from_npu_layout(codes, scales, "ascend950", axis)
    assert torch.equal(again.codes, q.codes) and torch.equal(again.scales, q.scales)
    assert torch.equal(dequantize(again), dequantize(q))


def test_what_the_operator_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        to_npu_layout(quantize(torch.zeros(4, 33), "ascend950"))
    with pytest.raises(ValueError, match="E8M0"):
        to_npu_layout(quantize(torch.zeros(4, 32), "nvfp4"))
    codes, scales = to_npu_layout(quantize(torch.zeros(4, 96), "ascend950"))
    with pytest.raises(ValueError, match="shape"):
        from_npu_layout(codes, scales[:, :1], "ascend950")
    with pytest.raises(ValueError, match="axis 2"):
        from_npu_layout(codes, scales, "ascend950", 2)
