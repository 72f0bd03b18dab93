"""The block rotation: what it computes, that it changes nothing but rounding, and what it wins."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from npu_qat.config import Recipe
from npu_qat.layers import AuditError, prepare_model
from npu_qat.layers import rotation as module
from npu_qat.layers.rotation import rotate_blocks, rotate_input, rotate_weight
from npu_qat.numerics import fake_quant


def sylvester() -> torch.Tensor:
    h = torch.ones(1, 1)
    for _ in range(5):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


class Block(nn.Module):
    """Two siblings that read one input, and one that reads their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 32)
        self.k_proj = nn.Linear(64, 32, bias=False)
        self.o_proj = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x) + self.k_proj(x)))


def block() -> Block:
    torch.manual_seed(0)
    return Block()


def outliers() -> torch.Tensor:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 16
    return x


def test_it_is_the_hadamard_matrix_on_each_block() -> None:
    x = torch.randn(3, 2, 96)
    expected = torch.cat([part @ sylvester() for part in x.split(32, -1)], -1)
    torch.testing.assert_close(rotate_blocks(x, 1.0), expected)


def test_a_rotated_product_is_the_product() -> None:
    x, w = torch.randn(9, 64), torch.randn(7, 64)
    torch.testing.assert_close(F.linear(rotate_input(x), rotate_weight(w)), F.linear(x, w))


def test_its_gradient_is_that_of_the_matrix() -> None:
    x = torch.randn(4, 32, dtype=torch.float32, requires_grad=True)
    g = torch.randn(4, 32)
    rotate_input(x).backward(g)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g @ sylvester().T / 4)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(rotate_input(x)[7:9], rotate_input(x[7:9]))


def test_an_input_that_is_no_multiple_of_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        rotate_input(torch.randn(2, 48))


@pytest.mark.parametrize("profile", ["ascend950", "nvfp4"])
@pytest.mark.parametrize("point", ["both", "input", "weight"])
def test_a_rotated_model_passes_the_audit(profile: str, point: str) -> None:
    recipe = Recipe(
        rotation="hadamard32",
        injection_point=point,
        weight_profile=profile,
        activation_profile=profile,
    )
    model, x = block().bfloat16(), outliers().bfloat16()
    handle = prepare_model(model, recipe)
    if handle.needs_calibration:
        handle.calibrate(lambda m: m(x))
    model(x)
    handle.audit.verify(model)
    calls = handle.layers["q_proj"].calls
    assert calls.quantized["evaluation"] == 1


def test_it_wins_on_heavy_tails() -> None:
    """Student's t with 3 degrees of freedom: 17.0 dB as it is, 18.9 dB rotated (large samples)."""
    normal = torch.randn(4, 512, 64, generator=torch.Generator().manual_seed(2))
    x = normal[0] / normal[1:].square().mean(0).sqrt()
    rotated = rotate_input(x)
    plain = fake_quant(x, "ocp") - x
    turned = fake_quant(rotated, "ocp") - rotated
    decibel = [-20 * torch.log10(e.norm() / t.norm()) for e, t in ((plain, x), (turned, rotated))]
    assert decibel[1] - decibel[0] > 1.0


def test_siblings_rotate_their_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = module.rotate_blocks

    def counted(x: torch.Tensor, factor: float) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return real(x, factor)

    model = block()
    handle = prepare_model(model, Recipe(rotation="hadamard32"))
    handle._state.observer = None
    monkeypatch.setattr(module, "rotate_blocks", counted)
    model(outliers())
    assert calls == [(40, 64), (40, 32)]


def test_the_audit_finds_an_input_that_was_not_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_qat.layers import quant_linear

    model = block()
    handle = prepare_model(model, Recipe(rotation="hadamard32"))
    monkeypatch.setattr(quant_linear, "rotate_input", lambda x: x.clone())
    model(outliers())
    with pytest.raises(AuditError, match="quantised tensors equal"):
        handle.audit.verify(model)


def test_lora_on_the_quantised_input_is_refused() -> None:
    with pytest.raises(ValueError, match="rotated channels"):
        Recipe(rotation="hadamard32", lora_input="quantised")
