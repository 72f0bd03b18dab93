"""The CPU kernels for the NPU's operators: right numbers, and as strict as the operator documents.

These tests need no torch-npu. What they show: the kernels (integer arithmetic, written from the
published operator source) and ``npu_qat.numerics`` (floating point, written from the profile
table) give the same bytes, and both give the golden vectors.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from npu_qat.numerics import dequantize, quantize, to_npu_layout
from tests.contract import op_kernels
from tests.contract.op_kernels import E2M1, E8M0

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("NPU_QAT_SHARED", ROOT.parent / "shared"))
GOLDEN = "ascend_dynamic_mx_quant_bfloat16.npz"
ALGORITHMS = {
    "ascend950": (0, 0.0, "alg0_max0"),
    "ascend950-alg2": (2, 6.0, "alg2_max6"),
    "ascend950-alg2-max7": (2, 7.0, "alg2_max7"),
}
ROUND_MODES = {"": "round", "-rint": "rint", "-floor": "floor"}
# profile name, then what the operator is told, then the prefix in the golden file
CASES = [
    (
        base + suffix,
        {"scale_alg": alg, "dst_type_max": dst_type_max, "round_mode": mode},
        f"{prefix}_{mode}",
    )
    for base, (alg, dst_type_max, prefix) in ALGORITHMS.items()
    for suffix, mode in ROUND_MODES.items()
]


def all_patterns(dtype: torch.dtype) -> Tensor:
    """The 65,536 numbers of a 16-bit dtype."""
    return torch.arange(-32768, 32768).to(torch.int16).view(dtype)


def mixed(dtype: torch.dtype, rows: int = 64, columns: int = 1024, seed: int = 0) -> Tensor:
    """Random bit patterns, and random numbers within a few binades of each other."""
    generator = torch.Generator().manual_seed(seed)
    wild = all_patterns(dtype)[torch.randint(65536, (rows, columns), generator=generator)]
    tame = torch.randn((rows, columns), generator=generator).to(dtype)
    return torch.cat((wild, tame))


def golden(folder: Path, prefix: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x, packed codes, scale bytes) of every family in the golden file."""
    data = np.load(folder / GOLDEN)
    families = sorted({key.split("/")[0] for key in data.files if key.endswith("/x")})
    return [
        (
            torch.from_numpy(data[f"{family}/x"].view(np.int16)).view(torch.bfloat16),
            torch.from_numpy(data[f"{family}/{prefix}/codes_packed"]),
            torch.from_numpy(data[f"{family}/{prefix}/scale"]),
        )
        for family in families
    ]


@pytest.mark.parametrize("folder", [ROOT / "tests/numerics/data", SHARED / "golden"])
@pytest.mark.parametrize(("profile", "arguments", "prefix"), CASES)
def test_golden_vectors(profile: str, arguments: dict, prefix: str, folder: Path) -> None:
    if not (folder / GOLDEN).is_file():
        pytest.skip(f"no golden vectors at {folder}; set NPU_QAT_SHARED to the folder above them")
    families = golden(folder, prefix)
    assert len(families) >= 13
    for x, codes, scales in families:
        y, pairs = op_kernels.npu_dynamic_mx_quant(x, **arguments)
        assert torch.equal(y, codes)
        assert torch.equal(pairs.flatten(-2)[..., : scales.shape[-1]], scales)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize(("profile", "arguments", "prefix"), CASES)
