"""One quantised layer: storages, shared inputs, tensor scales, and weights that nobody changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from npu_qat.backends import EmulationBackend
from npu_qat.config import Recipe
from npu_qat.layers import QuantizedModel, QuantLinear, prepare_model
from npu_qat.layers.quant_linear import SharedInput
from npu_qat.numerics import dequantize, quantize
from tests.layers.oracle import mxfp4, nvfp4

NVFP4 = {"weight_profile": "nvfp4", "activation_profile": "nvfp4"}


class Counting(EmulationBackend):
    """Counts the activations that it quantises."""

    def __init__(self) -> None:
        self.calls = 0

    def fake_quant(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        self.calls += 1
        return super().fake_quant(x, *args, **kwargs)


class Block(nn.Module):
    """q, k, v and o of a decoder layer; ``mix`` is what lies between."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=name != "o_proj"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x) + self.k_proj(x)) * self.v_proj(x))


def block(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"layers": nn.ModuleList([Block()])}).to(dtype)


def rows(dtype: torch.dtype = torch.float32, seed: int = 1, count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 64, generator=generator).to(dtype)


def quantized_layer(
    linear: nn.Linear, recipe: Recipe, backend: EmulationBackend | None = None
) -> tuple[QuantLinear, QuantizedModel]:
    model = nn.ModuleDict({"proj": linear})
    handle = prepare_model(model, recipe, backend)
    return model["proj"], handle


# --- storage --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize(
    ("profile", "point"),
    [
        ("ascend950", "weight"),
        ("ascend950", "both"),
        ("ascend950", "weight_output"),
        ("nvfp4", "weight"),
        ("nvfp4", "both"),
    ],
)
def test_image_and_packed_storage_give_the_same_bits(
    dtype: torch.dtype, profile: str, axis: str, point: str
) -> None:
    found = []
    for storage in ("image", "packed"):
        model = block(dtype)
        recipe = Recipe(
            injection_point=point,
            base_storage=storage,
            block_axis=axis,
            weight_profile=profile,
            activation_profile=profile,
        )
        handle = prepare_model(model, recipe)
        layers = model["layers"][0]
        if handle.needs_calibration:
            handle.calibrate(lambda _, layers=layers: layers(rows(dtype)))
        x = rows(dtype).requires_grad_(True)
        y = layers(x)
        (grad,) = torch.autograd.grad(y, x, rows(dtype, seed=2))
        found.append((y, grad, layers.q_proj.weight, layers.o_proj.weight))
        handle.audit.verify(model)
    for image, packed in zip(*found, strict=True):
        assert image.dtype == packed.dtype and torch.equal(image, packed)


def test_the_weight_is_the_quantised_one() -> None:
    linear = nn.Linear(72, 40)
    original = linear.weight.detach().clone()
    layer, _ = quantized_layer(linear, Recipe())
    assert torch.equal(layer.weight, mxfp4(original))
    assert not torch.equal(layer.weight, original)
    assert torch.equal(linear.weight, original), "the given layer was changed"


def test_column_blocks_run_along_the_outputs() -> None:
    linear = nn.Linear(64, 96)
    nn.init.normal_(linear.weight)
    original = linear.weight.detach().clone()
    layer, _ = quantized_layer(linear, Recipe(block_axis="column"))
    assert torch.equal(layer.weight, mxfp4(original.T.contiguous()).T)
    assert not torch.equal(layer.weight, mxfp4(original))


def test_packed_storage_takes_the_bytes_that_it_promises() -> None:
    layer, _ = quantized_layer(nn.Linear(1024, 64, bias=False), Recipe(base_storage="packed"))
    assert layer.storage_bytes == 64 * 1024 * 4.25 / 8
    assert layer.weight_packed.dtype == torch.uint8


@pytest.mark.parametrize("storage", ["image", "packed"])
def test_values_that_the_dtype_cannot_hold_are_refused(storage: str) -> None:
    """65504 rounds up to 4 * 2^14, which is no fp16 number: the matmul would see an infinity."""
    linear = nn.Linear(64, 32).half()
    with torch.no_grad():
        linear.weight[3, 5] = 65504.0
    with pytest.raises(ValueError, match=r"proj: .* not exact in torch.float16"):
        quantized_layer(linear, Recipe(weight_profile="ocp-ceil", base_storage=storage))


