"""The statistics of the model level, and the noise that they are judged by."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from npu_qat.config import Recipe
from npu_qat.layers import prepare_model
from npu_qat.parity.observe import (
    Differences,
    NoiseFloor,
    Observed,
    bucketed_kl,
    compare,
    greedy_difference,
    measure_noise,
    observe,
    one_ulp,
    perturbed,
)
from tests.training.tiny import tiny_model

ROWS = [[5, 9, 11, 40, 3], [7, 8], [20, 21, 22, 23, 24, 25, 26, 27]]


def seen(logp: list[float], best: list[int], top: list[list[float]]) -> Observed:
    ids = torch.arange(len(top[0])).expand(len(top), -1).int()
    return Observed(torch.tensor(logp), torch.tensor(best), ids, torch.tensor(top).log())


def test_statistics_by_hand() -> None:
    a = seen([-1.0, -2.0], [0, 1], [[0.5, 0.25], [0.5, 0.25]])
    b = seen([-1.5, -2.0], [0, 2], [[0.25, 0.5], [0.5, 0.25]])
    found = compare([a], [b], ([[1, 2, 3, 4]], [[1, 2, 9, 4]]))
    assert found.logp_mean == 0.25 and found.top1 == 0.5 and found.greedy == 0.5
    assert found.perplexity == pytest.approx(math.exp(0.25) - 1)
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)  # the rest, 0.25, is equal
    assert found.kl_mean == pytest.approx(kl / 2)


def test_bucketed_divergence_is_the_full_one_if_all_tokens_are_kept() -> None:
    p, q = torch.randn(2, 4, 9, dtype=torch.float64).log_softmax(-1)
    full = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(bucketed_kl(p, q), full)
    assert (bucketed_kl(p[:, :3], q[:, :3]) <= full + 1e-12).all()


@pytest.mark.parametrize(
    ("a", "b", "share"),
    [
        ([[1, 2, 3]], [[1, 2, 3]], 0.0),
        ([[1, 2, 3, 4]], [[9, 2, 3, 4]], 1.0),
        ([[1, 2], [3, 4]], [[1, 2], [3, 5]], 0.25),
        ([[1, 2, 3, 4]], [[1, 2]], 0.5),
        ([[1, 2]], [[1, 2, 3]], 0.0),
    ],
)
def test_greedy_tokens_count_until_the_first_difference(
    a: list[list[int]], b: list[list[int]], share: float
) -> None:
    assert greedy_difference(a, b) == share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_ulp_is_one_neighbour(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -3.5, 0.0, 2.0, float("inf"), 1e-3] * 100, dtype=dtype)
    moved = one_ulp(x, torch.Generator().manual_seed(0))
    neighbours = [torch.nextafter(x, torch.full_like(x, end)) for end in (-math.inf, math.inf)]
    assert ((moved == x) | (moved == neighbours[0]) | (moved == neighbours[1])).all()
    still = (x == 0) | x.isinf()
    assert (moved[still] == x[still]).all()
    share = (moved != x)[~still].float().mean()
    assert 0.55 < share < 0.8


def test_perturbation_moves_the_model_by_seed_and_leaves_no_trace() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    prepare_model(model, Recipe())
    ids = torch.tensor([ROWS[2]])
    with torch.no_grad():
        before = model(ids).logits
        moved = []
        for seed in (0, 1, 0):
            with perturbed(model, seed):
                moved.append(model(ids).logits)
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(moved[0], moved[2])
    assert not torch.equal(moved[0], before) and not torch.equal(moved[0], moved[1])


def test_a_model_without_decoder_layers_has_no_measurable_noise() -> None:
    with pytest.raises(ValueError, match="no decoder layers"), perturbed(torch.nn.Linear(1, 1), 0):
        pass


def test_rows_are_observed_alike_in_any_batch() -> None:
    model = tiny_model()
    one = observe(model, ROWS, batch_size=1, pad_id=0)
    all_ = observe(model, ROWS, batch_size=3, pad_id=0, tops=[o.top_ids for o in one])
    for row, a, b in zip(ROWS, one, all_, strict=True):
        assert len(a.logp) == len(row) - 1
        torch.testing.assert_close(a.logp, b.logp, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.top_logp, b.top_logp, atol=1e-4, rtol=1e-4)
    logits = model(torch.tensor([ROWS[0]])).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(one[0].logp, logits[range(4), ROWS[0][1:]], atol=1e-4, rtol=1e-4)


def test_nan_is_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        observe(model, ROWS, batch_size=2, pad_id=0)


def test_the_floor_is_the_largest_and_limits_stand_above_it() -> None:
    floor = NoiseFloor(
        {"a": Differences(logp_mean=0.2, top1=0.1), "b": Differences(logp_mean=0.1, top1=0.3)},
        positions=100,
        generated=10,
    )
    assert floor.floor == Differences(logp_mean=0.2, top1=0.3)
    limits = floor.limits()
    assert limits["logp_mean"] == pytest.approx(0.3)
    assert limits["top1"] == pytest.approx(0.45 + 0.03)
    assert limits["greedy"] == pytest.approx(0.3)


def test_the_floor_has_a_variant_for_each_recomposition_and_seed() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    prepare_model(model, Recipe())
    reference = observe(model, ROWS, batch_size=3, pad_id=0)
    noise = measure_noise(
        model,
        ROWS,
        reference,
        [[1], [2], [3]],
        seeds=2,
        batch_size=3,
        pad_id=0,
        decode=lambda model, size: [[1], [2], [3]],
    )
    names = ["each row alone", "other batches", "1 ulp, seed 0", "1 ulp, seed 1"]
    assert list(noise.variants) == names and noise.positions == 12
    assert len(noise.example) == 12
    assert asdict(noise.variants["1 ulp, seed 0"])["logp_mean"] > 0
