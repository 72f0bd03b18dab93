"""The backend of the AscendC kernels, on operators that run the kernels on the host model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from npu_qat import numerics
from npu_qat.backends import BackendUnavailable, PackedWeight, ascendc
from npu_qat.backends.ascendc.rules import KernelRule, kernel_profiles, kernel_rule
from npu_qat.config import Recipe
from npu_qat.layers import prepare_model
from tests.adversarial import ordinary
from tests.kernels_ascendc import host_model
from tests.numerics.compare import same
from tests.training.tiny import tiny_model


class HostOps:
    """`torch.ops.npu_qat` as the backend calls it; counts the calls."""

    def __init__(self, kernels: host_model.HostKernels) -> None:
        self.kernels = kernels
        self.calls: list[str] = []

    def mxfp4_fake_quant(self, x, rule):
        self.calls.append("mxfp4_fake_quant")
        return self.kernels.fake_quant(x.contiguous(), _profile(rule))

    def mxfp4_pack(self, x, rule):
        self.calls.append("mxfp4_pack")
        return self.kernels.pack(x.contiguous(), _profile(rule))

    def mxfp4_dequant(self, codes, scales, length, dtype):
        self.calls.append("mxfp4_dequant")
        return self.kernels.dequant(codes, scales, length, dtype)

    def rms_norm_mxfp4_fake_quant(self, x, gamma, epsilon, rule):
        self.calls.append("rms_norm_mxfp4_fake_quant")
        rows = x.detach().contiguous()
        return self.kernels.rms_norm_fake_quant(rows, gamma.detach(), epsilon, _profile(rule))


def _profile(rule: list[int]) -> str:
    return next(name for name in kernel_profiles() if kernel_rule(name) == KernelRule(*rule))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return host_model.build(tmp_path_factory.mktemp("kernels") / "kernels.so")


@pytest.fixture
def ops(library):
    return HostOps(host_model.HostKernels(library))


@pytest.fixture
def backend(ops):
    return ascendc.AscendcBackend(ops, "kernels.so")


def test_numbers_are_those_of_numerics_and_come_from_the_kernels(backend, ops):
    x = ordinary((6, 320), torch.bfloat16)
    q = backend.quantize(x, "ascend950")
    expected = numerics.quantize(x, "ascend950")
    assert same(q.codes, expected.codes) and same(q.scales, expected.scales)
    assert same(backend.fake_quant(x, "ascend950"), numerics.fake_quant(x, "ascend950"))
    values = backend.dequantize(PackedWeight.of(expected), torch.bfloat16)
    assert same(values, numerics.dequantize(expected, torch.bfloat16))
    assert ops.calls == ["mxfp4_pack", "mxfp4_fake_quant", "mxfp4_dequant"]


def test_another_axis_gives_the_same_numbers_without_a_kernel(backend, ops):
    x = ordinary((64, 96), torch.bfloat16)
    assert same(backend.fake_quant(x, "ascend950", 0), numerics.fake_quant(x, "ascend950", 0))
    assert ops.calls == []


def test_weights_of_another_profile_are_encoded_by_the_reference(backend, ops):
    x = ordinary((8, 64), torch.bfloat16)
    q, expected = backend.quantize(x, "ascend950-mse"), numerics.quantize(x, "ascend950-mse")
    assert same(q.codes, expected.codes) and same(q.scales, expected.scales)
    assert ops.calls == []


def test_activations_of_another_profile_are_refused(backend):
    with pytest.raises(BackendUnavailable, match="do not compute profile 'nvfp4'"):
        backend.check_profile("nvfp4")
    with pytest.raises(BackendUnavailable, match="do not compute profile 'nvfp4'"):
        backend.fake_quant(torch.ones(2, 32), "nvfp4")


def test_linear_is_the_product_with_the_decoded_weight(backend):
    weight = numerics.quantize(ordinary((24, 64), torch.bfloat16), "ascend950")
    x, bias = ordinary((5, 64), torch.bfloat16), ordinary((24,), torch.bfloat16)
    y = backend.linear(x, PackedWeight.of(weight), bias)
    values = numerics.dequantize(weight, torch.bfloat16)
    assert same(y, torch.nn.functional.linear(x, values, bias))


def test_a_prepared_model_norms_and_quantises_by_one_kernel(backend, ops):
    model = tiny_model().to(torch.bfloat16)
    ids = torch.arange(24).reshape(2, 12) % model.config.vocab_size
    reference = prepare_model(copy.deepcopy(model), Recipe()).model
    fused = prepare_model(model, Recipe(), backend).model
    plain, ours = reference(ids).logits, fused(ids).logits
    layers = model.config.num_hidden_layers
    assert ops.calls.count("rms_norm_mxfp4_fake_quant") == 2 * layers
    # Inputs of o and down; those of q, k, v, gate and up came with the norm.
    assert ops.calls.count("mxfp4_fake_quant") == 2 * layers
    assert (ours - plain).abs().max() <= 0.05 * plain.abs().max()


def test_the_gradient_of_the_norm_is_that_of_the_module(backend):
    norm = Qwen2RMSNorm(96, eps=1e-6)
    norm.weight.data = 1 + 0.3 * torch.randn(96, generator=torch.Generator().manual_seed(1))
    x = ordinary((7, 96), torch.float32).requires_grad_()
    grad_y, grad_q = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(2))
    (expected,) = torch.autograd.grad(norm(x), x, grad_y + grad_q)
    found = backend.rms_norm_backward(grad_y, grad_q, x.detach(), norm.weight, 1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "profile", "row"),
    [
        ((2, 8224), torch.bfloat16, "ascend950", True),
        ((2, 64), torch.float32, "ascend950", True),
        ((2, 64), torch.bfloat16, "nvfp4", True),
        ((2, 64), torch.bfloat16, None, True),
        ((2, 64), torch.bfloat16, "ascend950", False),
    ],
)
def test_what_the_norm_kernel_does_not_take_stays_with_the_module(
    backend, shape, dtype, profile, row
):
    assert not backend.fuses(torch.ones(shape, dtype=dtype), profile, row=row)
    assert backend.fuses(torch.ones(2, 64, dtype=torch.bfloat16), "ascend950", row=True)


class Chip:
    """`torch.npu` of a machine with one chip."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number

    def get_soc_version(self) -> int:
        return self.number

    def get_device_name(self, _index: int) -> str:
        return self.name


def test_without_the_kernels_the_message_says_how_to_build_them(monkeypatch):
    monkeypatch.setattr(torch, "npu", Chip("Ascend910B3", 222), raising=False)
    monkeypatch.setenv(ascendc.LIBRARY_VARIABLE, "/nowhere/kernels.so")
    with pytest.raises(BackendUnavailable, match=r"NPU_QAT_ASCENDC_LIBRARY.*kernels_ascendc.build"):
        ascendc.load(torch.device("cpu"))


def test_a_950_does_not_get_them(monkeypatch):
    monkeypatch.setattr(torch, "npu", Chip("Ascend950PR", 260), raising=False)
    with pytest.raises(BackendUnavailable, match="for A2 and A3"):
        ascendc.load(torch.device("cpu"))


def test_a_file_that_is_no_library_is_an_error_and_no_fallback(monkeypatch, tmp_path):
    library = Path(tmp_path / "kernels.so")
    library.write_bytes(b"not a library")
    monkeypatch.setattr(torch, "npu", Chip("Ascend910B3", 222), raising=False)
    monkeypatch.setenv(ascendc.LIBRARY_VARIABLE, str(library))
    with pytest.raises(OSError):
        ascendc.load(torch.device("cpu"))
