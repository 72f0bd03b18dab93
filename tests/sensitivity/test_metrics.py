"""Errors of tensors: by row, robust against a few huge values, and honest about the rest."""

from __future__ import annotations

import pytest
import torch

from npu_qat.numerics import fake_quant, quantize
from npu_qat.sensitivity.metrics import (
    EXACT_DB,
    QuantizationErrors,
    QuantizationSummary,
    RowErrors,
    decibel,
)


def gaussian(rows: int = 64, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def measured(x: torch.Tensor, profile: str = "ocp") -> QuantizationSummary:
    errors = QuantizationErrors()
    errors.add(x, quantize(x, profile))
    return errors.summary()


def test_gaussian_numbers_have_the_known_error() -> None:
    """18.9 dB is what MXFP4 with the floor rule leaves of a Gaussian tensor."""
    found = measured(gaussian(256, 1024))
    assert found.sqnr_db["p50"] == pytest.approx(18.9, abs=0.15)
    assert found.sqnr_db_pooled == pytest.approx(18.9, abs=0.1)
    assert found.relative_error == pytest.approx(10 ** (-found.sqnr_db["p50"] / 20))
    assert 0.99 < found.cosine["p50"] < 1.0


def test_each_number_is_what_its_definition_says() -> None:
    x = gaussian(8, 64)
    image = fake_quant(x, "ocp")
    found = measured(x)
    by_row = 10 * (x.square().sum(-1) / (x - image).square().sum(-1)).log10()
    assert found.sqnr_db["p05"] == pytest.approx(float(by_row.quantile(0.05)), abs=1e-4)
    assert found.sqnr_db["p50"] == pytest.approx(float(by_row.median()), abs=0.3)
    cosine = torch.cosine_similarity(x, image, dim=-1)
    assert found.cosine["p95"] == pytest.approx(float(cosine.quantile(0.95)), abs=1e-5)
    dead = (x != 0) & (image == 0)
    assert found.dead_zone == pytest.approx(float(dead.float().mean()))
    assert found.dead_zone_energy == pytest.approx(float(x[dead].square().sum() / x.square().sum()))
    relative = ((x - image).abs() / x.abs()).mean()
    assert found.relative_error_elementwise == pytest.approx(float(relative), rel=1e-5)


def test_saturation_counts_what_no_code_can_reach() -> None:
    """With the floor rule a block of amax 7 has the scale 1, and its largest number is 6."""
    x = torch.full((1, 32), 1.0)
    x[0, :4] = torch.tensor([7.0, -6.5, 6.0, 5.4])
    assert measured(x).saturation == pytest.approx(2 / 32)
    assert measured(torch.full((1, 32), 4.0)).saturation == 0.0


def test_zeros_are_neither_dead_nor_wrong() -> None:
    x = gaussian()
    before = measured(x)
    x[:, ::2] = 0.0
    after = measured(x)
    assert after.dead_zone < 1.5 * before.dead_zone
    assert after.relative_error_elementwise < 1.5 * before.relative_error_elementwise


def test_a_massive_token_decides_the_pooled_number_and_not_the_quantiles() -> None:
    x = gaussian()
    plain = measured(x)
    x[3] = 0.0
    x[3, 0] = 4096.0  # exact in 4 bits, and all of the energy
    massive = measured(x)
    assert massive.largest_row_energy > 0.99
    assert massive.sqnr_db_pooled > plain.sqnr_db_pooled + 20
    assert massive.sqnr_db["p50"] == pytest.approx(plain.sqnr_db["p50"], abs=0.1)


def test_the_elementwise_error_is_marked_where_it_counts_dead_elements() -> None:
    """One large channel kills its block's small ones: they hold nothing and count as 100 %."""
    x = gaussian(64, 64)
    assert not measured(x).relative_error_misleading
    x[:, ::32] *= 512
    found = measured(x)
    assert found.dead_zone > 0.8 and found.dead_zone_energy < 0.05
    assert found.relative_error_misleading


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["exact", "approximate"])
def test_nan_and_inf_are_an_error_and_no_row_that_is_left_out(wrong: float, place: str) -> None:
    x, y = gaussian(4, 8), gaussian(4, 8, seed=1)
    (x if place == "exact" else y)[2, 3] = wrong
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 4 rows"):
        RowErrors().add(x, y)


def test_outlier_channels_are_named() -> None:
    x = gaussian(64, 128)
    assert measured(x).outlier_channels == []
    x[:, 46] *= 16
    x[:, 7] *= 12
    found = measured(x).outlier_channels
    assert [outlier.channel for outlier in found] == [46, 7]
    assert found[0].ratio == pytest.approx(16, rel=0.3)


def test_texts_may_come_in_pieces() -> None:
    x = gaussian(30, 64)
    whole, pieces = measured(x), QuantizationErrors()
    for part in x.split(7):
        pieces.add(part, quantize(part, "ocp"))
    found = pieces.summary()
    assert found.sqnr_db == whole.sqnr_db
    assert found.dead_zone == whole.dead_zone
    assert found.sqnr_db_pooled == pytest.approx(whole.sqnr_db_pooled)


def test_what_is_kept_does_not_grow_with_the_width() -> None:
    errors = RowErrors()
    errors.add(gaussian(10, 4096), gaussian(10, 4096, seed=1))
    kept = [t for value in vars(errors).values() if isinstance(value, list) for t in value]
    assert sum(t.numel() for t in kept) == 20  # two numbers a row


def test_exact_and_empty_rows() -> None:
    x = torch.zeros(3, 32)
    x[0, 0] = 4.0
    found = measured(x)
    assert found.rows == 1 and found.sqnr_db["p50"] == found.sqnr_db_pooled == EXACT_DB
    with pytest.raises(ValueError, match="every row is zero"):
        measured(torch.zeros(2, 32))
    assert decibel(0.0, 1.0) == 0.0
