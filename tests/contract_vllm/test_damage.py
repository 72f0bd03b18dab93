"""Damage that the real loader accepts without a word, and that ``validate`` refuses.

Were the loader to notice one of these some day, its test here would fail, and the sentence in the
documentation that says otherwise could go.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from npu_qat.deploy.validate import validate
from tests.contract_vllm.stack import poisoned, serve
from tests.contract_vllm.training_side import difficult
from tests.deploy.models import damage, damage_json, export_tiny

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.0"
O_PROJ = f"{LAYER}.self_attn.o_proj"
K_SCALE = f"{LAYER}.self_attn.k_proj.weight_scale"
DESCRIPTION = "quant_model_description.json"


def to_dtype(name: str, convert: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = convert(tensors[name]).contiguous()

    return edit


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    return torch.exp2(scale.float() - 127)


MISSING = {
    "the scale of a linear": f"{O_PROJ}.weight_scale",
    "the scale of one part of a fused linear": K_SCALE,
    "the weight of a linear": f"{O_PROJ}.weight",
    "a norm": f"{LAYER}.input_layernorm.weight",
    "a bias": f"{LAYER}.self_attn.v_proj.bias",
}
O_SCALE = f"{O_PROJ}.weight_scale"
WRONG = {
    "scales as float8_e8m0fnu": to_dtype(O_SCALE, lambda s: s.view(torch.float8_e8m0fnu)),
    "scales as numbers": to_dtype(O_SCALE, scale_values),
    "scales without the bias of 127": to_dtype(O_SCALE, lambda s: (s.int() - 127).to(torch.int8)),
}
REFUSED: dict[str, tuple[Callable[[Path], None], type[Exception]]] = {
    "scales in pairs already": (
        lambda f: damage(f, to_dtype(O_SCALE, lambda s: s.reshape(len(s), -1, 2))),
        RuntimeError,
    ),
    "FLOAT in the description": (
        lambda f: damage_json(f, DESCRIPTION, lambda d: d.update({f"{O_PROJ}.weight": "FLOAT"})),
        RuntimeError,
    ),
    "mixed types in a fused linear": (
        lambda f: damage_json(
            f, DESCRIPTION, lambda d: d.update({f"{LAYER}.mlp.up_proj.weight": "FLOAT"})
        ),
        ValueError,
    ),
    "a linear that is not described": (
        lambda f: damage_json(f, DESCRIPTION, lambda d: d.pop(f"{O_PROJ}.weight")),
        KeyError,
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export_tiny(tmp_path).folder


@pytest.mark.parametrize("name", MISSING.values(), ids=MISSING)
def test_a_missing_tensor_is_served_as_what_the_memory_held(folder: Path, name: str) -> None:
    damage(folder, lambda tensors: tensors.pop(name))
    assert len(poisoned(serve(folder))) == 1
    assert name in {finding.tensor for finding in validate(folder)}


@pytest.mark.parametrize("edit", WRONG.values(), ids=WRONG)
def test_wrong_scales_are_served_as_other_weights(
    folder: Path, edit: Callable[[Tensors], None]
) -> None:
    x = difficult(8, 64)
    right = serve(folder).linear(O_PROJ, x)
    damage(folder, edit)
    served = serve(folder)
    assert poisoned(served) == []
    assert not torch.equal(served.linear(O_PROJ, x), right)
    assert O_SCALE in {finding.tensor for finding in validate(folder)}


def test_a_tensor_too_many_is_ignored(folder: Path) -> None:
    damage(folder, lambda t: t.update({f"{O_PROJ}.weight_offset": torch.zeros(64)}))
    assert poisoned(serve(folder)) == []
    assert f"{O_PROJ}.weight_offset" in {finding.tensor for finding in validate(folder)}


def test_an_altered_byte_is_served(folder: Path) -> None:
    right = serve(folder).linear(O_PROJ, difficult(8, 64))

    def flip(tensors: Tensors) -> None:
        tensors[f"{O_PROJ}.weight"][0, 0] ^= 0x11

    damage(folder, flip, reseal=False)
    assert not torch.equal(serve(folder).linear(O_PROJ, difficult(8, 64)), right)
    assert any("altered" in str(finding) for finding in validate(folder))


@pytest.mark.parametrize("harm, error", REFUSED.values(), ids=REFUSED)
def test_what_the_loader_refuses_is_refused_before_it(
    folder: Path, harm: Callable[[Path], None], error: type[Exception]
) -> None:
    harm(folder)
    with pytest.raises(error):
        serve(folder)
    assert validate(folder) != []


def test_without_a_description_value_for_the_group_size_32_is_taken(folder: Path) -> None:
    damage_json(folder, DESCRIPTION, lambda d: d.pop("group_size"))
    assert poisoned(serve(folder)) == []
    assert validate(folder) != []
