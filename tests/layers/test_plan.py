"""Which linears are quantised, why the others are not, and what they will take."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from npu_qat.config import Recipe
from npu_qat.layers import plan_linears, prepare_model
from npu_qat.layers.plan import PlannedLinear, sibling_groups
from tests.training.tiny import tiny_model

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def on_meta(**changes: object) -> nn.Module:
    with torch.device("meta"):
        return tiny_model(dtype=torch.bfloat16, **changes)


def quantized(plan: list[PlannedLinear]) -> set[str]:
    return {planned.path for planned in plan if planned.quantized}


def test_the_plan_of_a_model_without_data() -> None:
    model = on_meta(num_hidden_layers=21)
    assert all(p.is_meta for p in model.parameters())
    plan = plan_linears(model, Recipe())
    assert len(plan) == 21 * 7 + 1
    by_path = {planned.path: planned for planned in plan}
    assert {p.rpartition(".")[2] for p in quantized(plan)} == set(NAMES)
    q = by_path["model.layers.20.self_attn.q_proj"]
    assert (q.layer, q.in_features, q.out_features, q.bias) == (20, 64, 64, True)
    assert (q.mode, q.weight_profile, q.activation_profile) == ("W4A4", "ascend950", "ascend950")
    head = by_path["lm_head"]
    assert not head.quantized and head.mode == "W16A16" and head.layer is None
    assert head.reason == "excluded by 'lm_head'"
    assert head.weight_profile is head.activation_profile is None


@pytest.mark.parametrize(
    ("point", "mode", "weight", "activation"),
    [
        ("none", "W16A16", None, None),
        ("weight", "W4A16", "ocp", None),
        ("input", "W16A4", None, "ascend950"),
        ("both", "W4A4", "ocp", "ascend950"),
        ("output", "W16A16O4", None, "ascend950"),
        ("weight_output", "W4A16O4", "ocp", "ascend950"),
    ],
)
def test_modes_have_their_common_names(
    point: str, mode: str, weight: str | None, activation: str | None
) -> None:
    plan = plan_linears(on_meta(), Recipe(injection_point=point, weight_profile="ocp"))
    assert {p.mode for p in plan if p.path != "lm_head"} == {mode}
    assert {p.weight_profile for p in plan if p.path != "lm_head"} == {weight}
    assert {p.activation_profile for p in plan if p.path != "lm_head"} == {activation}


@pytest.mark.parametrize(
    ("profile", "axis"),
    [
        ("ascend950", "row"),
        ("ascend950", "column"),
        ("nvfp4", "row"),
        ("nvfp4", "column"),
        ("ascend950-dual", "row"),
    ],
)
@pytest.mark.parametrize(
    ("storage", "during"),
    [("image", "both"), ("packed", "both"), ("image", "training"), ("packed", "rollout")],
)
def test_planned_bytes_are_those_that_are_stored(
    profile: str, axis: str, storage: str, during: str
) -> None:
    recipe = Recipe(
        injection_point="weight",
        weight_profile=profile,
        base_storage=storage,
        block_axis=axis,
        apply_during=during,
    )
    model = tiny_model(dtype=torch.bfloat16, hidden_size=40, intermediate_size=72)
    handle = prepare_model(model, recipe)
    for planned in handle.plan:
        if not planned.quantized:
            continue
        layer = handle.layers[planned.path]
        tensors = {n: t for n, t in layer.state_dict().items() if n.startswith("weight")}
        scalar = tensors.pop("weight_tensor_scale", None)
        assert (scalar is not None) == (profile == "nvfp4")
        stored = sum(t.numel() * t.element_size() for t in tensors.values())
        assert planned.bytes_stored == stored, planned
        assert planned.bytes_16bit == 2 * planned.in_features * planned.out_features


def test_a_dual_level_input_makes_the_images_of_weights_fp32() -> None:
    recipe = Recipe(activation_profile="ascend950-dual", base_storage="image")
    handle = prepare_model(tiny_model(dtype=torch.bfloat16), recipe)
    for planned in handle.plan:
        if planned.quantized:
            image = handle.layers[planned.path].weight_image
            assert image.dtype == torch.float32
            assert planned.bytes_stored == image.numel() * 4


# --- exclusions -----------------------------------------------------------------------------


def test_layer_2_is_not_layer_20() -> None:
    plan = plan_linears(on_meta(num_hidden_layers=21), Recipe(exclude=("lm_head", "layers.2")))
    left = {p.layer for p in plan if not p.quantized}
    assert left == {None, 2}
    assert {p.reason for p in plan if p.layer == 2} == {"excluded by 'layers.2'"}


def test_a_star_stands_for_one_segment() -> None:
    recipe = Recipe(exclude=("lm_head", "layers.*.mlp.down_proj", "layers.0.self_attn"))
    plan = plan_linears(on_meta(), recipe)
    assert quantized(plan) == {
        *(f"model.layers.0.mlp.{n}" for n in ("gate_proj", "up_proj")),
        *(f"model.layers.1.mlp.{n}" for n in ("gate_proj", "up_proj")),
        *(f"model.layers.1.self_attn.{n}" for n in NAMES[:4]),
    }


def test_a_parent_is_excluded_by_its_name_not_by_a_part_of_it() -> None:
    with pytest.raises(ValueError, match="'proj' matches no linear"):
        plan_linears(on_meta(), Recipe(exclude=("proj",)))


@pytest.mark.parametrize("pattern", ["layers.7", "self_atn", "model.norm", "LM_HEAD"])
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"exclude: '{pattern}' matches no linear layer"):
        plan_linears(on_meta(), Recipe(exclude=("lm_head", pattern)))


def test_fused_experts_do_not_stay_in_16_bits_unasked() -> None:
    sizes = {"hidden_size": 64, "head_dim": 32, "vocab_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(moe_intermediate_size=32, num_experts=4, **sizes, **heads)
        )
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj.*'experts' to quant"):
        plan_linears(model, Recipe())
    plan = plan_linears(model, Recipe(exclude=("lm_head", "experts")))
    assert quantized(plan) == {f"model.layers.0.self_attn.{n}" for n in NAMES[:4]}
    assert not quantized(plan_linears(model, Recipe(injection_point="none")))


def test_kernels_and_tables_are_no_experts() -> None:
    model = on_meta()
    model.patches = nn.Conv1d(4, 4, 3, device="meta")
    model.positions = nn.Parameter(torch.empty(1, 8, 64, device="meta"))
    assert len(plan_linears(model, Recipe())) == 2 * 7 + 1


def test_target_layers_leave_all_others() -> None:
    plan = plan_linears(on_meta(num_hidden_layers=4), Recipe(target_layers=(1, 3)))
    assert {p.layer for p in plan if p.quantized} == {1, 3}
    assert {p.reason for p in plan if p.layer == 0} == {"not in target_layers"}


@pytest.mark.parametrize("layers", [(0, 4), (-1,)])
def test_a_target_layer_that_is_not_there_is_an_error(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"no decoder layer \[{layers[-1]}\]"):
        plan_linears(on_meta(num_hidden_layers=4), Recipe(target_layers=layers))


@pytest.mark.parametrize(
    "recipe", [Recipe(target_layers=()), Recipe(exclude=("lm_head", "layers"))]
)
def test_a_recipe_that_quantises_nothing_is_an_error(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="leave no linear layer to quantise"):
        plan_linears(on_meta(), recipe)


def test_injection_point_none_quantises_nothing_and_says_so() -> None:
    plan = plan_linears(on_meta(), Recipe(injection_point="none"))
    assert quantized(plan) == set()
    assert {p.reason for p in plan} == {"injection_point: none"}


def test_a_tied_head_is_refused_and_an_untied_one_is_quantised() -> None:
    with pytest.raises(ValueError, match="lm_head shares its weight with the input embeddings"):
        plan_linears(on_meta(), Recipe(exclude=()))
    plan = plan_linears(on_meta(tie_word_embeddings=False), Recipe(exclude=()))
    assert "lm_head" in quantized(plan)


def test_a_module_without_linears_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"LayerNorm has no nn.Linear"):
        plan_linears(nn.LayerNorm(4), Recipe())


def test_an_output_with_a_tensor_scale_is_refused() -> None:
    """There is nothing that would calibrate it; a dynamic scale mixes tokens."""
    recipe = Recipe(injection_point="output", activation_profile="nvfp4")
    with pytest.raises(ValueError, match="tensor scales are calibrated for inputs only"):
        plan_linears(on_meta(), recipe)


# --- groups ---------------------------------------------------------------------------------


def test_groups_are_siblings_under_one_parent() -> None:
    paths = [f"layers.{i}.self_attn.{n}" for i in (1, 11) for n in NAMES[:4]]
    paths += [f"layers.1.mlp.{n}" for n in NAMES[4:]]
    groups = sibling_groups(paths)
    assert sorted(path for group in groups for path in group) == sorted(paths)
    assert tuple(f"layers.1.self_attn.{n}" for n in NAMES[:3]) in groups
    assert ("layers.11.self_attn.o_proj",) in groups
    assert ("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj") in groups
    assert ("layers.1.mlp.down_proj",) in groups


def test_an_excluded_sibling_leaves_its_group() -> None:
    groups = sibling_groups(["a.q_proj", "a.v_proj"])
    assert groups == [("a.q_proj", "a.v_proj")]
