"""Adapters that start from the quantisation error: the best low-rank map, and measured so."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from npu_qat.config import LoraSection, Recipe, RunConfig
from npu_qat.layers import add_lora, prepare_model
from npu_qat.layers import compensation as module
from npu_qat.layers.compensation import Compensation, compensate, compensation_check
from npu_qat.layers.lora import ADAPTER, QatLoraLinear
from tests.training.tiny import tiny_model

TOKENS = torch.randint(0, 96, (6, 40), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(0, 96, (6, 40), generator=torch.Generator().manual_seed(2))


def outlier_model() -> nn.Module:
    """A tiny decoder whose norms have one channel of 32 times the gain, as real ones have."""
    model = tiny_model(seed=5)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[3] *= 32
    return model


def run(model: nn.Module) -> None:
    model(input_ids=TOKENS, use_cache=False)


def started(rank: int = 8, **recipe: object) -> tuple[nn.Module, nn.Module, list[Compensation]]:
    """(16-bit model, the same quantised with adapters, what they achieved)."""
    reference = outlier_model()
    model = copy.deepcopy(reference)
    prepare_model(model, Recipe.model_validate(recipe))
    adapted = add_lora(model, LoraSection(r=rank, alpha=2 * rank), seed=0)
    return reference, adapted, compensate(adapted, reference, run)


def test_the_model_comes_nearer_to_the_16_bit_one_on_other_texts() -> None:
    reference, adapted, _ = started()
    plain = outlier_model()
    prepare_model(plain, Recipe())
    with torch.no_grad():
        wanted = reference(input_ids=OTHER).logits
        before = (plain(input_ids=OTHER).logits - wanted).square().mean()
        after = (adapted(input_ids=OTHER).logits - wanted).square().mean()
    assert after < 0.8 * before


@pytest.mark.parametrize("rotation", ["none", "hadamard32"])
@pytest.mark.parametrize("point", ["weight", "both"])
def test_what_is_reported_is_what_the_adapter_does(point: str, rotation: str) -> None:
    """Errors before and after, measured again from the layers themselves."""
    reference, adapted, found = started(injection_point=point, rotation=rotation)
    layers = [m for m in adapted.modules() if isinstance(m, QatLoraLinear)]
    assert [c.path for c in found] == [m.get_base_layer().path for m in layers]
    sums = {c.path: [0.0, 0.0, 0.0] for c in found}

    def measure(layer: QatLoraLinear) -> object:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            total = sums[layer.get_base_layer().path]
            total[0] += float((y - layer.get_base_layer()(args[0])).double().square().sum())
            total[1] += float((y - layer(args[0])).double().square().sum())
            total[2] += float(y.double().square().sum())

        return hook

    for layer in layers:
        path = layer.get_base_layer().path
        reference.get_submodule(path).register_forward_hook(measure(layer))
    with torch.no_grad():
        run(reference)
    for c in found:
        before, after, output = sums[c.path]
        assert c.before == pytest.approx(before / output, rel=1e-3)
        assert c.after == pytest.approx(after / output, rel=2e-2)
        assert c.after < c.before


def test_with_isotropic_inputs_it_is_the_truncated_svd_of_the_weights_error() -> None:
    """C = I: LoftQ's case. A ridge of one percent shrinks what it adds by as much."""
    torch.manual_seed(0)
    linear = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(32, 24)})])}
    )
    holder = Holder(linear)
    reference = copy.deepcopy(holder)
    prepare_model(holder, Recipe(injection_point="weight"))
    adapted = add_lora(holder, LoraSection(r=4, alpha=4), seed=0)
    x = 32**0.5 * torch.linalg.qr(torch.randn(64, 32)).Q  # x^T x is a multiple of the identity
    compensate(adapted, reference, lambda m: m(x))
    [layer] = [m for m in adapted.modules() if isinstance(m, QatLoraLinear)]
    error = reference.body["layers"][0]["q_proj"].weight - layer.get_base_layer().weight
    u, s, vt = torch.linalg.svd(error.detach())
    wanted = (u[:, :4] * s[:4]) @ vt[:4] / 1.01
    product = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
    torch.testing.assert_close(product, wanted, rtol=1e-3, atol=1e-5)


class Holder(nn.Module):
    """A module with one linear in a decoder layer's place."""

    def __init__(self, body: nn.ModuleDict) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body["layers"][0]["q_proj"](x)


def test_a_channel_lost_beside_an_outlier_comes_back() -> None:
    """31 channels share a block with one of 1,000 times their size: all of them round to zero, and
    31 ranks give back what they carried."""
    torch.manual_seed(0)
    body = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(32, 64)})])})
    holder = Holder(body)
    reference = copy.deepcopy(holder)
    prepare_model(holder, Recipe())
    adapted = add_lora(holder, LoraSection(r=32, alpha=32), seed=0)
    x = torch.randn(2000, 32)
    x[:, 0] = 1000.0
    [found] = compensate(adapted, reference, lambda m: m(x))
    fresh = torch.randn(50, 32)
    fresh[:, 0] = 1000.0
    other = fresh.clone()
    other[:, 5] += 1.0
    base = next(m for m in adapted.modules() if isinstance(m, QatLoraLinear)).get_base_layer()
    with torch.no_grad():
        assert torch.equal(base(other), base(fresh))  # the quantised linear does not see it
        seen = (adapted(other) - adapted(fresh)).mean(0)
        wanted = (reference(other) - reference(fresh)).mean(0)
    assert (seen - wanted).norm() < 0.1 * wanted.norm()
    assert found.after < 0.01 * found.before


def test_the_budget_changes_only_the_number_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, once, _ = started()
    monkeypatch.setattr(module, "BUDGET_BYTES", 1)
    _, often, _ = started()
    for a, b in zip(once.parameters(), often.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_rank_above_the_linear_s_is_filled_with_zeros() -> None:
    _, adapted, found = started(rank=200)
    assert all(torch.isfinite(p).all() for p in adapted.parameters())
    assert all(c.after < c.before for c in found)


def test_a_model_without_quantised_linears_is_refused() -> None:
    reference = outlier_model()
    adapted = add_lora(copy.deepcopy(reference), LoraSection(r=4), seed=0)
    with pytest.raises(ValueError, match="no adapter on a quantised linear"):
        compensate(adapted, reference, run)


def test_data_that_never_reach_a_linear_are_refused() -> None:
    reference = outlier_model()
    model = copy.deepcopy(reference)
    prepare_model(model, Recipe())
    adapted = add_lora(model, LoraSection(r=4), seed=0)
    with pytest.raises(ValueError, match="nothing but zeros"):
        compensate(adapted, reference, lambda m: None)


def test_the_check_fails_if_an_adapter_makes_it_worse() -> None:
    good, bad = Compensation("a", 0.2, 0.1), Compensation("b", 0.2, 0.2)
    assert compensation_check([good]).ok
    failed = compensation_check([good, bad])
    assert not failed.ok and "less in 1" in failed.measured


def test_a_start_from_an_error_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValidationError, match="needs an error"):
        RunConfig.model_validate(
            {"lora": {"init": "quantisation_error"}, "quant": {"injection_point": "none"}}
        )
