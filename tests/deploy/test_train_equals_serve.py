"""The bytes that leave are the bytes that training computed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from npu_qat.config import ModelConfig, Recipe
from npu_qat.deploy import (
    AscendWriter,
    CompressedTensorsWriter,
    PackedCore,
    open_checkpoint,
    open_export,
)
from npu_qat.deploy.export import export
from npu_qat.layers import QuantizedModel, prepare_model
from npu_qat.layers.base_model import load_base
from npu_qat.numerics import QuantizedTensor, dequantize
from tests.deploy.models import core_of, export_tiny, save, tiny

WEIGHT_PROFILES = ["ascend950", "ascend950-mse", "msmodelslim-weight", "compressed-tensors"]


def trained(source: Path | str, recipe: Recipe, storage: str) -> QuantizedModel:
    """The model as training prepares it, in one of its storages."""
    from transformers import AutoModelForCausalLM

    recipe = recipe.model_copy(update={"base_storage": storage})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    return prepare_model(model, recipe)


def assert_same_weights(folder: Path, handle: QuantizedModel) -> None:
    """Every quantised linear of ``handle`` holds what ``folder`` holds, bit for bit."""
    exported = open_export(folder)
    served = {n: v for n, v in exported.entries() if isinstance(v, QuantizedTensor)}
    assert set(served) == {f"{path}.weight" for path in handle.layers}
    for path, layer in handle.layers.items():
        q = served[f"{path}.weight"]
        if handle.recipe.base_storage == "packed":
            assert torch.equal(q.packed, layer.weight_packed.data)
            assert torch.equal(q.scales, layer.weight_scale.data)
        image = dequantize(q, torch.bfloat16, apply_tensor_scale=False)
        # As integers, so that the sign of zero counts.
        assert torch.equal(image.view(torch.int16), layer.weight_operand().view(torch.int16))


@pytest.mark.parametrize("storage", ["image", "packed"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_every_family_is_served_with_the_weights_of_training(
    tmp_path: Path, family: str, storage: str
) -> None:
    exported = export_tiny(tmp_path, family=family)
    assert_same_weights(exported.folder, trained(tmp_path / "source", Recipe(), storage))


@pytest.mark.parametrize("storage", ["image", "packed"])
def test_the_demo_model_is_served_with_the_weights_of_training(
    tmp_path: Path, storage: str
) -> None:
    config = ModelConfig()
    export(PackedCore(open_checkpoint(config), Recipe()), AscendWriter(), tmp_path / "served")
    model, _ = load_base(config, torch.device("cpu"))
    recipe = Recipe(base_storage=storage)
    assert_same_weights(tmp_path / "served", prepare_model(model, recipe))


@pytest.mark.parametrize("profile", WEIGHT_PROFILES)
def test_every_deployable_weight_profile_keeps_its_bytes(tmp_path: Path, profile: str) -> None:
    recipe = Recipe(weight_profile=profile)
    exported = export_tiny(tmp_path, recipe=recipe)
    assert_same_weights(exported.folder, trained(tmp_path / "source", recipe, "packed"))


@pytest.mark.parametrize("profile", ["nvfp4", "nvfp4-one-level"])
def test_nvfp4_keeps_codes_and_scales_and_shares_the_scale_of_fused_linears(
    tmp_path: Path, profile: str
) -> None:
    recipe = Recipe(injection_point="weight", weight_profile=profile)
    exported = export_tiny(tmp_path, "compressed-tensors", recipe)
    handle = trained(tmp_path / "source", recipe, "packed")
    assert_same_weights(exported.folder, handle)
    stored = load_file(next(exported.folder.glob("*.safetensors")))
    for path, layer in handle.layers.items():
        scale = getattr(layer, "weight_tensor_scale", torch.tensor(1.0))
        assert stored[f"{path}.weight_global_scale"].equal(1 / scale.reshape(1))
    layer_0 = "model.layers.0.self_attn"
    shared = [stored[f"{layer_0}.{n}_proj.weight_global_scale"] for n in "qkv"]
    assert shared[0].equal(shared[1]) and shared[0].equal(shared[2])


def test_both_formats_hold_the_same_bytes(tmp_path: Path) -> None:
    source = save(tmp_path / "source", tie_word_embeddings=False)
    recipe = Recipe()
    ascend = export(core_of(source, recipe), AscendWriter(), tmp_path / "a")
    twin = export(core_of(source, recipe), CompressedTensorsWriter(), tmp_path / "c")
    a = load_file(next(ascend.folder.glob("*.safetensors")))
    c = load_file(next(twin.folder.glob("*.safetensors")))
    assert {n.replace(".weight_packed", ".weight") for n in c} == set(a)
    packed = 0
    for name, tensor in a.items():
        twin_name = f"{name}_packed" if f"{name}_packed" in c else name
        packed += twin_name != name
        if name.endswith("bias"):  # the format's own type; the numbers are the same
            assert tensor.dtype == torch.float32 and tensor.equal(c[name].float())
        else:
            assert tensor.dtype == c[twin_name].dtype and tensor.equal(c[twin_name]), name
    assert packed == 14
    assert ascend.fingerprint == twin.fingerprint


def test_a_checkpoint_in_fp32_is_rounded_first_as_training_does(tmp_path: Path) -> None:
    model = tiny().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3)  # no bf16 numbers any more
    model.save_pretrained(tmp_path / "source")
    exported = export(core_of(tmp_path / "source"), AscendWriter(), tmp_path / "served")
    assert_same_weights(exported.folder, trained(tmp_path / "source", Recipe(), "packed"))
    stored = load_file(next(exported.folder.glob("*.safetensors")))
    assert stored["model.norm.weight"].dtype == torch.bfloat16


def test_the_16_bit_tensors_leave_unchanged(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, recipe=Recipe(exclude=("lm_head", "layers.1")))
    stored = load_file(next(exported.folder.glob("*.safetensors")))
    state: dict[str, Any] = tiny().state_dict()
    kept = [n for n in stored if n in state and stored[n].dtype == torch.bfloat16]
    assert "model.layers.1.mlp.up_proj.weight" in kept and "model.embed_tokens.weight" in kept
    assert all(stored[n].equal(state[n]) for n in kept)
