"""Counts are those of the published models and of models that are really built."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from npu_qat.bench.models import random_model
from npu_qat.config import LoraSection, ModelConfig, RunConfig
from npu_qat.layers import plan_linears, prepare_model
from npu_qat.layers.quant_linear import QuantLinear
from npu_qat.planning.facts import model_facts
from npu_qat.planning.model import (
    ARCHITECTURES,
    architecture,
    build_on_meta,
    known_models,
    read_architecture,
)
from tests.planning.models import (
    adapted_model,
    facts_of_small,
    run_config,
    small_architecture,
)

TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}

# As the publishers state them, to the last parameter (tied embeddings once).
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


def test_every_known_model_has_a_published_count() -> None:
    assert set(known_models()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_shape_has_the_published_number_of_parameters(name: str) -> None:
    model = build_on_meta(architecture(name), ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_a_file_a_folder_and_a_hub_name_are_read(tmp_path: Path) -> None:
    file = ARCHITECTURES / "Qwen--Qwen2.5-7B-Instruct.json"
    copy = tmp_path / "config.json"
    copy.write_text(file.read_text())
    for path in (str(copy), str(tmp_path), "Qwen/Qwen2.5-7B-Instruct"):
        found, _ = read_architecture(ModelConfig(path=path))
        assert found.hidden_size == json.loads(file.read_text())["hidden_size"]


def test_an_unknown_shape_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'gpt-9'; known are .*qwen2\.5-7b"):
        architecture("gpt-9")


@pytest.mark.parametrize("storage", ["image", "packed"])
@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "llama-3-8b", "qwen3-8b"])
def test_bytes_and_adapters_are_those_of_the_built_model(name: str, storage: str) -> None:
    facts = facts_of_small(name, storage)
    adapted, handle = adapted_model(name, storage)
    base = {p: t for p, t in adapted.named_parameters() if not t.requires_grad}
    assert facts.bytes_stored == sum(t.numel() * t.element_size() for t in base.values())
    assert facts.lora_parameters == sum(t.numel() for t in adapted.parameters() if t.requires_grad)
    assert facts.adapted_linears == 2 * 7
    assert facts.packed == (storage == "packed")
    largest = max(m.in_features * m.out_features for m in handle.layers.values())
    assert facts.largest_linear == largest
    assert all(isinstance(m, QuantLinear) for m in handle.layers.values())
    assert facts.norms_of_heads == name.startswith("qwen3")
    assert facts.tied == (name == "qwen2.5-1.5b")


@pytest.mark.parametrize("storage", ["image", "packed"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_dual_level_base_has_fp32_images_in_any_dtype(dtype: str, storage: str) -> None:
    shape = small_architecture()
    config = run_config(storage, profile="ascend950-dual", dtype=dtype)
    on_meta = build_on_meta(shape, config.model)
    facts = model_facts(on_meta, shape, plan_linears(on_meta, config.quant), config)
    model = random_model(shape, torch.device("cpu")).to(getattr(torch, TORCH_NAMES[dtype]))
    prepare_model(model, config.quant)
    assert facts.bytes_stored == sum(t.numel() * t.element_size() for t in model.parameters())


def test_siblings_keep_their_input_once() -> None:
    # q, k, v: 128; o: 128; gate, up: 128; down: 320; two layers.
    assert facts_of_small().saved_inputs == 2 * (128 + 128 + 128 + 320)


def test_only_named_linears_are_adapted() -> None:
    config = RunConfig(lora=LoraSection(r=4, targets=("q_proj", "v_proj")))
    shape = architecture("qwen2.5-0.5b")
    model = build_on_meta(shape, config.model)
    linears = plan_linears(model, config.quant)
    facts = model_facts(model, shape, linears, config)
    assert facts.lora_parameters == 24 * 4 * ((896 + 896) + (896 + 128))
    assert facts.saved_inputs == 24 * 896
    wrong = config.model_copy(update={"lora": LoraSection(targets=("w",))})
    with pytest.raises(ValueError, match="names no linear of the decoder layers"):
        model_facts(model, shape, linears, wrong)


def test_an_architecture_without_the_needed_numbers_is_refused() -> None:
    model = build_on_meta(architecture("qwen2.5-0.5b"), ModelConfig())
    config = RunConfig()
    other = SimpleNamespace(num_attention_heads=4, hidden_size=8)
    with pytest.raises(ValueError, match="has no num_hidden_layers"):
        model_facts(model, other, plan_linears(model, config.quant), config)
