"""Our adapter on the W4A4 base, through the engine's own LoRA manager and PunicaWrapperNPU.

``--max-lora-rank 128`` is what makes it run on an Ascend 950: below that, vllm-ascend 0.23 calls
kernels that its build for the A5 leaves out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from npu_qat.deploy import AscendWriter, check_adapter, read_adapter
from npu_qat.deploy.export import export
from npu_qat.layers import QuantizedModel
from npu_qat.layers.lora import load_lora
from tests.contract_vllm.stack import Served, serve
from tests.contract_vllm.training_side import (
    difficult,
    engine_module,
    logits,
    part_sizes,
    trained,
)
from tests.deploy.models import core_of, save, save_adapter

TOKENS = [5, 17, 80, 3, 41, 66, 12, 9, 90, 33]
RANK = 128


class Pair:
    """A base with an adapter on both sides."""

    def __init__(self, folder: Path) -> None:
        source = save(folder / "source")
        adapter = save_adapter(folder / "trained", size=0.2)
        exported = export(
            core_of(source), AscendWriter(), folder / "served", adapter=read_adapter(adapter)
        )
        self.folder, self.adapter = exported.folder, exported.folder / "adapter"
        check_adapter(self.folder, self.adapter)
        self.base: QuantizedModel = trained(source)
        self.peft = load_lora(trained(source).model, str(self.adapter)).eval()
        self.served: Served = serve(self.folder, max_lora_rank=RANK)

    @torch.no_grad()
    def both(self, path: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Output of one linear with adapter: base alone, training, engine; and the input of 4
        bits."""
        layer = self.base.layers[path]
        training = self.peft.get_submodule(f"base_model.model.{path}")(x)
        module_path, part = engine_module(path)
        self.served.use_adapter(self.adapter, len(x))
        served = self.served.linear(module_path, x)
        served = served.split(part_sizes(self.base.model, path), -1)[part]
        return layer(x), training, served, layer.quantized_input(x)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("lora"))


def test_every_linear_with_adapter_is_that_of_training_bit_for_bit(pair: Pair) -> None:
    """alpha / r is 2 here: where it is no power of two, the engine rounds ``alpha / r * B``."""
    for path, layer in pair.base.layers.items():
        base, training, served, _ = pair.both(path, difficult(16, layer.in_features))
        assert not torch.equal(training, base)
        assert torch.equal(served.view(torch.int16), training.view(torch.int16)), path


def test_the_adapter_reads_the_16_bit_input(pair: Pair) -> None:
    adapter = read_adapter(pair.adapter)
    for path, layer in pair.base.layers.items():
        x = difficult(16, layer.in_features)[5:]
        base, _, served, quantized = pair.both(path, x)
        added = (served - base[-len(x) :]).float()
        delta = adapter.delta(path)
        right = (added - x.float() @ delta.t()).norm()
        wrong = (added - quantized[-len(x) :].float() @ delta.t()).norm()
        assert right < 0.3 * wrong, path


def test_without_an_adapter_the_engine_computes_the_base(pair: Pair) -> None:
    plain = serve(pair.folder).logits(TOKENS)
    pair.served.use_adapter(pair.adapter, len(TOKENS))
    with_adapter = pair.served.logits(TOKENS)
    pair.served.use_adapter(None, len(TOKENS))
    assert torch.equal(pair.served.logits(TOKENS), plain)
    assert not torch.equal(with_adapter, plain)


def test_the_model_with_adapter_is_nearer_to_training_than_without(pair: Pair) -> None:
    reference = logits(pair.peft, TOKENS)
    distances = []
    for adapter in (pair.adapter, None):
        pair.served.use_adapter(adapter, len(TOKENS))
        found = pair.served.logits(TOKENS)[:, : reference.shape[1]]
        distances.append(float((found - reference).norm() / reference.norm()))
    print("\nwith, without:", distances)
    assert distances[0] < 0.4 * distances[1]


def test_the_default_rank_calls_kernels_that_the_a5_build_lacks(pair: Pair) -> None:
    """Were this to pass some day, ``--max-lora-rank 128`` would not be needed any more."""
    served = serve(pair.folder, max_lora_rank=16)
    served.use_adapter(pair.adapter, len(TOKENS))
    with pytest.raises(Exception, match="sgmv_shrink"):
        served.logits(TOKENS)