def test_the_kernels_and_the_reference_agree_on_bf16(
    profile: str, arguments: dict, prefix: str, axis: int
) -> None:
    alone = torch.zeros(65536, 32, dtype=torch.bfloat16)
    alone[:, 5] = all_patterns(torch.bfloat16)
    for x in (alone, mixed(torch.bfloat16)):
        x = x if axis == -1 else x.t().contiguous()
        found = op_kernels.npu_dynamic_mx_quant(x, axis=axis, **arguments)
        for a, b in zip(found, to_npu_layout(quantize(x, profile, axis)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("suffix", ROUND_MODES)
def test_the_kernels_and_the_reference_agree_on_fp16_under_alg_0(suffix: str) -> None:
    x = mixed(torch.float16)
    found = op_kernels.npu_dynamic_mx_quant(x, round_mode=ROUND_MODES[suffix])
    for a, b in zip(found, to_npu_layout(quantize(x, "ascend950" + suffix)), strict=True):
        assert torch.equal(a, b)


def test_alg_2_sees_fp16_rounded_to_bf16() -> None:
    """So a maximum just above 1.5 * 2^e is not bumped, where the exact rule would bump it."""
    x = torch.zeros(2, 32, dtype=torch.float16)
    x[0, 0], x[1, 0] = 1.5 + 2**-10, 1.5 + 2**-6
    _, scales = op_kernels.npu_dynamic_mx_quant(x, scale_alg=2)
    assert scales[:, 0, 0].tolist() == [125, 126]
    assert quantize(x, "ascend950-alg2-rint").scales.flatten().tolist() == [126, 126]


def test_a_block_worked_by_hand() -> None:
    """Maximum 5 = 1.25 * 2^2, so the scale is 2^0; ties at .25, .75, 2.5 and 5."""
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, :8] = torch.tensor([5.0, -5.0, 2.5, -2.5, 0.25, 0.75, -0.25, 1.1])
    want = {
        "rint": [6, 14, 4, 12, 0, 2, 8, 2],
        "round": [7, 15, 5, 13, 1, 2, 9, 2],
        "floor": [6, 15, 4, 13, 0, 1, 9, 2],
    }
    for round_mode, codes in want.items():
        y, scales = op_kernels.npu_dynamic_mx_quant(x, round_mode=round_mode)
        assert op_kernels.unpack_last(y)[0, :8].tolist() == codes, round_mode
        assert scales.tolist() == [[[127, 0]]]


def test_small_blocks_are_flushed_and_bad_ones_are_nan() -> None:
    x = torch.zeros(4, 32, dtype=torch.bfloat16)
    x[:, 1] = torch.tensor([-(2.0**-125), 2.0**-124, float("inf"), float("nan")])
    y, scales = op_kernels.npu_dynamic_mx_quant(x)
    assert scales[:, 0, 0].tolist() == [0, 1, 255, 255]
    assert op_kernels.unpack_last(y)[:, 1].tolist() == [8, 6, 0, 0]


@pytest.mark.parametrize("shape", [(64,), (3, 96), (2, 70, 34), (2, 3, 66, 4)])
def test_layouts_for_every_axis(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for axis in range(-len(shape), len(shape)):
        found = op_kernels.npu_dynamic_mx_quant(x, axis=axis, round_mode="round")
        for a, b in zip(found, to_npu_layout(quantize(x, "ascend950", axis)), strict=True):
            assert a.is_contiguous() and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dual_level_kernel_and_the_reference_agree(dtype: torch.dtype) -> None:
    x = mixed(dtype, columns=1280)
    if dtype == torch.bfloat16:  # a level-0 scale that would be subnormal becomes 0
        tiny = torch.linspace(-1, 1, 1280).to(dtype) * 2.0**-124
        x = torch.cat((x, tiny[None], tiny[None] / 2, torch.zeros(1, 1280, dtype=dtype)))
    codes, level0, level1 = op_kernels.npu_dynamic_dual_level_mx_quant(x)
    q = quantize(x, "ascend950-dual")
    assert torch.equal(op_kernels.unpack_last(codes), q.codes)
    assert q.level0_scales is not None and torch.equal(level0, q.level0_scales)
    assert torch.equal(level1.flatten(-2), q.scales)


def test_dequantisation_is_the_reference_s() -> None:
    x = mixed(torch.bfloat16)
    for axis in (-1, 0):
        found = op_kernels.npu_anti_mx_quant(
            *op_kernels.npu_dynamic_mx_quant(x, axis=axis, round_mode="round"),
            axis=axis,
            src_type=E2M1,
        )
        want = dequantize(quantize(x, "ascend950", axis), torch.bfloat16)
        assert torch.equal(found.nan_to_num(), want.nan_to_num())
        assert torch.equal(found.isnan(), want.isnan())


# --- products -------------------------------------------------------------------------------------


def operands(rows: int = 5, columns: int = 7, k: int = 96) -> tuple[Tensor, Tensor]:
    """Activation [M, K] and weight [N, K]; K = 96 has an odd number of blocks."""
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.randn(n, k, generator=generator).to(torch.bfloat16) for n in (rows, columns))
    return x, w


def product(x: Tensor, w: Tensor, **changes: object) -> Tensor:
    """The product as a serving stack calls it, with arguments changed."""
    xq, xs = op_kernels.npu_dynamic_mx_quant(x, round_mode="round")
    wq, ws = op_kernels.npu_dynamic_mx_quant(w, round_mode="round")
    arguments = {
        "x1": xq,
        "x2": wq.transpose(0, 1),
        "scale": ws.transpose(0, 1),
        "pertoken_scale": xs,
        "output_dtype": 15,
        "x1_dtype": E2M1,
        "x2_dtype": E2M1,
        "scale_dtype": E8M0,
        "pertoken_scale_dtype": E8M0,
        "group_sizes": [1, 1, 32],
    }
    return op_kernels.npu_quant_matmul(**{**arguments, **changes})


def exact(x: Tensor, w: Tensor) -> Tensor:
    a, b = (dequantize(quantize(t, "ascend950"), torch.float32).double() for t in (x, w))
    return a @ b.t()


def test_the_product_is_that_of_the_values() -> None:
    x, w = operands()
    y = product(x, w, output_dtype=6)
    assert torch.allclose(y.double(), exact(x, w), rtol=1e-6, atol=1e-6)
    bias = torch.arange(7.0)
    with_bias = product(x, w, output_dtype=6, bias=bias)
    assert torch.allclose(with_bias, y + bias)
    assert product(x, w).dtype == torch.bfloat16
    assert torch.equal(product(x, w), y.to(torch.bfloat16))


def test_a_weight_that_is_blocked_along_its_first_dimension_goes_in_as_it_is() -> None:
    x, w = operands(columns=8)
    wq, ws = op_kernels.npu_dynamic_mx_quant(w.t().contiguous(), axis=-2, round_mode="round")
    y = product(x, w, x2=wq, scale=ws, output_dtype=6)
    assert torch.allclose(y.double(), exact(x, w), rtol=1e-6, atol=1e-6)


def test_the_longest_dimension_is_that_of_the_stored_matrix() -> None:
    """aclnnQuantMatmulV5: of a transposed x2 it is K, so a vocabulary of 151,936 rows fits."""
    x, w = operands(1, 65538, 64)
    assert product(x, w).shape == (1, 65538)
    wq, ws = op_kernels.npu_dynamic_mx_quant(w.t().contiguous(), axis=-2, round_mode="round")
    with pytest.raises(RuntimeError, match="N of an untransposed weight"):
        product(x, w, x2=wq, scale=ws)
    with pytest.raises(RuntimeError, match="K must be"):
        product(*operands(1, 2, 65538))


REFUSED = {
    "a contiguous transpose": ("x2", lambda x2: x2.contiguous(), "k dim of x1 and x2"),
    "a contiguous scale": ("scale", lambda s: s.contiguous(), "scale must be one too"),
    "an untransposed weight": ("x2", lambda x2: x2.t(), "k dim of x1 and x2"),
    "no group_sizes": ("group_sizes", lambda _: None, "group_sizes"),
    "groups of 16": ("group_sizes", lambda _: [1, 1, 16], "group_sizes"),
    "no output dtype": ("output_dtype", lambda _: None, "int8"),
    "torch's own FP4 dtype": ("x1_dtype", lambda _: 45, "dtypes"),
    "no scale dtype": ("scale_dtype", lambda _: None, "dtypes"),
    "a 3-D input": ("x1", lambda x1: x1[None], "flatten x"),
    "a missing pad column": ("pertoken_scale", lambda s: s.flatten(-2)[..., :3], "shape"),
    "signed codes": ("x1", lambda x1: x1.view(torch.int8), "plain uint8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_product_refuses(case: str) -> None:
    x, w = operands(columns=8)
    argument, change, message = REFUSED[case]
    xq, xs = op_kernels.npu_dynamic_mx_quant(x, round_mode="round")
    wq, ws = op_kernels.npu_dynamic_mx_quant(w, round_mode="round")
    given = {"x1": xq, "x2": wq.t(), "scale": ws.transpose(0, 1), "pertoken_scale": xs}
    with pytest.raises(RuntimeError, match=message):
        product(x, w, **{argument: change(given.get(argument))})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_refuses_a_16_bit_bias(dtype: torch.dtype) -> None:
    x, w = operands()
    with pytest.raises(RuntimeError, match="bias must be float32"):
        product(x, w, bias=torch.zeros(7, dtype=dtype))


def test_a_pad_scale_must_be_zero() -> None:
    x, w = operands()
    xq, xs = op_kernels.npu_dynamic_mx_quant(x, round_mode="round")
    assert xs.shape == (5, 2, 2) and (xs[:, 1, 1] == 0).all()
    xs[0, 1, 1] = 127
    with pytest.raises(RuntimeError, match="must be 0"):
        product(x, w, x1=xq, pertoken_scale=xs)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.zeros(2, 33, dtype=torch.bfloat16), {}, "divisible by 2"),
        (torch.zeros(2, 32), {}, "dtype"),
        (torch.zeros(2, 32, dtype=torch.bfloat16), {"axis": 2}, "axis"),
        (torch.zeros(2, 32, dtype=torch.bfloat16), {"dst_type": 45}, "296"),
        (torch.zeros(2, 32, dtype=torch.bfloat16), {"block_size": 16}, "block_size"),
        (torch.zeros(2, 32, dtype=torch.bfloat16), {"scale_alg": 1}, "scale_alg"),
        (torch.zeros(2, 32, dtype=torch.bfloat16), {"round_mode": "trunc"}, "round_mode"),
        (torch.zeros(2, 32, dtype=torch.bfloat16), {"dst_type_max": 6.0}, "scale_alg 2"),
        (torch.zeros(2, 32, dtype=torch.bfloat16), {"max_low_bound": 1.0}, "max_low_bound"),
    ],
)
def test_the_quantiser_refuses(x: Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        op_kernels.npu_dynamic_mx_quant(x, **arguments)


def dual_product(x: Tensor, w: Tensor, **changes: object) -> Tensor:
    x1, x0, xs = op_kernels.npu_dynamic_dual_level_mx_quant(x)
    x2, w0, ws = op_kernels.npu_dynamic_dual_level_mx_quant(w)
    arguments = {
        "x1": x1,
        "x2": op_kernels.npu_format_cast(x2.view(torch.int8), 29, customize_dtype=1),
        "x1_level0_scale": x0,
        "x2_level0_scale": w0.t(),
        "x1_level1_scale": xs,
        "x2_level1_scale": ws,
    }
    return op_kernels.npu_dual_level_quant_matmul(**{**arguments, **changes})


def test_the_dual_level_product_is_that_of_the_values() -> None:
    x, w = operands(3, 16, 640)
    a, b = (dequantize(quantize(t, "ascend950-dual"), torch.float32).double() for t in (x, w))
    want = a @ b.t()
    assert torch.allclose(dual_product(x, w).double(), want, rtol=2**-8, atol=1e-3)
    plain = op_kernels.npu_dynamic_dual_level_mx_quant(w)[0].view(torch.int8)
    wrong = dual_product(x, w, x2=plain)  # not cast to FRACTAL_NZ: a device would not complain
    assert not torch.allclose(wrong.double(), want, rtol=0.1, atol=0.1)
    with pytest.raises(RuntimeError, match="level-0 scales"):
        level0 = op_kernels.npu_dynamic_dual_level_mx_quant(w)[1]
        dual_product(x, w, x2_level0_scale=level0)


@pytest.mark.parametrize("shape", [(48, 64), (17, 40)])
def test_fractal_nz_and_back(shape: tuple[int, int]) -> None:
    x = torch.arange(shape[0] * shape[1]).remainder(251).sub(125).to(torch.int8).view(shape)
    nz = op_kernels.npu_format_cast(x, op_kernels.ACL_FORMAT_FRACTAL_NZ)
    stored = nz.as_strided((64,), (1,))
    assert torch.equal(stored[32:], x[1, :32]), "the second row of the first tile"
    assert nz.shape == shape and torch.equal(op_kernels.from_fractal_nz(nz), x)
