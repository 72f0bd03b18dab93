"""Golden vectors: bytes of other implementations, recorded once (data/README.md)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from npu_qat.numerics import dequantize, fake_quant, quantize
from tests.numerics.compare import bits

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("NPU_QAT_SHARED", HERE.parents[1].parent / "shared"))

# (file, prefix of the fields inside a family, profile, name of the scales, name of the codes)
PACKED = "codes_packed_low_nibble_first"
ASCEND = "ascend_dynamic_mx_quant_bfloat16"
CASES = [
    ("mxfp4_floor_bfloat16", "", "ocp", "e8m0", PACKED),
    ("mxfp4_even_bfloat16", "", "ocp-even", "e8m0", PACKED),
    ("mxfp4_ceil_bfloat16", "", "ocp-ceil", "e8m0", PACKED),
    ("mxfp4_rceil_bfloat16", "", "ocp-rceil", "e8m0", PACKED),
    ("nvfp4_twolevel_bfloat16", "", "nvfp4", "e4m3", PACKED),
] + [
    (ASCEND, f"{alg}_{mode}/", profile + suffix, "scale", "codes_packed")
    for alg, profile in (
        ("alg0_max0", "ascend950"),
        ("alg2_max6", "ascend950-alg2"),
        ("alg2_max7", "ascend950-alg2-max7"),
    )
    for mode, suffix in (("round", ""), ("rint", "-rint"), ("floor", "-floor"))
]


def bf16(patterns: np.ndarray) -> Tensor:
    return torch.from_numpy(patterns.view(np.int16).copy()).view(torch.bfloat16)


def without_sign_of_zero(packed: Tensor) -> Tensor:
    """Packed codes with code 8 (-0) replaced by 0."""
    low, high = packed & 0x0F, packed >> 4
    return torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)


def replay(folder: Path, file: str, prefix: str, profile: str, scale: str, codes: str) -> int:
    """Check every family of one file under one profile; the number of families."""
    data = np.load(folder / f"{file}.npz")
    families = sorted({key.split("/")[0] for key in data.files if "/" in key})
    for family in families:
        x = bf16(data[f"{family}/x"])
        tensor_scale = None
        if f"{family}/tensor_scale" in data.files:
            tensor_scale = torch.tensor(data[f"{family}/tensor_scale"])
        q = quantize(x, profile, tensor_scale=tensor_scale)
        packed = q.packed
        want = torch.from_numpy(data[f"{family}/{prefix}{codes}"])
        got_y = dequantize(q, torch.bfloat16)
        if profile == "nvfp4":  # recorded with the sign of zero ignored, see __meta__
            packed, want = without_sign_of_zero(packed), without_sign_of_zero(want)
            got_y = torch.where(got_y == 0, 0.0, got_y)
        assert torch.equal(packed, want), (profile, family)
        wanted_scales = data[f"{family}/{prefix}{scale}"]
        assert np.array_equal(q.scales.numpy(), wanted_scales), (profile, family)
        assert torch.equal(
            bits(fake_quant(x, profile, tensor_scale=tensor_scale)),
            bits(dequantize(q, torch.bfloat16)),
        ), (profile, family)
        if f"{family}/y" in data.files:
            y = bf16(data[f"{family}/y"])
            if profile == "nvfp4":
                y = torch.where(y == 0, 0.0, y)
            assert torch.equal(bits(got_y), bits(y)), (profile, family)
    return len(families)


@pytest.mark.parametrize(("file", "prefix", "profile", "scale", "codes"), CASES)
def test_the_committed_golden_vectors(
    file: str, prefix: str, profile: str, scale: str, codes: str
) -> None:
    assert replay(HERE / "data", file, prefix, profile, scale, codes) >= 13


@pytest.mark.parametrize(("file", "prefix", "profile", "scale", "codes"), CASES)
def test_all_golden_vectors_where_they_are_at_hand(
    file: str, prefix: str, profile: str, scale: str, codes: str
) -> None:
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden vectors at {folder}; set NPU_QAT_SHARED to the folder above them")
    assert replay(folder, file, prefix, profile, scale, codes) >= 13


def test_the_tensor_scale_of_the_golden_vectors_is_ours() -> None:
    path = SHARED / "golden" / "nvfp4_twolevel_bfloat16.npz"
    if not path.is_file():
        pytest.skip(f"no golden vectors at {path.parent}; set NPU_QAT_SHARED")
    data = np.load(path)
    for key in data.files:
        if key.endswith("/tensor_scale"):
            x = bf16(data[key.replace("tensor_scale", "x")])
            assert quantize(x, "nvfp4").tensor_scale == torch.tensor(data[key]), key
