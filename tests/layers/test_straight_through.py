"""The gradient of a quantised linear with LoRA equals the straight-through formula."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import nn

from npu_qat.config import LoraSection, Recipe
from npu_qat.layers import add_lora, prepare_model
from npu_qat.layers.straight_through import FrozenLinear, quantize_activation
from tests.layers.oracle import mxfp4

POINTS = ("none", "weight", "input", "both", "output", "weight_output")
K, N, R = 72, 40, 4  # neither is a multiple of the block


class Toy(nn.Module):
    """One linear at a path that looks like a decoder layer's."""

    def __init__(self, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(K, N, bias=bias)})])
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0]["proj"](x)


class Case(NamedTuple):
    """Operands and results of one forward and backward pass."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    y: torch.Tensor
    grad_y: torch.Tensor
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(dtype: torch.dtype) -> torch.Tensor:
    """[2, 5, K] whose blocks saturate at the top and vanish at the bottom."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 5, K, generator=generator)
    x[..., 3] = 7.9  # beyond 6 under the block's scale: saturates
    x[..., 4] = -7.5
    x[..., 5] = 1e-4  # rounds to zero
    x[0, 0] = 0.0  # a block without magnitude
    return x.to(dtype).requires_grad_(True)


def run(recipe: Recipe, *, bias: bool, dtype: torch.dtype) -> Case:
    """One pass through a prepared linear with LoRA whose B is not zero."""
    torch.manual_seed(0)
    model = Toy(bias, dtype)
    linear = model.layers[0]["proj"]
    weight = linear.weight.detach().clone()
    bias_values = None if linear.bias is None else linear.bias.detach().clone()
    if recipe.injection_point != "none":
        prepare_model(model, recipe)
    adapted = add_lora(model, LoraSection(r=R, alpha=2 * R), seed=1)
    layer = adapted.base_model.model.layers[0]["proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(torch.randn(a.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
        b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    x = inputs(dtype)
    y = adapted(x)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    grads = torch.autograd.grad(y, (x, a, b), grad_y)
    return Case(x.detach(), weight, bias_values, a.detach(), b.detach(), y, grad_y, grads)


def expected(
    case: Case, recipe: Recipe
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Result and gradients by the formula, in fp64 on the 16-bit operands.

    With g = dL/dy and LoRA's input z: dx = ste g W_q + s (g B) A, dA = s (g B)^T z,
    dB = s g^T (z A^T), where ste is 0 if a zero-gradient quantiser lies on the path.
    """
    scale = 2.0
    x, g = case.x.flatten(0, 1), case.grad_y.flatten(0, 1).double()
    w = mxfp4(case.weight) if recipe.quantizes_weight else case.weight
    operand = mxfp4(x) if recipe.quantizes_input else x
    z = (operand if recipe.lora_input == "quantised" else x).double()
    # Compute dtype: the 16-bit image of the fp32 master weights.
    a, b = case.a.to(x.dtype).double(), case.b.to(x.dtype).double()
    y = operand.double() @ w.double().T
    if case.bias is not None:
        y = y + case.bias.double()
    if recipe.quantizes_output:
        y = mxfp4(y.to(x.dtype)).double()
    y = y + scale * z @ a.T @ b.T
    blocked = not recipe.use_ste
    base_flows = not (blocked and (recipe.quantizes_input or recipe.quantizes_output))
    lora_flows = not (blocked and recipe.lora_input == "quantised")
    grad_x = torch.zeros_like(g @ w.double())
    if base_flows:
        grad_x = grad_x + g @ w.double()
    if lora_flows:
        grad_x = grad_x + scale * g @ b @ a
    return y.view(case.y.shape), (
        grad_x.view(case.x.shape),
        scale * (g @ b).T @ z,
        scale * g.T @ (z @ a.T),
    )


def assert_close(measured: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Close relative to the tensor's size; zero where zero is wanted."""
    tolerance = 2e-6 if dtype == torch.float32 else 1.5e-2
    error = (measured.double() - wanted).abs().max()
    size = wanted.abs().max()
    assert error <= tolerance * size, f"{error:.3g} of {size:.3g}"


CASES = [
    (point, ste, lora)
    for point, ste, lora in itertools.product(POINTS, (True, False), ("full", "quantised"))
    if lora == "full" or point in ("input", "both")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("storage", ["image", "packed"])
@pytest.mark.parametrize(("point", "use_ste", "lora_input"), CASES)
def test_result_and_gradients_follow_the_formula(
    point: str, use_ste: bool, lora_input: str, storage: str, dtype: torch.dtype
) -> None:
    recipe = Recipe(
        injection_point=point, use_ste=use_ste, lora_input=lora_input, base_storage=storage
    )
    for bias in (True, False):
        case = run(recipe, bias=bias, dtype=dtype)
        y, grads = expected(case, recipe)
        if not (recipe.quantizes_output and dtype != torch.float32):
            # A 16-bit sum may round to a neighbour of the oracle's, which the output quantiser
            # then magnifies; the gradients do not depend on it.
            assert_close(case.y, y, dtype)
        for measured, wanted in zip(case.grads, grads, strict=True):
            assert_close(measured, wanted, dtype)


def test_saturated_and_vanished_elements_have_the_same_gradient_as_others() -> None:
    """Clipping their gradient, as some estimators do, would cut the elements that matter most."""
    x = torch.tensor([[7.9, 6.0, 1.0, 1e-6, 0.0, -7.9] + [0.5] * 26], requires_grad=True)
    y = quantize_activation(x, mxfp4, use_ste=True)
    assert y[0, 0] == 6.0 and y[0, 3] == 0.0
    (grad,) = torch.autograd.grad(y, x, torch.arange(32.0)[None])
    assert torch.equal(grad, torch.arange(32.0)[None])


def test_without_the_estimator_the_graph_stays_connected_and_the_gradient_is_zero() -> None:
    x = torch.randn(3, 32, requires_grad=True)
    y = quantize_activation(x, mxfp4, use_ste=False)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.zeros_like(x))


def test_the_slope_scales_the_gradient_in_its_own_dtype() -> None:
    x = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    y = quantize_activation(x, torch.clone, use_ste=True, slope=torch.tensor(0.25))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, torch.full_like(x, 0.25))


def test_a_frozen_linear_keeps_no_weight_for_the_backward_pass() -> None:
    weight, unpacked = torch.randn(8, 32), []

    def unpack() -> torch.Tensor:
        unpacked.append(1)
        return weight.clone()

    x = torch.randn(4, 32, requires_grad=True)
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = FrozenLinear.apply(x, lambda t: t @ unpack().T, unpack)
    assert held == [] and len(unpacked) == 1
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert len(unpacked) == 2
    assert torch.allclose(grad, torch.ones(4, 8) @ weight)


def test_a_frozen_linear_asks_for_no_weight_where_no_gradient_is_wanted() -> None:
    def never() -> torch.Tensor:
        raise AssertionError("the backward pass has not come")

    y = FrozenLinear.apply(torch.ones(4, 32), lambda t: t.sum(-1, keepdim=True), never)
    assert not y.requires_grad
    assert torch.equal(y, torch.full((4, 1), 32.0))


def test_the_gradient_of_an_opaque_product_goes_through_the_weight_in_the_inputs_dtype() -> None:
    """A product on codes is no torch graph, and its weight may be wider than its result."""
    weight = torch.randn(8, 32)
    x = torch.randn(4, 32).bfloat16().requires_grad_(True)
    y = FrozenLinear.apply(x, lambda t: torch.ones(4, 8, dtype=torch.bfloat16), lambda: weight)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, (torch.ones(4, 8) @ weight).bfloat16())


@pytest.mark.parametrize("use_ste", [True, False])
def test_a_quantiser_may_return_a_wider_dtype(use_ste: bool) -> None:
    x = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    y = quantize_activation(x, torch.Tensor.float, use_ste=use_ste)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == torch.float32
    assert torch.equal(grad, torch.full_like(x, float(use_ste)))
