"""A right export passes every level; each kind of fault fails the level that is there for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_qat.backends import EmulationBackend, Selection
from npu_qat.deploy.checksums import write_checksums
from npu_qat.numerics import quantize
from npu_qat.parity import independent
from npu_qat.parity.levels import check, ulp_distance
from npu_qat.parity.recording import record
from npu_qat.parity.training_side import open_training
from tests.parity.world import SMALL, World, break_tensor, failed, level, make, verdicts

LINEAR = "model.layers.1.mlp.up_proj"
ALL_PASS = dict.fromkeys(("L0", "L1", "L2", "L3"), "pass")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A Qwen2 with an adapter, exported for Ascend."""
    return make(tmp_path_factory.mktemp("world"), adapter=True)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same in fp32, where a bias has more digits than bf16."""
    return make(tmp_path_factory.mktemp("fp32"), dtype="fp32")


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Path:
    return world.copy(tmp_path / "served")


# --- right --------------------------------------------------------------------------------------


def test_what_was_trained_passes_every_level_bit_for_bit(world: World) -> None:
    report = world.judge()
    assert failed(report) == {} and verdicts(report) == ALL_PASS and report.passed
    outputs = level(report, "L1")
    assert outputs.data["limit_ulp"] == 0 and len(outputs.data["by_linear"]) == 14
    assert level(report, "L0").data["inputs"]["tensors"] == 8
    # Adapters are rounded in another order, so the models differ, and by less than the noise.
    measured = level(report, "L2").data["measured"]
    assert 0 < measured["logp_mean"] < level(report, "L2").data["limits"]["logp_mean"]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_other_families_pass_and_agree_exactly_without_an_adapter(
    tmp_path: Path, family: str
) -> None:
    report = make(tmp_path, family=family).judge()
    assert verdicts(report) == ALL_PASS
    assert set(level(report, "L2").data["measured"].values()) == {0.0}


@pytest.mark.parametrize(
    ("format", "quant"),
    [
        ("compressed-tensors", {"activation_profile": "compressed-tensors"}),
        ("compressed-tensors", {"activation_profile": "nvfp4", "weight_profile": "nvfp4"}),
        ("compressed-tensors", {"injection_point": "weight"}),
        ("ascend", {"weight_profile": "ascend950-mse"}),
    ],
    ids=["mxfp4 twin", "nvfp4", "w4a16", "searched scales"],
)
def test_every_recipe_passes_where_the_engine_rounds_as_training_did(
    tmp_path: Path, format: str, quant: dict[str, str]
) -> None:
    report = make(tmp_path, format, **quant).judge()
    assert failed(report) == {} and verdicts(report) == ALL_PASS


def test_a_twin_with_other_activations_is_compared_by_its_weights_and_labelled(
    tmp_path: Path,
) -> None:
    report = make(tmp_path, "compressed-tensors").judge()
    assert verdicts(report) == {"L0": "pass", "L1": "skipped", "L2": "skipped", "L3": "pass"}
    assert level(report, "L0").skipped == (
        "activations differ: trained with ascend950, served with compressed-tensors"
    )
    assert [c.name for c in level(report, "L0").checks] == [
        "the same linears are quantised",
        "codes and scales of weights",
    ]


# --- wrong --------------------------------------------------------------------------------------


def test_one_flipped_code_fails_codes_layers_and_checkpoint(world: World, copy: Path) -> None:
    break_tensor(copy, f"{LINEAR}.weight", lambda t: t[5, 7].bitwise_xor_(0x40))
    report = world.judge(copy)
    assert verdicts(report) | {"L2": ""} == {"L0": "fail", "L1": "fail", "L2": "", "L3": "fail"}
    weights = level(report, "L0").data["weights"]
    assert weights["differing"] == [LINEAR]
    assert weights["causes"][LINEAR]["codes"] == {"other": 1}
    assert f"{LINEAR}.weight [5, 15]" in failed(report)["codes and scales of weights"]
    assert level(report, "L1").data["beyond"] == [LINEAR]


def test_a_scale_off_by_one_fails_with_that_cause(world: World, copy: Path) -> None:
    break_tensor(copy, f"{LINEAR}.weight_scale", lambda t: t[3, 1].add_(1))
    report = world.judge(copy)
    assert level(report, "L0").verdict == "fail" and level(report, "L3").verdict == "fail"
    causes = level(report, "L0").data["weights"]["causes"][LINEAR]
    assert causes["scales"] == {"scale off by one": 1} and causes["codes"] == {}


def test_another_rounding_mode_of_activations_fails_codes_and_layers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = independent._round
    monkeypatch.setattr(independent, "_round", lambda units, away: right(units, away=False))
    report = world.judge()
    assert verdicts(report)["L0"] == "fail" and verdicts(report)["L1"] == "fail"
    assert verdicts(report)["L3"] == "pass"
    assert set(level(report, "L0").data["inputs"]["codes"]) == {"tie"}


def test_rounding_downwards_is_seen_by_the_model_level_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(units: Any, *, away: bool) -> Any:
        import numpy as np

        return np.searchsorted(independent.VALUES[:8], units, side="right") - 1

    monkeypatch.setattr(independent, "_round", down)
    assert verdicts(world.judge()) == {"L0": "fail", "L1": "fail", "L2": "fail", "L3": "pass"}


def test_a_bias_in_bf16_fails_layers_and_checkpoint(fp32: World, tmp_path: Path) -> None:
    folder, name = fp32.copy(tmp_path / "served"), "model.layers.0.self_attn.q_proj.bias"
    assert verdicts(fp32.judge(folder)) == ALL_PASS
    break_tensor(folder, name, lambda t: t.copy_(t.bfloat16().float()))
    report = fp32.judge(folder)
    assert verdicts(report)["L0"] == "pass" and verdicts(report)["L1"] == "fail"
    assert verdicts(report)["L3"] == "fail"
    assert level(report, "L1").data["beyond"] == ["model.layers.0.self_attn.q_proj"]


def test_a_missing_adapter_fails_model_and_checkpoint(world: World, copy: Path) -> None:
    shutil.rmtree(copy / "adapter")
    write_checksums(copy)
    report = world.judge(copy)
    assert verdicts(report) == {"L0": "pass", "L1": "pass", "L2": "fail", "L3": "fail"}
    assert failed(report)["adapter"] == "none"


def test_another_adapter_fails_the_checkpoint(world: World, copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, file)
    write_checksums(copy)
    report = world.judge(copy)
    assert verdicts(report)["L3"] == "fail" and "adapter" in failed(report)


def test_another_chat_template_fails_the_checkpoint(world: World, copy: Path) -> None:
    (template,) = copy.glob("chat_template*")
    template.write_text("Hello. " + template.read_text())
    write_checksums(copy)
    report = world.judge(copy)
    assert verdicts(report) == {**ALL_PASS, "L3": "fail"}
    assert failed(report) == {
        "the exported tokenizer makes the same prompt tokens": "0 equal, first prompt 0"
    }


def test_a_wrong_norm_is_no_matter_of_codes(world: World, copy: Path) -> None:
    break_tensor(copy, "model.layers.0.input_layernorm.weight", lambda t: t.mul_(2))
    assert verdicts(world.judge(copy)) == {"L0": "pass", "L1": "pass", "L2": "fail", "L3": "fail"}


def test_a_lost_tensor_fails_every_level_and_says_which(world: World, copy: Path) -> None:
    from tests.deploy.models import damage

    damage(copy, lambda tensors: tensors.pop("model.norm.weight"))
    report = world.judge(copy)
    assert set(verdicts(report).values()) == {"fail"}
    assert "model.norm.weight" in failed(report)["the checkpoint can be loaded"]


def test_training_that_multiplies_other_numbers_than_it_encodes_fails(tmp_path: Path) -> None:
    class Careless(EmulationBackend):
        def quantize(self, x: Any, profile: Any, axis: int = -1, **options: Any) -> Any:
            wrong = x.shape[0] <= 64 and profile == "ascend950" and x.shape[-1] == 128
            return quantize(x, "ascend950-rint" if wrong else profile, axis, **options)

    right = make(tmp_path)
    selection = Selection(right.selection.device, Careless(), "")
    side = open_training(right.config, None, selection)
    report = check(record(side, SMALL), right.export, right.selection, side=side)
    assert "training multiplies the numbers of these codes" in failed(report)


def test_another_model_is_refused(world: World, tmp_path: Path) -> None:
    other = make(tmp_path, family="llama")
    with pytest.raises(ValueError, match="the recording is of another base"):
        check(world.recording, other.export, world.selection)


def test_a_merged_adapter_is_refused_with_what_to_do(world: World, copy: Path) -> None:
    claims = json.loads((copy / "npu_qat_export.json").read_text())
    (copy / "npu_qat_export.json").write_text(json.dumps({**claims, "adapter": "merged"}))
    with pytest.raises(ValueError, match="merged adapter"):
        world.judge(copy)


# --- details ------------------------------------------------------------------------------------


def floats() -> Iterator[tuple[torch.dtype, float, float, int]]:
    yield torch.bfloat16, 1.0, 1.0078125, 1
    yield torch.bfloat16, 1.0, 1.0, 0
    yield torch.float32, 1.0, 1.0 + 2**-23, 1
    yield torch.float16, -(2.0**-24), 2.0**-24, 2
    yield torch.bfloat16, 0.0, -0.0, 0


@pytest.mark.parametrize(("dtype", "a", "b", "steps"), list(floats()))
def test_distance_counts_neighbouring_floats(
    dtype: torch.dtype, a: float, b: float, steps: int
) -> None:
    x, y = torch.tensor([a], dtype=dtype), torch.tensor([b], dtype=dtype)
    assert ulp_distance(x, y).tolist() == [steps]


def test_on_another_processor_one_unit_in_the_last_place_is_allowed(world: World) -> None:
    kept = world.recording.content
    other = type(world.recording)(
        {**kept, "computed_on": {**kept["computed_on"], "processor": "another"}},
        dict(world.recording.tensors),
    )
    name = f"y.{LINEAR}"
    y = other.tensors[name]
    other.tensors[name] = (y.view(torch.int16) + 1).view(y.dtype)
    report = check(other, world.export, world.selection)
    assert level(report, "L1").data["limit_ulp"] == 1 and level(report, "L1").verdict == "pass"
    other.tensors[name] = (y.view(torch.int16) + 2).view(y.dtype)
    assert level(check(other, world.export, world.selection), "L1").verdict == "fail"
