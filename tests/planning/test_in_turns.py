"""A model on the CPU is quantised onto a device without its 16-bit weights all being there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from npu_qat.bench.models import random_model
from npu_qat.config import Recipe
from npu_qat.layers import prepare as prepare_module
from npu_qat.layers import prepare_model
from tests.planning.models import small_architecture

CPU = torch.device("cpu")


def test_weights_go_to_the_device_group_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[nn.Linear] = []
    made: list[str] = []
    to, measured = nn.Linear.to, prepare_module.measure_weight

    def spied_to(self: nn.Linear, *args: object, **kwargs: object) -> nn.Linear:
        if type(self) is nn.Linear:
            moved.append(self)
            assert len(moved) - len(made) <= 3  # q, k and v
        return to(self, *args, **kwargs)

    def spied_measure(layer: object, weight: torch.Tensor) -> object:
        made.append("layer")
        return measured(layer, weight)

    monkeypatch.setattr(nn.Linear, "to", spied_to)
    monkeypatch.setattr(prepare_module, "measure_weight", spied_measure)
    model = random_model(small_architecture(), CPU)
    prepare_model(model, Recipe(base_storage="packed"), device=CPU)
    assert len(made) == 2 * 7 == len(moved)


def test_the_numbers_are_the_same_either_way() -> None:
    ids = torch.arange(12)[None]
    logits = []
    for device in (None, CPU):
        model = random_model(small_architecture(), CPU)
        prepare_model(model, Recipe(base_storage="packed"), device=device)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)
