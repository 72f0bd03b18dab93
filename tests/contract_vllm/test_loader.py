"""Our export through vllm-ascend's own loader: every byte arrives, every linear is the same.

``NPU_QAT_CONTRACT_MODEL=PATH make contract-vllm TEST_ARGS="-k given"`` takes a model of yours.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from npu_qat.assets import demo_model_path
from npu_qat.config import Recipe
from npu_qat.deploy import AscendWriter
from npu_qat.deploy.export import SHARD_BYTES, export
from npu_qat.deploy.validate import validate
from npu_qat.layers import QuantizedModel
from tests.contract_vllm.stack import Served, poisoned, serve
from tests.contract_vllm.training_side import (
    difficult,
    engine_module,
    logits,
    part_sizes,
    recorded,
    trained,
)
from tests.deploy.models import core_of, save

TOKENS = [5, 17, 80, 3, 41, 66, 12, 9, 90, 33, 2, 71, 28]
PARTLY = Recipe(exclude=("lm_head", "layers.1"))
# Widths that are multiples of 64 and of nothing larger, more groups than heads in a row, an odd
# vocabulary: what the engine pads and cuts.
ODD = {
    "hidden_size": 320,
    "intermediate_size": 448,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "vocab_size": 131,
}
WIDE = {"hidden_size": 1024, "intermediate_size": 2112, "num_hidden_layers": 1}

# Where the checkpoint is, the recipe, the size of an exported file.
Case = tuple[Callable[[Path], Path], Recipe, int]
CASES: dict[str, Case] = {
    "demo": (lambda _: demo_model_path(), Recipe(), SHARD_BYTES),
    "tied": (lambda p: save(p, tie_word_embeddings=True), Recipe(), SHARD_BYTES),
    "untied": (lambda p: save(p, tie_word_embeddings=False), Recipe(), SHARD_BYTES),
    "sharded": (lambda p: save(p, tie_word_embeddings=False, shard="40KB"), Recipe(), 20_000),
    "odd": (lambda p: save(p, **ODD), Recipe(), SHARD_BYTES),
    "wide": (lambda p: save(p, **WIDE), Recipe(), SHARD_BYTES),
    "partly": (lambda p: save(p), PARTLY, SHARD_BYTES),
    "mse": (lambda p: save(p), Recipe(weight_profile="ascend950-mse"), SHARD_BYTES),
    "qwen3": (lambda p: save(p, "qwen3"), Recipe(), SHARD_BYTES),
    "llama": (lambda p: save(p, "llama"), Recipe(), SHARD_BYTES),
}
if GIVEN := os.environ.get("NPU_QAT_CONTRACT_MODEL"):
    CASES["given"] = (lambda _: Path(GIVEN), Recipe(), SHARD_BYTES)


class Pair:
    """One checkpoint on both sides."""

    def __init__(self, folder: Path, case: str) -> None:
        source_of, recipe, shard = CASES[case]
        self.source = source_of(folder / "source")
        exported = export(
            core_of(self.source, recipe), AscendWriter(), folder / "served", shard_bytes=shard
        )
        self.folder = exported.folder
        self.training: QuantizedModel = trained(self.source, recipe)
        self.served: Served = serve(self.folder)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("contract"), request.param)


def test_the_folder_is_taken_for_ascend_and_fills_every_parameter(pair: Pair) -> None:
    assert validate(pair.folder) == []
    assert pair.served.config.model_config.quantization == "ascend"
    assert poisoned(pair.served) == []


def test_every_quantised_linear_gets_the_scheme_and_every_other_one_none(pair: Pair) -> None:
    schemes = {
        path: type(module.quant_method.quant_method).__name__
        for path, module in pair.served.model.named_modules()
        if hasattr(getattr(module, "quant_method", None), "quant_method")
    }
    wanted = {engine_module(path)[0] for path in pair.training.layers}
    assert schemes == dict.fromkeys(wanted, "AscendW4A4MXFP4DynamicLinearMethod")


def test_every_byte_of_a_linear_lies_where_the_operator_reads_it(pair: Pair) -> None:
    stored = {k: v for f in pair.folder.glob("*.safetensors") for k, v in load_file(f).items()}
    for path in pair.training.layers:
        module_path, part = engine_module(path)
        module, sizes = pair.served.module(module_path), part_sizes(pair.training.model, path)
        # The engine keeps transposed views: [K/2, N] and [K/64, N, 2].
        weight = module.weight.t().split(sizes)[part]
        scale = module.weight_scale.transpose(0, 1).flatten(1).split(sizes)[part]
        assert torch.equal(weight, stored[f"{path}.weight"])
        assert torch.equal(scale, stored[f"{path}.weight_scale"])


def test_every_linear_computes_what_it_computed_in_training(pair: Pair) -> None:
    model = pair.training.model
    calls = recorded(model, list(pair.training.layers), TOKENS)
    for path, layer in pair.training.layers.items():
        module_path, part = engine_module(path)
        x = torch.cat([calls[path].x, difficult(8, layer.in_features)])
        with torch.no_grad():
            y = layer(x)
        assert torch.equal(y[: len(TOKENS)], calls[path].y)
        served = pair.served.linear(module_path, x).split(part_sizes(model, path), -1)[part]
        # As integers, so that the sign of zero counts.
        assert torch.equal(served.view(torch.int16), y.view(torch.int16)), path


def test_the_16_bit_tensors_arrive_unchanged(pair: Pair) -> None:
    ours = dict(pair.training.model.named_parameters())
    served = dict(pair.served.model.named_parameters())
    norms = [name for name in ours if "norm" in name]
    assert len(norms) >= 3
    for name in norms:
        assert torch.equal(served[name], ours[name]), name
    vocabulary = pair.training.model.config.vocab_size
    embedding = pair.training.model.get_input_embeddings().weight
    head = pair.training.model.get_output_embeddings().weight
    assert torch.equal(pair.served.module("model.embed_tokens").weight[:vocabulary], embedding)
    assert torch.equal(pair.served.module("lm_head").weight[:vocabulary], head)


def test_the_model_differs_from_training_no_more_than_one_ulp_changes_it(pair: Pair) -> None:
    """Linears are the same bit for bit; norms and rotary embedding round elsewhere, and 4-bit
    codes amplify that. So the measure is what a last-bit change of the embeddings does."""
    model = pair.training.model
    reference = logits(model, TOKENS)

    def distance(other: torch.Tensor) -> float:
        return float((other - reference).norm() / reference.norm())

    def last_bit(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
        step = torch.randint(-1, 2, out.shape, dtype=torch.int16) * (out != 0)
        return (out.view(torch.int16) + step).view(torch.bfloat16)

    floor = []
    for seed in range(6):
        torch.manual_seed(seed)
        handle = model.get_input_embeddings().register_forward_hook(last_bit)
        floor.append(distance(logits(model, TOKENS)))
        handle.remove()
    found = distance(pair.served.logits(TOKENS)[:, : reference.shape[1]])
    print(f"\nserved {found:.4f}, one ulp {min(floor):.4f} to {max(floor):.4f}")
    assert found <= 1.5 * max(floor)
