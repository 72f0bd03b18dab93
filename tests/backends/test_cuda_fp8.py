"""MXFP4 as FP8: the same numbers, exact products, and a refusal of what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="the CUDA backend needs Triton")

from npu_qat.backends import BackendUnavailable, EmulationBackend
from npu_qat.backends.base import PackedWeight
from npu_qat.backends.cuda import fp8, matmul
from npu_qat.backends.cuda.backend import CudaBackend, Fp8Backend
from npu_qat.config import Recipe
from npu_qat.layers import prepare_model
from npu_qat.numerics import dequantize, fake_quant, get_profile, quantize
from npu_qat.numerics.profiles import PROFILES
from tests import adversarial
from tests.backends.kernels import DEVICE, INTERPRETED, needs_kernels
from tests.layers.test_quant_linear import Block

pytestmark = [
    *needs_kernels,
    pytest.mark.skipif(
        not INTERPRETED and torch.cuda.get_device_capability() < fp8.CAPABILITY,
        reason="this GPU has no FP8 tensor cores",
    ),
]
BACKEND = Fp8Backend()
NAMES = [name for name, p in PROFILES.items() if fp8.holds(p) and fp8.encodes(p)]


def decoded(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the E5M2 bytes of ``x`` stand for, and what ``numerics`` says, in fp32."""
    codes, scales = fp8.encode_rows(x.to(DEVICE), get_profile(name))
    return (codes.float() * scales).cpu(), fake_quant(x, name).float()


def differs(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    signs = torch.signbit(found) != torch.signbit(wanted)
    return ((found != wanted) | signs) & ~(found.isnan() & wanted.isnan())


@pytest.mark.parametrize("name", NAMES)
def test_encoded_rows_are_the_numbers_of_the_profile(name: str) -> None:
    assert "ascend950" in NAMES and "ocp" in NAMES
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1] *= 2.0**-80
    x[2, :32] *= 2.0**-20
    x[3] = 0
    x[4, 7] = float("nan")
    assert not differs(*decoded(x, name)).any()


@pytest.mark.parametrize("name", NAMES if not INTERPRETED else ["ascend950"])
def test_every_bf16_pattern_is_encoded_as_the_profile_says(name: str) -> None:
    """One block a row. What is far below its row's largest number may lose bits of its own."""
    x = adversarial.patterns_under_maxima(torch.bfloat16, 32)[:: 997 if INTERPRETED else 1]
    found, wanted = decoded(x, name)
    assert not differs(found, wanted).any()


@pytest.mark.parametrize("name", NAMES)
def test_numbers_far_below_their_row_are_cut_and_no_others(name: str) -> None:
    x = adversarial.anything(torch.bfloat16, (12 if INTERPRETED else 768, 96), seed=3)
    found, wanted = decoded(x, name)
    # Of the row as it came: a number whose block becomes NaN or Inf counts, too. (The products of
    # such a row are NaN or Inf whatever the others are.)
    largest = x.float().abs().nan_to_num(0.0).amax(1, keepdim=True)
    small = wanted.abs() < largest * 2.0**-29
    wrong = differs(found, wanted) & wanted.isfinite()
    assert not (wrong & ~small).any()
    assert (found.abs() <= wanted.abs())[small & wanted.isfinite()].all()


def weight(rows: int = 48, columns: int = 96) -> torch.Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.05
    made[0, :32] *= 2.0**-9
    made[1] = 0
    made[2] *= 2.0**-100
    return made.bfloat16()


def test_a_decoded_weight_is_that_of_the_codes() -> None:
    q = quantize(weight(), "ascend950")
    prepared = BACKEND.prepare_weight(
        PackedWeight(q.packed.to(DEVICE), q.scales.to(DEVICE), (48, 96), "ascend950")
    )
    assert isinstance(prepared, fp8.Fp8Weight)
    found = fp8.decode_weight(prepared).float() * prepared.row_scales
    assert not differs(found.cpu(), dequantize(q, torch.float32)).any()


