"""quantize, dequantize and fake_quant as functions: shapes, axes, devices, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import npu_qat.numerics.codec as codec
from npu_qat.numerics import (
    PROFILES,
    QuantizedTensor,
    dequantize,
    e2m1,
    fake_quant,
    get_profile,
    nvfp4_tensor_scale,
    quantize,
    scales,
)
from tests.numerics.compare import bits

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FREE_AXIS = [name for name, profile in PROFILES.items() if profile.forced_axis is None]


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Heavy-tailed numbers with zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp2()
    x[torch.rand(shape, generator=generator) < 0.05] = 0.0
    x[torch.rand(shape, generator=generator) < 0.05] = -0.0
    return x.to(dtype)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", PROFILES)
def test_fake_quant_is_decode_of_encode(name: str, dtype: torch.dtype) -> None:
    finite = PROFILES[name].nan == "error"
    for shape in [(5,), (3, 40), (64, 7), (2, 33, 50), (2, 3, 16, 4)]:
        x = sample(*shape, dtype=dtype)
        if not finite:
            x.view(-1)[1], x.view(-1)[-1] = torch.nan, torch.inf
        axes = range(-x.dim(), x.dim()) if PROFILES[name].forced_axis is None else [None]
        for axis in axes:
            if name == "fork-nvfp4-column" and x.dim() == 1:
                continue
            y = fake_quant(x, name, axis)
            assert y.is_contiguous()
            assert_same_bits(y, dequantize(quantize(x, name, axis), dtype))


@pytest.mark.parametrize("name", FREE_AXIS)
def test_blocking_an_axis_is_blocking_the_last_axis_of_the_moved_tensor(name: str) -> None:
    x = sample(3, 70, 5)
    for axis in (0, 1, -2):
        q = quantize(x, name, axis)
        moved = quantize(x.movedim(axis, -1), name)
        assert torch.equal(q.codes.movedim(axis, -1), moved.codes)
        assert torch.equal(q.scales.movedim(axis, -1), moved.scales)
        assert_same_bits(
            fake_quant(x, name, axis).movedim(axis, -1).contiguous(), dequantize(moved)
        )


@pytest.mark.parametrize("name", PROFILES)
def test_a_short_tail_block_is_a_zero_padded_block(name: str) -> None:
    axis = PROFILES[name].forced_axis or -1
    x = sample(3, 45)
    size = PROFILES[name].block_size
    padded = torch.nn.functional.pad(x, (0, -45 % size))
    if axis == -2:
        x, padded = x.t(), padded.t()
    q, p = quantize(x, name), quantize(padded, name)
    assert torch.equal(q.scales, p.scales)
    assert torch.equal(q.codes, p.codes.narrow(axis, 0, 45))


@pytest.mark.parametrize("name", ["ascend950", "ocp-even", "nvfp4", "ascend950-dual"])
def test_memory_layout_does_not_matter(name: str) -> None:
    base = sample(64, 96, dtype=torch.bfloat16)
    views = [base.t(), base[::2], base[:, 3:90], base.expand(2, 64, 96), base[:, ::3]]
    for view in views:
        assert not view.is_contiguous()
        assert_same_bits(fake_quant(view, name), fake_quant(view.contiguous(), name))
        assert torch.equal(quantize(view, name).codes, quantize(view.contiguous(), name).codes)


@pytest.mark.parametrize("name", PROFILES)
def test_chunking_does_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(40, 1100)
    whole, encoded = fake_quant(x, name), quantize(x, name)
    monkeypatch.setattr(codec, "CPU_CHUNK", 1000)
    assert_same_bits(fake_quant(x, name), whole)
    assert torch.equal(quantize(x, name).codes, encoded.codes)
    assert torch.equal(quantize(x, name).scales, encoded.scales)


# Two profiles depend on the input's dtype by definition.
@pytest.mark.parametrize("name", sorted(set(PROFILES) - {"msmodelslim-weight", "ascend950-dual"}))
def test_16_bit_input_gives_the_bytes_of_the_same_numbers_in_fp32(name: str) -> None:
    x = sample(16, 64, dtype=torch.float16)
    for y in (x, x.bfloat16()):
        q, wide = quantize(y, name), quantize(y.float(), name)
        assert torch.equal(q.codes, wide.codes) and torch.equal(q.scales, wide.scales)


@pytest.mark.parametrize("shape", [(0,), (0, 32), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize("name", ["ascend950", "nvfp4", "ascend950-dual", "msmodelslim-weight"])
def test_empty_tensors_stay_empty(name: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    q = quantize(x, name)
    assert q.codes.shape == shape and fake_quant(x, name).shape == shape
    assert q.scales.shape == (*shape[:-1], -(-shape[-1] // PROFILES[name].block_size))
    assert dequantize(q).shape == shape
    assert q.packed.shape == (*shape[:-1], -(-shape[-1] // 2))


@pytest.mark.parametrize("name", ["ascend950", "ocp", "nvfp4"])
def test_the_input_is_left_alone_and_the_result_has_no_gradient(name: str) -> None:
    for dtype in FLOATS:
        x = sample(4, 64, dtype=dtype).requires_grad_()
        before = x.detach().clone()
        y = fake_quant(x, name)
        assert not y.requires_grad and y.data_ptr() != x.data_ptr()
        assert_same_bits(x.detach(), before)
        with torch.no_grad():
            assert_same_bits(fake_quant(x, name), y)
        with torch.inference_mode():
            inside = fake_quant(x, name)
        assert_same_bits(inside.clone(), y)
        assert_same_bits(fake_quant(x, name), y)


def test_deterministic_mode_changes_nothing() -> None:
    x = sample(8, 100, dtype=torch.bfloat16)
    y = {name: fake_quant(x, name) for name in PROFILES}
    torch.use_deterministic_algorithms(True)
    try:
        for name, value in y.items():
            assert_same_bits(fake_quant(x, name), value)
            quantize(x, name)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", PROFILES)
def test_global_torch_settings_change_nothing(name: str) -> None:
    x = sample(8, 100, dtype=torch.bfloat16)
    want = fake_quant(x, name)
    scales.e8m0_tables.cache_clear()
    e2m1._values.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        # Tables built in inference mode must serve later calls outside of it.
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(fake_quant(x, name).clone(), want)
        assert_same_bits(dequantize(quantize(x.requires_grad_(), name), x.dtype), want)
        assert_same_bits(fake_quant(x, name), want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", PROFILES)
def test_packed_bytes_and_scales_rebuild_the_tensor(name: str) -> None:
    x = sample(6, 35) if PROFILES[name].forced_axis != -2 else sample(35, 6)
    q = quantize(x, name)
    again = QuantizedTensor.from_packed(
        q.packed,
        q.scales,
        shape=tuple(x.shape),
        profile=name,
        axis=q.axis,
        tensor_scale=q.tensor_scale,
        level0_scales=q.level0_scales,
    )
    assert torch.equal(again.codes, q.codes) and again.profile == q.profile
    assert_same_bits(dequantize(again), dequantize(q))


def test_scales_of_each_axis_have_one_entry_a_block() -> None:
    x = sample(70, 40)
    assert quantize(x, "ocp").scales.shape == (70, 2)
    assert quantize(x, "ocp", 0).scales.shape == (3, 40)
    assert quantize(x, "nvfp4").scales.shape == (70, 3)
    q = quantize(sample(2, 1100), "ascend950-dual")
    assert q.scales.shape == (2, 35) and q.level0_scales is not None
    assert q.level0_scales.shape == (2, 3)


def test_quantising_twice_changes_nothing_where_the_maximum_is_kept() -> None:
    x = sample(32, 256)
    for name in ("ocp-ceil", "ocp-rceil", "ascend950-alg2"):
        y = fake_quant(x, name)
        assert_same_bits(fake_quant(y, name), y)


def test_a_given_tensor_scale_makes_rows_independent() -> None:
    x = sample(8, 64, dtype=torch.bfloat16)
    scale = nvfp4_tensor_scale(x.float().abs().amax())
    whole = fake_quant(x, "nvfp4", tensor_scale=scale)
    rows = torch.cat([fake_quant(row, "nvfp4", tensor_scale=scale) for row in x.split(1)])
    assert_same_bits(whole, rows)
    assert_same_bits(whole, fake_quant(x, "nvfp4"))
    alone = torch.cat([fake_quant(row, "nvfp4") for row in x.split(1)])
    assert not torch.equal(whole, alone)


def test_nvfp4_without_its_tensor_scale_is_exact_in_bf16() -> None:
    q = quantize(sample(16, 64), "nvfp4")
    image = dequantize(q, torch.bfloat16, apply_tensor_scale=False)
    assert_same_bits(image.float(), dequantize(q, apply_tensor_scale=False))
    torch.testing.assert_close(image.float() * q.tensor_scale, dequantize(q), rtol=1e-6, atol=0)


def test_data_above_a_given_tensor_scale_saturates() -> None:
    y = fake_quant(torch.tensor([5000.0, 1.0]), "nvfp4", tensor_scale=torch.tensor(1.0))
    assert y[0] == 6 * 448


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fake_quant(torch.tensor(1.0), "ocp"), "0-dimensional"),
        (lambda: fake_quant(torch.zeros(4, dtype=torch.int32), "ocp"), "int32"),
        (lambda: fake_quant(torch.zeros(4, dtype=torch.float64), "ocp"), "float64"),
        (lambda: fake_quant(torch.zeros(4, 4), "ocp", 2), "axis 2"),
        (lambda: fake_quant(torch.zeros(4, 4), "fork-mxfp4", 0), "axis -1 only"),
        (lambda: fake_quant(torch.zeros(4), "fork-nvfp4-column"), "axis -2"),
        (lambda: fake_quant(torch.zeros(4), "opc"), "did you mean 'ocp'"),
        (lambda: fake_quant(torch.tensor([1.0, torch.nan]), "ascend950-mse"), "NaN or Inf"),
        (lambda: quantize(torch.tensor([1.0, torch.inf]), "msmodelslim-weight"), "NaN or Inf"),
        (lambda: fake_quant(torch.ones(4), "ocp", tensor_scale=torch.ones(())), "no tensor scale"),
        (lambda: fake_quant(torch.ones(4), "nvfp4", tensor_scale=torch.ones(2)), "one number"),
        (lambda: fake_quant(torch.ones(4), "nvfp4", tensor_scale=torch.tensor(-1.0)), "negative"),
        (
            lambda: fake_quant(torch.ones(4), "nvfp4", tensor_scale=torch.tensor(torch.nan)),
            "finite",
        ),
        (
            lambda: fake_quant(torch.ones(4), get_profile("ocp").with_rounding("stochastic")),
            "generator",
        ),
        (
            lambda: QuantizedTensor.from_packed(
                torch.zeros(2, 16, dtype=torch.uint8),
                torch.zeros(2, 2, dtype=torch.uint8),
                shape=(2, 32),
                profile="ocp",
            ),
            "uint8 scales of shape (2, 1)",
        ),
        (
            lambda: QuantizedTensor.from_packed(
                torch.zeros(2, 15, dtype=torch.uint8),
                torch.zeros(2, 1, dtype=torch.uint8),
                shape=(2, 32),
                profile="ocp",
            ),
            "16 bytes",
        ),
        (
            lambda: QuantizedTensor.from_packed(
                torch.zeros(2, 16, dtype=torch.uint8),
                torch.zeros(2, 2, dtype=torch.uint8),
                shape=(2, 32),
                profile="nvfp4",
            ),
            "needs tensor_scale",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", PROFILES)
def test_a_gpu_gives_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(1 << 31), (1 << 31) - 1, (64, 1056), generator=generator)
    anything = patterns.to(torch.int32).view(torch.float32)
    x = torch.cat((anything, sample(64, 1056))).to(dtype)
    if PROFILES[name].nan == "error":
        x = torch.where(x.isfinite(), x, 0.0)
    here, there = quantize(x, name), quantize(x.cuda(), name)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scales, there.scales.cpu())
    assert_same_bits(fake_quant(x, name), fake_quant(x.cuda(), name).cpu())
    assert_same_bits(dequantize(here, dtype), dequantize(there, dtype).cpu())
