"""What may be pushed into a loaded engine: norms may, 4-bit linears may not.

An engine for rollouts is loaded once. Reinforcement learning usually pushes new weights into it by
the model's ``load_weights``; with packed linears that goes wrong, in one case without an error,
since they are transposed after loading and nothing transposes them back.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.contract_vllm.stack import Served, serve
from tests.contract_vllm.training_side import difficult
from tests.deploy.models import export_tiny

GATE = "model.layers.0.mlp.gate_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # down_proj is [64, 128]: packed it is square, so that its transpose has its shape.
    return export_tiny(tmp_path, intermediate_size=128).folder


@pytest.fixture
def served(folder: Path) -> Served:
    return serve(folder)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def test_noised_norms_arrive_exactly_and_go_again(served: Served, folder: Path) -> None:
    tokens = [5, 17, 80, 3, 41]
    clean = served.logits(tokens)
    norms = {name: w for name, w in stored(folder).items() if "norm" in name}
    noisy = {name: w + torch.randn_like(w) * 0.05 for name, w in norms.items()}
    served.model.load_weights(noisy.items())
    parameters = dict(served.model.named_parameters())
    assert all(torch.equal(parameters[name], w) for name, w in noisy.items())
    assert not torch.equal(served.logits(tokens), clean)
    served.model.load_weights(norms.items())
    assert torch.equal(served.logits(tokens), clean)


def test_a_16_bit_weight_is_refused(served: Served) -> None:
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        served.model.load_weights([(f"{GATE}.weight", torch.randn(128, 64).bfloat16())])


@pytest.mark.parametrize("name", [f"{O_PROJ}.weight", f"{O_PROJ}.weight_scale"])
def test_a_packed_weight_or_scale_of_another_shape_is_refused(
    served: Served, folder: Path, name: str
) -> None:
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        served.model.load_weights([(name, stored(folder)[name])])


def test_a_packed_square_weight_is_taken_and_transposed(served: Served, folder: Path) -> None:
    x = difficult(8, 128)
    right = served.linear(DOWN, x)
    served.model.load_weights([(f"{DOWN}.weight", stored(folder)[f"{DOWN}.weight"])])
    assert not torch.equal(served.linear(DOWN, x), right)
