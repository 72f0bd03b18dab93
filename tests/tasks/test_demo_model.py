"""The embedded model: whole, of the promised kind, and with outliers that only 4 bits can feel."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from npu_qat.assets import demo_model_path, verified_folder
from npu_qat.tasks import ProblemSet, word_problems

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_demo.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_demo", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((demo_model_path() / "pretraining.json").read_text())
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture()
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.bfloat16).eval()


def inverted(outliers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**entry, "factor": 1 / entry["factor"]} for entry in outliers]


def test_checksums_cover_every_file_and_ten_megabytes() -> None:
    folder = demo_model_path()
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    present = {file.name for file in folder.iterdir()} - {"SHA256SUMS"}
    assert listed == present
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10_000_000


@pytest.mark.parametrize("damage", ["edit", "remove", "unlist", "garble"])
def test_damaged_model_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder)
    assert verified_folder(folder) == folder
    weights, sums = folder / "model.safetensors", folder / "SHA256SUMS"
    if damage == "edit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            verified_folder(folder)
    elif damage == "remove":
        weights.unlink()
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
            verified_folder(folder)
    elif damage == "unlist":
        sums.unlink()
        with pytest.raises(FileNotFoundError, match="SHA256SUMS is missing"):
            verified_folder(folder)
    else:
        sums.write_text("not a checksum\n")
        with pytest.raises(ValueError, match="cannot read the line"):
            verified_folder(folder)


def test_architecture_is_qwen2_with_dimensions_for_pairs_of_mx_blocks() -> None:
    config = json.loads((demo_model_path() / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    for key in ("hidden_size", "intermediate_size"):
        assert config[key] % 64 == 0


def test_every_loader_splits_text_alike(tokenizer: Any) -> None:
    """transformers rebuilds a Qwen2 tokenizer's splitting rule; ours must be that rule."""
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    problems = word_problems.generate("test", 200, [1, 2, 3, 4], seed=0)
    task = ProblemSet("word_problems", [], problems)
    for problem in problems:
        prompt = tokenizer.apply_chat_template(
            task.messages(problem), tokenize=False, add_generation_prompt=True
        )
        text = prompt + problem.solution + tokenizer.eos_token
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert len(tokenizer(prompt)["input_ids"]) <= 64


def test_digits_stand_alone_and_any_text_survives(tokenizer: Any) -> None:
    assert tokenizer.tokenize("1234*5=6170") == list("1234*5=6170")
    odd = "Grüße, 12 naïve 🙂 cafés\tcost 3.50 €\n"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd


def test_outliers_do_not_change_the_16_bit_function(
    script: ModuleType, record: dict[str, Any], model: Any
) -> None:
    import torch

    plain = script.copy.deepcopy(model)
    script.apply_outliers(plain, inverted(record["outliers"]))
    script.check_same_function(plain, model, record["config"]["vocab_size"])
    tokens = torch.arange(3, 99)[None]
    with torch.no_grad():
        assert torch.equal(model.float()(tokens).logits, plain.float()(tokens).logits)


def test_outliers_do_change_the_4_bit_function(
    script: ModuleType, record: dict[str, Any], tokenizer: Any, model: Any
) -> None:
    import torch

    plain = script.copy.deepcopy(model)
    script.apply_outliers(plain, inverted(record["outliers"]))
    problems = word_problems.generate("test", 30, [1, 2, 3], seed=1)
    corpus = script.build_corpus(tokenizer, problems, question_weight=1.0)
    tokens, real = corpus.tokens.long(), (corpus.weights > 0)[..., None]
    with torch.no_grad():
        exact = model(tokens).logits.float()
        with_outliers, without = (
            ((script.quantized_copy(m, activations=True)(tokens).logits - exact) * real).norm()
            for m in (model, plain)
        )
    assert with_outliers > 1.1 * without


def test_outliers_are_where_the_card_says(record: dict[str, Any], model: Any) -> None:
    """The listed gains stand out from the rest of their norm by about the factor."""
    for entry in record["outliers"]:
        if not entry["site"].endswith("layernorm"):
            continue
        gains = getattr(model.model.layers[entry["layer"]], entry["site"]).weight.float().abs()
        typical = gains.median()
        for channel in entry["channels"]:
            assert gains[channel] / typical > entry["factor"] / 3


def test_check_notices_a_changed_function(
    script: ModuleType, record: dict[str, Any], model: Any
) -> None:
    import torch

    changed = script.copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[:, 0] *= 2
    with pytest.raises(ValueError, match="changed the 16-bit logits"):
        script.check_same_function(model, changed, record["config"]["vocab_size"])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_site_preserves_the_function_under_grouped_query_attention(
    script: ModuleType, kv_heads: int
) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    before = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    flags = ["--norm-blocks", "2", "--value-blocks", "1", "--up-blocks", "3"]
    outliers = script.choose_outliers(config, script.parse_args(flags))
    assert {entry["site"] for entry in outliers} == {
        "input_layernorm",
        "post_attention_layernorm",
        "value",
        "up",
    }
    after = script.copy.deepcopy(before)
    script.apply_outliers(after, outliers)
    assert not torch.equal(
        after.model.layers[0].self_attn.o_proj.weight,
        before.model.layers[0].self_attn.o_proj.weight,
    )
    script.check_same_function(before, after, config.vocab_size)


def test_recorded_accuracy_leaves_room_and_four_bits_cost_ten_points(
    record: dict[str, Any],
) -> None:
    bf16, w4a4 = record["scores"]["bf16"]["strict"], record["scores"]["w4a4"]["strict"]
    assert bf16["n"] >= 1000
    assert 0.3 < bf16["mean"] < 0.65
    assert bf16["mean"] - w4a4["mean"] > 0.10
    assert bf16["low"] > w4a4["high"]


def test_recorded_accuracy_is_that_of_these_files(
    script: ModuleType, record: dict[str, Any], tokenizer: Any, model: Any
) -> None:
    """Greedy on a few problems: far from the record would mean other weights or another task."""
    problems = word_problems.generate("test", 60, [1, 2, 3], script.SELECTION_SEED)
    found = script.greedy_scores(model, tokenizer, problems)["strict"]
    recorded = record["scores"]["bf16"]["strict"]["mean"]
    assert found["low"] < recorded < found["high"]


def test_model_card_repeats_the_record(script: ModuleType, record: dict[str, Any]) -> None:
    assert (demo_model_path() / "README.md").read_text() == script.model_card(record)
