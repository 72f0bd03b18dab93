"""Multipliers by layer, zone and phase."""

from __future__ import annotations

import pytest

from npu_qat.config import LayerSigma, ZoneSchedule
from npu_qat.noise.multipliers import LayerMultipliers


def at(config: LayerSigma, step: int = 0, total: int = 10, layers: int = 4) -> list[float]:
    table = LayerMultipliers(config, range(layers))
    return [table.multiplier(layer, step, total) for layer in range(layers)]


def test_disabled_is_uniform_even_with_a_table() -> None:
    config = LayerSigma(enabled=False, layer_multipliers={1: 9.0})
    assert at(config) == [1.0] * 4
    assert LayerMultipliers(config, range(4)).multiplier(None, 0, 10) == 1.0


def test_targeted_gives_noise_to_the_listed_layers_only() -> None:
    config = LayerSigma(default_multiplier=0.0, layer_multipliers={1: 1.5, 2: 1.0})
    assert at(config) == [0.0, 1.5, 1.0, 0.0]
    assert LayerMultipliers(config, range(4)).multiplier(None, 0, 10) == 0.0


def test_normalize_brings_the_mean_over_decoder_layers_to_one() -> None:
    config = LayerSigma(default_multiplier=2.0, layer_multipliers={0: 6.0}, normalize=True)
    assert at(config) == pytest.approx([2.0, 2 / 3, 2 / 3, 2 / 3])
    assert LayerMultipliers(config, range(4)).multiplier(None, 0, 10) == pytest.approx(2 / 3)


ZONES = ZoneSchedule(edge_layers=(0, 3), middle_layers=(1,), phase_boundary_ratio=0.5)


def test_zones_change_at_the_phase_boundary() -> None:
    config = LayerSigma(layer_multipliers={1: 1.2, 2: 3.0}, zone_schedule=ZONES)
    assert at(config, step=4) == pytest.approx([1.0, 1.2, 3.0, 1.0])
    assert at(config, step=5) == pytest.approx([1.0, 0.6, 3.0, 1.0])


def test_normalize_holds_in_every_phase() -> None:
    config = LayerSigma(zone_schedule=ZONES, normalize=True)
    for step in (0, 9):
        assert sum(at(config, step=step)) == pytest.approx(4.0)
    assert at(config, step=9)[1] == pytest.approx(0.5 / 0.875)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LayerSigma(layer_multipliers={4: 1.0}), r"layer_multipliers names layers \[4\].*0 to 3"),
        (
            LayerSigma(zone_schedule=ZoneSchedule(edge_layers=(0,), middle_layers=(9,))),
            r"middle_layers names layers \[9\]",
        ),
        (
            LayerSigma(zone_schedule=ZoneSchedule(edge_layers=(0, 1), middle_layers=(1,))),
            r"layers \[1\] are in edge_layers and in middle_layers",
        ),
        (LayerSigma(default_multiplier=0.0), "every multiplier is 0"),
    ],
)
def test_what_the_model_cannot_do_is_an_error(config: LayerSigma, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerMultipliers(config, range(4))


def test_normalizing_zeros_is_an_error() -> None:
    zones = ZoneSchedule(edge_layers=(0, 1, 2, 3), middle_layers=(), late_edge_multiplier=0.0)
    with pytest.raises(ValueError, match="step 9 the multipliers of all layers are 0"):
        at(LayerSigma(zone_schedule=zones, normalize=True), step=9)