def test_a_row_that_spans_too_much_is_refused() -> None:
    wide = weight()
    wide[5, :32] *= 2.0**-20
    q = PackedWeight.of(BACKEND.quantize(wide.to(DEVICE), "ascend950"))
    with pytest.raises(ValueError, match=r"row 5 of the weight holds numbers from .* 17 octaves"):
        BACKEND.prepare_weight(q)


def test_a_layer_with_such_a_row_names_itself() -> None:
    linear = nn.Linear(96, 48, bias=False).bfloat16()
    linear.weight.data = weight()
    linear.weight.data[5, :32] *= 2.0**-20
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"proj": linear})])}).to(DEVICE)
    prepare_model(model, Recipe(matmul="fused"), CudaBackend())
    layer = model.get_submodule("layers.0.proj")
    with pytest.raises(ValueError, match=r"layers\.0\.proj: row 5 .* set quant.matmul: auto"):
        layer(torch.randn(70, 96, device=DEVICE).bfloat16())


@pytest.mark.parametrize("rows", [8, 70])
def test_the_product_is_that_of_the_decoded_numbers(rows: int) -> None:
    """Few rows read the packed weight, many are multiplied as FP8."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, rows // 2, 96, generator=generator).bfloat16().to(DEVICE)
    packed = BACKEND.quantize_packed(weight().to(DEVICE), "ascend950")
    bias = torch.randn(48, generator=generator).bfloat16().to(DEVICE)
    encoded = BACKEND.encode_input(x, "ascend950")
    assert (encoded.codes.dtype == torch.bfloat16) == (rows <= matmul.MAX_ROWS)
    values = BACKEND.decode_input(encoded)
    assert torch.equal(values.cpu(), fake_quant(x.cpu(), "ascend950"))
    y = BACKEND.fused_linear(encoded, BACKEND.prepare_weight(packed), bias)
    assert y.shape == (2, rows // 2, 48)
    decoded_weight = BACKEND.dequantize(packed, torch.float32).double()
    exact = values.double() @ decoded_weight.T + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("storage", ["packed"] if INTERPRETED else ["image", "packed"])
def test_a_layer_multiplies_codes_where_that_is_asked_for(storage: str) -> None:
    results = []
    for backend, mode in ((CudaBackend(), "fused"), (EmulationBackend(), "auto")):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layers": nn.ModuleList([Block(64)])}).bfloat16()
        model = model if backend.name == "emulation" else model.to(DEVICE)
        handle = prepare_model(model, Recipe(base_storage=storage, matmul=mode), backend)
        assert handle.matmul.name == ("fused" if mode == "fused" else "emulated")
        device = next(model.parameters()).device
        x = torch.randn(66, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        x = x.to(device).requires_grad_()
        y = model["layers"][0](x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        handle.audit.verify(model)
        results.append((y.detach().cpu(), grad.cpu()))
    for y, grad in results[:-1]:
        torch.testing.assert_close(y, results[-1][0], rtol=2**-6, atol=2**-6)
        torch.testing.assert_close(grad, results[-1][1], rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("weights", "inputs", "shape", "reason"),
    [
        ("nvfp4", "ascend950", (64, 32), "'nvfp4' do not fit into FP8"),
        ("ascend950", "ascend950-dual", (64, 32), "'ascend950-dual' do not fit into FP8"),
        ("ascend950", "ascend950-mse", (64, 32), "'ascend950-mse' is one for weights"),
        ("ascend950", "ascend950", (48, 32), "multiple of 32 inputs"),
        ("ascend950", "ascend950", (64, 24), "multiple of 16 outputs"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    weights: str, inputs: str, shape: tuple[int, int], reason: str
) -> None:
    with pytest.raises(BackendUnavailable, match=reason):
        BACKEND.check_fused(weights, inputs, *shape)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"model\.dtype: bf16"):
        BACKEND.encode_input(torch.zeros(70, 64, device=DEVICE), "ascend950")
