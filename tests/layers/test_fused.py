"""Layers whose device multiplies the codes: same numbers, same gradients, one encoding an input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from npu_qat.backends import BackendUnavailable, EmulationBackend
from npu_qat.backends.npu import NpuBackend
from npu_qat.config import LoraSection, Recipe
from npu_qat.layers import AuditError, QuantizedModel, add_lora, prepare_model
from npu_qat.layers.quant_linear import SharedInput
from npu_qat.numerics import fake_quant
from tests.backends.fake_npu import FakeNpu, fake_backend
from tests.layers.test_quant_linear import Block

DUAL = {"weight_profile": "ascend950-dual", "activation_profile": "ascend950-dual"}


def prepared(
    recipe: Recipe, backend: Any, width: int = 96
) -> tuple[nn.ModuleDict, nn.Module, QuantizedModel]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(width)])}).bfloat16()
    handle = prepare_model(model, recipe, backend)
    return model, model["layers"][0], handle


def rows(width: int = 96, seed: int = 1) -> torch.Tensor:
    x = torch.randn(2, 6, width, generator=torch.Generator().manual_seed(seed))
    return x.bfloat16().requires_grad_(True)


def forward_and_backward(recipe: Recipe, backend: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model, layers, handle = prepared(recipe, backend)
    x = rows()
    y = layers(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    handle.audit.verify(model)
    assert handle.matmul.name == ("fused" if isinstance(backend, NpuBackend) else "emulated")
    return y.detach(), grad


@pytest.mark.parametrize("storage", ["image", "packed"])
@pytest.mark.parametrize("use_ste", [True, False])
def test_the_fused_forward_and_its_gradient_are_those_of_the_emulation(
    storage: str, use_ste: bool
) -> None:
    recipe = Recipe(base_storage=storage, use_ste=use_ste)
    y, grad = forward_and_backward(recipe, fake_backend())
    wanted_y, wanted_grad = forward_and_backward(recipe, EmulationBackend())
    torch.testing.assert_close(y, wanted_y)
    torch.testing.assert_close(grad, wanted_grad)
    assert bool(grad.any()) is use_ste


@pytest.mark.parametrize("storage", ["image", "packed"])
def test_a_dual_level_model_multiplies_codes_too(storage: str) -> None:
    recipe = Recipe(base_storage=storage, **DUAL)
    y, grad = forward_and_backward(recipe, fake_backend())
    wanted_y, wanted_grad = forward_and_backward(recipe, EmulationBackend())
    torch.testing.assert_close(y, wanted_y, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(grad, wanted_grad, rtol=0.02, atol=5e-3)


def test_siblings_share_one_encoding_and_a_weight_is_prepared_once() -> None:
    api = FakeNpu()
    _, layers, _ = prepared(Recipe(), fake_backend(api))
    x = rows()
    layers(x)  # the audit looks at the first pass
    made = layers.q_proj._prepared
    api.calls.clear()
    layers(x)
    # q, k and v read one encoding, o its own; nothing is decoded.
    assert api.calls == {"npu_dynamic_mx_quant": 2, "npu_quant_matmul": 4}
    assert layers.q_proj._prepared is made
    layers.q_proj.weight_packed.data = layers.q_proj.weight_packed.data.clone()
    layers(x)
    assert layers.q_proj._prepared is not made, "the weight moved"


def test_a_gathered_weight_is_not_kept_alive() -> None:
    """ZeRO-3 frees a parameter after use; a kept view would hold its memory."""
    _, layers, _ = prepared(Recipe(base_storage="packed"), fake_backend())
    layers.o_proj.weight_packed.ds_id = 1
    layers(rows())
    assert layers.o_proj._prepared is None and layers.q_proj._prepared is not None


def test_lora_on_the_quantised_input_reads_the_decoded_codes_once() -> None:
    api = FakeNpu()
    _, layers, _ = prepared(Recipe(lora_input="quantised"), fake_backend(api))
    x = rows()
    values = layers.q_proj.quantized_input(x)
    assert torch.equal(values, fake_quant(x, "ascend950"))
    (grad,) = torch.autograd.grad(values, x, torch.ones_like(values))
    assert torch.equal(grad, torch.ones_like(grad))
    api.calls.clear()
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(layers, name)
        layer(x)
        layer.quantized_input(x)
    assert api.calls["npu_dynamic_mx_quant"] == 1


def test_phases_without_quantisation_compute_in_16_bits() -> None:
    api = FakeNpu()
    _, layers, handle = prepared(Recipe(apply_during="training"), fake_backend(api))
    with handle.phase("rollout"):
        before = dict(api.calls)
        layers(rows())
    assert api.calls == before
    with handle.phase("training"):
        layers(rows())
    assert api.calls["npu_quant_matmul"] == 4


# --- which mode, and why ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"matmul": "emulated"}, "emulated was asked for"),
        ({"injection_point": "weight"}, "leaves an operand of the matmul in 16 bits"),
        ({"injection_point": "input"}, "leaves an operand of the matmul in 16 bits"),
        ({"block_axis": "column"}, "block_axis is column"),
        ({"weight_profile": "ascend950-dual"}, "cannot multiply weights in 'ascend950-dual'"),
    ],
)
def test_what_the_device_cannot_multiply_is_emulated_and_the_reason_is_kept(
    settings: dict[str, Any], reason: str
) -> None:
    model, layers, handle = prepared(Recipe(**settings), fake_backend())
    layers(rows())
    report = handle.audit.report(model)
    assert report["verdict"] == "pass"
    assert report["computed_by"]["matmul"] == "emulated"
    assert reason in report["computed_by"]["matmul_reason"]
    if "matmul" not in settings:
        with pytest.raises(BackendUnavailable, match=r"quant.matmul: fused is not possible"):
            prepared(Recipe(matmul="fused", **settings), fake_backend())


def test_one_layer_that_cannot_be_multiplied_puts_all_into_emulation() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 33), "b": nn.Linear(33, 8)}).bfloat16()
    with pytest.raises(BackendUnavailable, match=r"b: .*an even number of inputs"):
        prepare_model(model, Recipe(matmul="fused"), fake_backend())


def test_a_backend_without_a_matmul_of_codes_says_so() -> None:
    _, _, handle = prepared(Recipe(), EmulationBackend())
    assert "no matmul of 4-bit codes" in handle.matmul.reason
    with pytest.raises(BackendUnavailable, match=r"backend 'emulation' has no matmul"):
        prepared(Recipe(matmul="fused"), EmulationBackend())


def test_the_audit_names_who_computed() -> None:
    model, layers, handle = prepared(Recipe(), fake_backend())
    layers(rows())
    by = handle.audit.report(model)["computed_by"]
    assert (by["name"], by["soc"], by["matmul"]) == ("npu", "a fake", "fused")
    assert by["weights_encoded_by"] == "npu"


def test_weights_without_an_operator_are_encoded_by_the_reference() -> None:
    model, layers, handle = prepared(Recipe(weight_profile="ascend950-mse"), fake_backend())
    layers(rows())
    handle.audit.verify(model)
    by = handle.audit.report(model)["computed_by"]
    assert (by["weights_encoded_by"], by["matmul"]) == ("emulation", "fused")


@pytest.mark.parametrize("profile", ["ocp", "nvfp4-one-level"])
def test_activations_without_an_operator_are_refused(profile: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"do not compute profile '{profile}'"):
        prepared(Recipe(activation_profile=profile), fake_backend())


def test_a_16_bit_recipe_needs_no_profile_of_the_device() -> None:
    prepared(Recipe(injection_point="weight", activation_profile="nvfp4"), fake_backend())


# --- evidence -----------------------------------------------------------------------------------


class WrongScales(FakeNpu):
    """Multiplies the right codes under the scales of the neighbouring rows."""

    def npu_quant_matmul(
        self, x1: torch.Tensor, x2: torch.Tensor, scale: torch.Tensor, **keywords: Any
    ) -> torch.Tensor:
        rolled = scale.transpose(0, 1).roll(1, 0).contiguous() + 1
        return super().npu_quant_matmul(x1, x2, rolled.transpose(0, 1), **keywords)


def test_a_device_that_multiplies_under_other_scales_fails_the_audit() -> None:
    model, layers, handle = prepared(Recipe(), fake_backend(WrongScales()))
    layers(rows())
    with pytest.raises(AuditError, match=r"products equal the reference matmul.*in eval"):
        handle.audit.verify(model)


def test_a_product_that_is_nan_fails_the_audit() -> None:
    class Broken(EmulationBackend):
        def linear(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().linear(*args, **kwargs) * float("nan")

    model, layers, handle = prepared(Recipe(base_storage="packed"), Broken())
    layers(rows())
    with pytest.raises(AuditError, match=r"products equal the reference matmul"):
        handle.audit.verify(model)


# --- priming ------------------------------------------------------------------------------------


def test_a_primed_input_is_read_by_all_and_quantised_by_none() -> None:
    shared: SharedInput[torch.Tensor] = SharedInput(2)
    x, operand = torch.ones(4), torch.full((4,), 7.0)

    def never(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it was primed")

    shared.prime(x, operand)
    assert shared.get(x, never) is operand and shared.get(x, never) is operand
    assert shared.get(x, torch.clone) is not operand, "both readers are done"


def test_a_primed_input_that_changed_or_entered_a_graph_is_quantised_anew() -> None:
    shared: SharedInput[torch.Tensor] = SharedInput(2)
    x, operand = torch.ones(4), torch.full((4,), 7.0)
    shared.prime(x, operand)
    x.add_(1)
    assert shared.get(x, torch.clone) is not operand
    shared.prime(x, operand)
    x.requires_grad_(True)
    assert shared.get(x, torch.clone) is not operand


def test_gradients_of_a_primed_operand_and_of_its_source_add_up() -> None:
    class Producer(torch.autograd.Function):
        """h -> (x, Q(x)) with x = 2 h: what a fused norm is."""

        @staticmethod
        def forward(ctx: Any, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = 2 * h
            return x, fake_quant(x, "ascend950")

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return 2 * (grads[0] + grads[1])

    _, layers, _ = prepared(Recipe(), EmulationBackend())
    found = []
    for primed in (True, False):
        h = rows()
        x, operand = Producer.apply(h) if primed else (2 * h, None)
        if primed:
            layers.q_proj.shared.prime(x, operand)
        y = layers(x) + x  # the residual stream reads the source
        found.append((y.detach(), *torch.autograd.grad(y, h, torch.ones_like(y))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_adapters_train_through_the_fused_base() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    found = []
    for backend in (fake_backend(), EmulationBackend()):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).bfloat16()
        handle = prepare_model(model, Recipe(base_storage="packed"), backend)
        adapted = add_lora(model, LoraSection(r=4), seed=0)
        ids = torch.arange(24).view(2, 12)
        with handle.phase("training"):
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
        grads = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
        handle.audit.verify(adapted)
        found.append((loss.detach(), grads))
    (loss, grads), (wanted, wanted_grads) = found
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-3)
    assert grads.keys() == wanted_grads.keys() and len(grads) > 6
    for name, grad in grads.items():
        scale = wanted_grads[name].norm().clamp_min(1e-6)
        assert (grad - wanted_grads[name]).norm() / scale < 0.05, name
