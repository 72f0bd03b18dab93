"""Whole models: the result equals one whose linears are spelt out, in every mode and phase."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from npu_qat.backends import EmulationBackend
from npu_qat.config import LoraSection, Recipe
from npu_qat.layers import QuantLinear, add_lora, prepare_model
from tests.layers.oracle import reference_model
from tests.training.tiny import tiny_model

FAMILIES = ("qwen2", "qwen3", "llama")
IDS = torch.arange(3, 27).view(2, 12)


class Counting(EmulationBackend):
    """Counts the activations that it quantises."""

    def __init__(self) -> None:
        self.calls = 0

    def fake_quant(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        self.calls += 1
        return super().fake_quant(x, *args, **kwargs)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("point", ["weight", "input", "both", "output", "weight_output"])
def test_a_model_equals_the_one_that_is_spelt_out(family: str, point: str) -> None:
    plain = logits(tiny_model(family))
    wanted = logits(reference_model(tiny_model(family), point))
    for storage in ("image", "packed"):
        model = tiny_model(family)
        handle = prepare_model(model, Recipe(injection_point=point, base_storage=storage))
        measured = logits(model)
        # fp32 sums in the same order; only a tie could fall to another side.
        torch.testing.assert_close(measured, wanted, rtol=1e-4, atol=1e-4)
        handle.audit.verify(model)
    assert (wanted - plain).abs().max() > 0.05, "quantisation is too weak to be tested here"


def test_bf16_and_column_blocks_equal_the_reference_too() -> None:
    wanted = logits(reference_model(tiny_model(dtype=torch.bfloat16), "both", axis=0))
    model = tiny_model(dtype=torch.bfloat16)
    handle = prepare_model(model, Recipe(block_axis="column"))
    assert torch.equal(logits(model), wanted)
    handle.audit.verify(model)


def test_injection_point_none_changes_nothing() -> None:
    model = tiny_model()
    handle = prepare_model(model, Recipe(injection_point="none"))
    assert handle.layers == {}
    assert torch.equal(logits(model), logits(tiny_model()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_layer_quantises_four_tensors_not_seven(family: str) -> None:
    backend = Counting()
    model = tiny_model(family)
    prepare_model(model, Recipe(), backend)
    logits(model)
    assert backend.calls == 4 * 2


@pytest.mark.parametrize("lora_input", ["full", "quantised"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("storage", ["image", "packed"])
def test_gradient_checkpointing_changes_no_gradient(
    storage: str, reentrant: bool, lora_input: str
) -> None:
    found, calls = [], []
    for checkpointing in (False, True):
        backend = Counting()
        model = tiny_model()
        handle = prepare_model(model, Recipe(base_storage=storage, lora_input=lora_input), backend)
        adapted = add_lora(model, LoraSection(r=4, alpha=8), seed=0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, 0.0, 0.1, torch.Generator().manual_seed(len(name)))
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
            adapted.enable_input_require_grads()
        adapted.train()
        with handle.phase("training"):
            out = adapted(input_ids=IDS, use_cache=False).logits
            (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
        calls.append(backend.calls)
        handle.audit.verify(adapted)
    assert calls == [8, 16]
    assert len(found[0]) == 28
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, found[1][name]), name


# --- phases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("during", "active"),
    [
        ("both", {"training", "rollout", "evaluation"}),
        ("training", {"training", "evaluation"}),
        ("rollout", {"rollout", "evaluation"}),
    ],
)
@pytest.mark.parametrize("storage", ["image", "packed"])
def test_quantisers_act_in_the_configured_phases(
    storage: str, during: str, active: set[str]
) -> None:
    plain, reference = logits(tiny_model()), logits(reference_model(tiny_model(), "both"))
    model = tiny_model()
    handle = prepare_model(model, Recipe(apply_during=during, base_storage=storage))
    for phase in ("training", "rollout", "evaluation", "training"):
        with handle.phase(phase):
            wanted = reference if phase in active else plain
            torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    handle.audit.verify(model)


def test_the_phase_returns_to_what_it_was_also_after_an_error() -> None:
    model = tiny_model()
    handle = prepare_model(model, Recipe())
    layer = next(iter(handle.layers.values()))
    with handle.phase("training"):
        with pytest.raises(RuntimeError, match="stop"), handle.phase("rollout"):
            raise RuntimeError("stop")
        logits(model)
    logits(model)
    assert layer.calls.total == {"training": 1, "evaluation": 1}


def test_an_unknown_phase_is_an_error() -> None:
    handle = prepare_model(tiny_model(), Recipe())
    message = r"unknown phase 'train'; choose training, rollout"
    with pytest.raises(ValueError, match=message), handle.phase("train"):
        pass


# --- refusals -------------------------------------------------------------------------------


def test_a_model_is_prepared_once() -> None:
    model = tiny_model()
    prepare_model(model, Recipe())
    with pytest.raises(ValueError, match="prepared already"):
        prepare_model(model, Recipe())


def test_adapters_come_after_the_quantisation() -> None:
    """Otherwise the adapters' own linears would be quantised and frozen."""
    adapted = add_lora(tiny_model(), LoraSection(r=4), seed=0)
    with pytest.raises(ValueError, match="carries adapters; prepare it first"):
        prepare_model(adapted, Recipe())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused_by_name(bad: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or Inf"):
        prepare_model(model, Recipe())


def test_a_refused_model_is_not_half_prepared() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        prepare_model(model, Recipe())
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


# --- state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["image", "packed"])
def test_the_state_dict_of_a_model_makes_a_round_trip(storage: str) -> None:
    recipe = Recipe(base_storage=storage)
    model, other = tiny_model(seed=0), tiny_model(seed=5)
    prepare_model(model, recipe)
    prepare_model(other, recipe)
    assert not torch.equal(logits(model), logits(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_a_changed_dtype_of_the_model_keeps_the_tensor_scales() -> None:
    """``model.to(bf16)`` must not round an fp32 scale that every output is multiplied by."""
    model = tiny_model()
    handle = prepare_model(model, Recipe(weight_profile="nvfp4", activation_profile="nvfp4"))
    handle.calibrate(lambda m: logits(m))
    layer = handle.layers["model.layers.0.mlp.up_proj"]
    before = float(layer.weight_tensor_scale), float(layer.input_tensor_scale)
    model.to(torch.bfloat16)
    assert (float(layer.weight_tensor_scale), float(layer.input_tensor_scale)) == before
