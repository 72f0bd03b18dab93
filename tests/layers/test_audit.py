"""Every check of the audit can fail, and says which layer made it fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from npu_qat.config import LoraSection, Recipe
from npu_qat.layers import AuditError, QuantizedModel, add_lora, prepare_model
from npu_qat.layers.audit import Check
from npu_qat.layers.quant_linear import QuantState
from tests.layers.oracle import mxfp4
from tests.training.tiny import tiny_model

IDS = torch.arange(3, 19)[None]
UP = "model.layers.1.mlp.up_proj"
PHASES = ("rollout", "training", "evaluation")


def prepared(recipe: Recipe | None = None, seed: int = 0) -> tuple[nn.Module, QuantizedModel]:
    model = tiny_model(seed=seed)
    return model, prepare_model(model, recipe or Recipe())


def run(model: nn.Module, handle: QuantizedModel, *phases: str) -> None:
    for phase in phases or PHASES:
        with handle.phase(phase), torch.no_grad():
            model(input_ids=IDS, use_cache=False)


def refuses(handle: QuantizedModel, model: nn.Module, message: str) -> None:
    """``verify`` raises with ``message`` and the report says fail."""
    with pytest.raises(AuditError, match=message):
        handle.audit.verify(model)
    report = handle.audit.report(model)
    assert report["verdict"] == "fail"
    assert sum(not check["ok"] for check in report["checks"]) >= 1


def test_an_honest_run_passes() -> None:
    model, handle = prepared()
    run(model, handle)
    handle.audit.verify(model)
    assert handle.audit.report(model)["verdict"] == "pass"


# --- weights --------------------------------------------------------------------------------


def nudge(tensor: torch.Tensor) -> None:
    """Change one element by the smallest step, behind autograd's back."""
    flat = tensor.data.flatten()
    flat[-1] = flat[-1] ^ 1 if flat.dtype == torch.uint8 else flat[-1] + 1e-3
    tensor.data = flat.view(tensor.shape)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (Recipe(), "weight_image"),
        (Recipe(base_storage="packed"), "weight_packed"),
        (Recipe(base_storage="packed"), "weight_scale"),
        (Recipe(apply_during="training"), "weight_full"),
        (Recipe(injection_point="weight", weight_profile="nvfp4"), "weight_tensor_scale"),
        (Recipe(injection_point="input"), "weight_image"),
    ],
)
def test_a_changed_weight_is_found(recipe: Recipe, name: str) -> None:
    model, handle = prepared(recipe)
    run(model, handle)
    handle.audit.verify(model)
    nudge(getattr(handle.layers[UP], name))
    refuses(handle, model, rf"frozen weights never change.*1 changed, first {UP}")


def test_a_changed_bias_is_found() -> None:
    model, handle = prepared()
    nudge(handle.layers["model.layers.0.self_attn.q_proj"].bias)
    refuses(handle, model, r"frozen weights never change.*layers.0.self_attn.q_proj")


def test_swapped_elements_are_found() -> None:
    """A plain sum would not notice."""
    model, handle = prepared()
    image = handle.layers[UP].weight_image.data
    image[0, :2] = image[0, :2].flip(0) if image[0, 0] != image[0, 1] else image[0, :2] + 1
    refuses(handle, model, "frozen weights never change")