@pytest.mark.parametrize("storage", ["image", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_dual_level_layer_multiplies_in_fp32_because_its_scales_are_fp32(
    storage: str, dtype: torch.dtype
) -> None:
    dual = {"weight_profile": "ascend950-dual", "activation_profile": "ascend950-dual"}
    linear = nn.Linear(640, 32).to(dtype)
    x = (3 * torch.randn(5, 640)).to(dtype).requires_grad_(True)
    model = nn.ModuleDict({"proj": linear})
    handle = prepare_model(model, Recipe(base_storage=storage, **dual))
    y = model["proj"](x)
    handle.audit.verify(model)

    def values(t: torch.Tensor) -> torch.Tensor:
        return dequantize(quantize(t, "ascend950-dual"), torch.float32)

    weight = values(linear.weight)
    wanted = values(x) @ weight.T + linear.bias.float()
    assert y.dtype == dtype
    torch.testing.assert_close(y, wanted.to(dtype))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(grad, (torch.ones(5, 32) @ weight).to(dtype))
    assert model["proj"].weight.dtype == dtype


# --- nothing is mutated ---------------------------------------------------------------------


def bits(model: nn.Module) -> dict[str, bytes]:
    tensors = model.state_dict().items()
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in tensors}


@pytest.mark.parametrize("apply_during", ["both", "training", "rollout"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_no_pass_changes_a_stored_bit(apply_during: str, reentrant: bool) -> None:
    model = block(torch.bfloat16)
    handle = prepare_model(model, Recipe(apply_during=apply_during))
    layers, before = model["layers"][0], bits(model)
    assert len(before) > 4
    for phase in ("rollout", "training", "evaluation", "training"):
        with handle.phase(phase):
            with torch.no_grad():
                layers(rows(torch.bfloat16))
            x = rows(torch.bfloat16).requires_grad_(True)
            layers(x).sum().backward()
            checkpoint(layers, x, use_reentrant=reentrant).sum().backward()
        assert bits(model) == before
    handle.audit.verify(model)


def test_frozen_tensors_take_no_gradient() -> None:
    model = block()
    prepare_model(model, Recipe())
    assert not any(p.requires_grad for p in model.parameters())


# --- one quantisation for siblings ----------------------------------------------------------


def test_siblings_quantise_their_input_once() -> None:
    backend = Counting()
    model = block()
    prepare_model(model, Recipe(), backend)
    model["layers"][0](rows())
    assert backend.calls == 2  # q, k and v together; o


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_quantises_once_more(reentrant: bool) -> None:
    backend = Counting()
    model = block()
    prepare_model(model, Recipe(base_storage="packed"), backend)
    x = rows().requires_grad_(True)
    y = checkpoint(model["layers"][0], x, use_reentrant=reentrant)
    y.sum().backward()
    # The kind that is not reentrant stops as soon as it has what the backward pass saved, and the
    # frozen o_proj saves nothing (in image storage, nothing but its weight).
    assert backend.calls == (4 if reentrant else 3)


def test_a_tensor_changed_in_place_is_quantised_again() -> None:
    model = block()
    prepare_model(model, Recipe())
    layers, x = model["layers"][0], rows()
    layers.q_proj(x)
    x.mul_(3.0).add_(0.1)
    fresh = x.clone()
    assert torch.equal(layers.k_proj(x), layers.k_proj(fresh))
    assert torch.equal(layers.v_proj(x), layers.v_proj(fresh))


def test_a_view_changed_through_its_base_is_quantised_again() -> None:
    model = block()
    prepare_model(model, Recipe())
    layers, base = model["layers"][0], rows()
    x = base[:1]
    layers.q_proj(x)
    base.mul_(3.0)
    assert torch.equal(layers.k_proj(x), layers.k_proj(x.clone()))


def test_a_result_made_without_gradient_is_not_reused_with_one() -> None:
    model = block()
    prepare_model(model, Recipe())
    layers, x = model["layers"][0], rows().requires_grad_(True)
    with torch.no_grad():
        layers.q_proj(x)
    (grad,) = torch.autograd.grad(layers.k_proj(x).sum(), x)
    assert grad.abs().sum() > 0
    layers.v_proj(x)
    with torch.no_grad():
        assert not layers.q_proj(x).requires_grad


def test_requiring_a_gradient_later_is_noticed() -> None:
    model = block()
    prepare_model(model, Recipe())
    layers, x = model["layers"][0], rows()
    layers.q_proj(x)
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(layers.k_proj(x).sum(), x)
    assert grad.abs().sum() > 0


def test_inference_tensors_changed_in_place_are_quantised_again() -> None:
    """They carry no version counter, so a change cannot be seen."""
    model = block()
    prepare_model(model, Recipe())
    layers = model["layers"][0]
    with torch.inference_mode():
        x = rows()
        layers.q_proj(x)
        x.mul_(5.0).add_(0.3)
        assert torch.equal(layers.k_proj(x), layers.k_proj(x.clone()))


def test_normal_tensors_are_shared_in_inference_mode_and_never_leak_into_training() -> None:
    backend = Counting()
    model = block()
    prepare_model(model, Recipe(), backend)
    layers, x = model["layers"][0], rows().requires_grad_(True)
    with torch.inference_mode():
        layers.q_proj(x)
        layers.k_proj(x)
    assert backend.calls == 1
    (grad,) = torch.autograd.grad(layers.v_proj(x).sum(), x)
    assert grad.abs().sum() > 0


def test_another_tensor_with_equal_values_is_not_taken_for_the_first() -> None:
    shared, made = SharedInput(3), []

    def quantize(x: torch.Tensor) -> torch.Tensor:
        made.append(x)
        return x * 2

    x = torch.ones(4)
    shared.get(x, quantize)
    shared.get(x.clone(), quantize)
    shared.get(x, quantize)
    assert len(made) == 3


def test_the_result_is_dropped_with_its_last_reader() -> None:
    shared, x = SharedInput(2), torch.ones(4)
    shared.get(x, torch.clone)
    assert shared._result is not None
    shared.get(x, torch.clone)
    assert shared._result is None
    shared.get(x, torch.clone)  # a third reader starts over
    assert shared._result is not None


# --- NVFP4: tensor scales -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nvfp4_multiplies_by_both_tensor_scales(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).to(dtype)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    layer, handle = quantized_layer(linear, Recipe(**NVFP4))
    x = rows(dtype)
    handle.calibrate(lambda model: model["proj"](x))
    w = nvfp4(weight, weight.abs().max().item())
    a = nvfp4(x, x.abs().max().item())
    wanted = a @ w.T + bias.double()
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    assert (layer(x).double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (layer.weight.double() - w).abs().max() <= tolerance * w.abs().max()
    handle.audit.verify()


def test_nvfp4_has_the_straight_through_gradient() -> None:
    layer, handle = quantized_layer(nn.Linear(64, 48), Recipe(**NVFP4))
    x = rows().requires_grad_(True)
    handle.calibrate(lambda model: model["proj"](x))
    g = torch.randn(2, 6, 48)
    (grad,) = torch.autograd.grad(layer(x), x, g)
    torch.testing.assert_close(grad, g @ layer.weight, rtol=1e-5, atol=1e-6)


def test_nvfp4_siblings_share_their_tensor_scales() -> None:
    """Serving engines fuse q, k, v into one matmul, which has one scale a tensor."""
    model = block()
    layers = model["layers"][0]
    with torch.no_grad():
        layers.k_proj.weight.mul_(7.0)
    largest = layers.k_proj.weight.detach().abs().max()
    handle = prepare_model(model, Recipe(**NVFP4))
    handle.calibrate(lambda _: layers(rows()))
    for name in ("weight_tensor_scale", "input_tensor_scale"):
        values = {float(getattr(layers.get_submodule(f"{n}_proj"), name)) for n in "qkv"}
        assert len(values) == 1
        assert float(getattr(layers.o_proj, name)) not in values
    assert float(layers.q_proj.weight_tensor_scale) == pytest.approx(float(largest) / 2688)
    assert float(layers.q_proj.input_tensor_scale) == pytest.approx(
        float(rows().abs().max()) / 2688
    )


@pytest.mark.parametrize("profile", ["ascend950", "nvfp4", "nvfp4-one-level", "ascend950-dual"])
def test_a_token_does_not_depend_on_its_neighbours(profile: str) -> None:
    layer, handle = quantized_layer(
        nn.Linear(64, 48), Recipe(weight_profile="ascend950", activation_profile=profile)
    )
    x = rows()
    if handle.needs_calibration:
        handle.calibrate(lambda model: model["proj"](x))
    alone = layer.quantize_input(x[:1, :1])
    louder = x.clone()
    louder[1] *= 100.0
    assert torch.equal(layer.quantize_input(louder)[:1, :1], alone)


def test_nvfp4_without_calibration_is_an_error_that_says_what_to_do() -> None:
    layer, handle = quantized_layer(nn.Linear(64, 48), Recipe(**NVFP4))
    assert handle.needs_calibration
    with pytest.raises(ValueError, match=r"proj: .*nvfp4.*not calibrated; run .*calibrate"):
        layer(rows())
    handle.calibrate(lambda model: model["proj"](rows()))
    assert not handle.needs_calibration
    layer(rows())


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_calibration_that_saw_nothing_usable_is_an_error(bad: float) -> None:
    _, handle = quantized_layer(nn.Linear(64, 48), Recipe(**NVFP4))
    with pytest.raises(ValueError, match="calibration"):
        handle.calibrate(lambda model: model["proj"](torch.full((1, 64), bad)))
    with pytest.raises(ValueError, match="calibration never reached proj"):
        handle.calibrate(lambda model: None)


def test_calibration_is_no_call_in_the_eyes_of_the_audit() -> None:
    layer, handle = quantized_layer(nn.Linear(64, 48), Recipe(**NVFP4))
    handle.calibrate(lambda model: model["proj"](rows()))
    layer(rows())
    handle.audit.verify()
    assert layer.calls.total == layer.calls.quantized == {"evaluation": 1}


def test_nvfp4_in_fp16_is_refused() -> None:
    """Its operands go up to 6 * 448 each, so a sum of a few products leaves fp16."""
    with pytest.raises(ValueError, match=r"proj: NVFP4 needs model\.dtype bf16 or fp32"):
        quantized_layer(nn.Linear(256, 32).half(), Recipe(**NVFP4))


# --- around the layer -----------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["image", "packed"])
@pytest.mark.parametrize("profile", ["ascend950", "nvfp4"])
def test_the_state_dict_makes_a_round_trip(storage: str, profile: str) -> None:
    recipe = Recipe(weight_profile=profile, activation_profile=profile, base_storage=storage)
    model, other = block(torch.bfloat16, seed=0), block(torch.bfloat16, seed=9)
    handle, other_handle = prepare_model(model, recipe), prepare_model(other, recipe)
    x = rows(torch.bfloat16)
    for m, h in ((model, handle), (other, other_handle)):
        if h.needs_calibration:
            h.calibrate(lambda _, m=m: m["layers"][0](x * 2))
    wanted = model["layers"][0](x)
    assert not torch.equal(other["layers"][0](x), wanted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other["layers"][0](x), wanted)


def test_a_layer_is_an_nn_linear_that_describes_itself() -> None:
    layer, _ = quantized_layer(nn.Linear(64, 48), Recipe(base_storage="packed"))
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 48)
    text = repr(layer)
    assert "in_features=64" in text and "ascend950" in text and "packed" in text


def test_autocast_in_another_dtype_than_the_layers_is_refused() -> None:
    model = block()
    prepare_model(model, Recipe())
    half = block(torch.bfloat16)
    prepare_model(half, Recipe())
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"computes in torch.bfloat16, .* in torch.float32"):
            model["layers"][0](rows())
        assert half["layers"][0](rows(torch.bfloat16)).dtype == torch.bfloat16


def test_what_carries_a_gradient_serves_a_caller_without_one() -> None:
    """A producer primes with a graph; the step that adds an adapter computes without one."""
    shared: SharedInput[torch.Tensor] = SharedInput(2)
    x = torch.ones(2, requires_grad=True)
    shared.prime(x, 2 * x)
    with torch.no_grad():
        assert shared.get(x, torch.zeros_like).tolist() == [2.0, 2.0]