def test_a_weight_that_is_not_the_reference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that rounds otherwise than the arithmetic says."""
    from npu_qat.backends import EmulationBackend
    from npu_qat.numerics import quantize

    def truncating(self: EmulationBackend, x: torch.Tensor, profile: str, axis: int, **kw: object):
        return quantize(x, "ascend950-floor", axis, **kw)

    monkeypatch.setattr(EmulationBackend, "quantize", truncating)
    model, handle = prepared()
    refuses(handle, model, r"stored weights equal the reference.*14 layers differ, first model")


# --- operands -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "substitute",
    [lambda x: x.clone(), lambda x: mxfp4(x) * 1.0001, lambda x: mxfp4(x.flip(-1))],
    ids=["identity", "slightly_off", "wrong_elements"],
)
def test_an_operand_that_is_not_the_reference_is_found(
    substitute: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from npu_qat.backends import EmulationBackend

    model, handle = prepared()
    run(model, handle, "rollout")
    handle.audit.verify(model)
    monkeypatch.setattr(EmulationBackend, "fake_quant", lambda self, x, *a, **k: substitute(x))
    run(model, handle, "training")
    refuses(handle, model, r"equal the reference quantisation.*q_proj in training: \d+ elements")


def test_an_output_that_is_not_quantised_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_qat.backends import EmulationBackend

    monkeypatch.setattr(EmulationBackend, "fake_quant", lambda self, x, *a, **k: x.clone())
    model, handle = prepared(Recipe(injection_point="output"))
    run(model, handle)
    refuses(handle, model, "quantised tensors equal the reference")


def test_a_bypassed_quantiser_is_found() -> None:
    model, handle = prepared()
    handle.layers[UP].quantize_input = lambda x: x
    run(model, handle, "training")
    refuses(handle, model, rf"equal the reference quantisation.*{UP} in training")


def test_an_input_that_is_quantised_although_it_should_not_be_is_found() -> None:
    model, handle = prepared(Recipe(injection_point="weight"))
    layer = handle.layers[UP]
    layer.state = QuantState(Recipe(), layer.state.backend, observer=layer.state.observer)
    run(model, handle, "evaluation")
    refuses(handle, model, rf"equal the reference quantisation.*{UP} in evaluation")


# --- modules --------------------------------------------------------------------------------


def test_a_replaced_module_is_found() -> None:
    model, handle = prepared()
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 128, bias=False)
    run(model, handle)
    refuses(handle, model, rf"planned layers are in the trained model.*13, missing {UP}")


def test_another_model_than_the_prepared_one_is_found() -> None:
    _, handle = prepared()
    refuses(handle, tiny_model(), r"planned layers.*expected 14 quantised layers, measured 0")


def test_a_quantised_layer_that_nobody_planned_is_found() -> None:
    model, handle = prepared(Recipe(target_layers=(0,)))
    other, _ = prepared()
    model.model.layers[1].mlp.up_proj = other.model.layers[1].mlp.up_proj
    refuses(handle, model, rf"planned layers.*not planned {UP}")


def test_wrappers_do_not_hide_the_layers() -> None:
    model, handle = prepared()
    adapted = add_lora(model, LoraSection(r=4), seed=0)
    run(adapted, handle)
    handle.audit.verify(adapted)
    handle.audit.verify(nn.ModuleDict({"module": adapted}))


# --- phases ---------------------------------------------------------------------------------


def test_a_layer_that_is_skipped_is_found() -> None:
    model, handle = prepared()
    model.model.layers[1].mlp.forward = lambda x: x
    run(model, handle, "rollout")
    refuses(handle, model, r"configured phases.*layers.1.mlp.\w+ in rollout: 0 of 0 calls")


def test_a_layer_that_is_skipped_in_one_phase_is_found() -> None:
    model, handle = prepared()
    run(model, handle, "training")
    handle.audit.verify(model)
    model.model.layers[1].mlp.forward = lambda x: x
    run(model, handle, "evaluation")
    refuses(handle, model, r"configured phases.*in evaluation: 0 of 0 calls")


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_without_quantisers_is_found(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = prepared()
    run(model, handle)
    handle.audit.verify(model)
    monkeypatch.setattr(QuantState, "active", property(lambda self: self.phase != phase))
    run(model, handle, phase)
    refuses(handle, model, rf"configured phases.* in {phase}: 1 of 2 calls quantised")


def test_a_phase_that_quantises_against_the_recipe_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, handle = prepared(Recipe(apply_during="training"))
    monkeypatch.setattr(QuantState, "active", property(lambda self: True))
    run(model, handle, "rollout")
    refuses(handle, model, r"configured phases.*in rollout: 1 of 1 calls quantised")


# --- the report -----------------------------------------------------------------------------


def test_checks_made_elsewhere_count_and_replace_their_namesakes() -> None:
    model, handle = prepared()
    run(model, handle)
    handle.audit.add_checks([Check("noise", "3", "0", ok=False)])
    refuses(handle, model, "noise: expected 3, measured 0")
    handle.audit.add_checks([Check("noise", "3", "3", ok=True)])
    handle.audit.verify(model)
    assert sum(c.name == "noise" for c in handle.audit.checks()) == 1


def test_the_report_has_what_was_measured() -> None:
    model, handle = prepared()
    original = tiny_model().model.layers[1].mlp.up_proj.weight.detach()
    run(model, handle, "rollout", "training", "training")
    rows = {row["name"]: row for row in handle.audit.report(model)["modules"]}
    assert len(rows) == 15
    assert rows["lm_head"]["quantized"] is False and "calls" not in rows["lm_head"]
    row = rows[UP]
    assert row["calls"] == row["quantized_calls"] == {"rollout": 1, "training": 2}
    error = (mxfp4(original) - original).norm() / original.norm()
    assert row["weight_rel_error"] == pytest.approx(float(error), rel=1e-5)
    assert row["weight_sqnr_db"] == pytest.approx(-20 * float(torch.log10(error)), rel=1e-4)
    assert 0.03 < row["input_rel_error"] < 0.25
    assert row["input_sqnr_db"] == pytest.approx(
        -20 * float(torch.log10(torch.tensor(row["input_rel_error"]))), rel=1e-4
    )
    assert row["operand_mismatches"] == {"rollout": 0, "training": 0}


def test_errors_of_a_tensor_scaled_input_are_those_of_its_values() -> None:
    model, handle = prepared(Recipe(weight_profile="nvfp4", activation_profile="nvfp4"))
    handle.calibrate(lambda m: m(input_ids=IDS))
    run(model, handle)
    handle.audit.verify(model)
    for row in handle.audit.report(model)["modules"]:
        if row["quantized"]:
            assert 0.02 < row["input_rel_error"] < 0.2, row["name"]
            assert 0.02 < row["weight_rel_error"] < 0.2, row["name"]
