"""Scores to multipliers: the five strategies, and what they cannot do."""

from __future__ import annotations

import pytest

from npu_qat.config import LayerSigma, Recipe, load_config
from npu_qat.noise import LayerMultipliers
from npu_qat.sensitivity import guide, layer_scores, layer_sigma_config, scan, spread
from npu_qat.sensitivity.guidance import SCORES, STRATEGIES, target_layers, worst_zone
from tests.sensitivity.models import texts, tiny

SCORES_OF = {0: 1.0, 1: 2.0, 2: 4.0, 3: 3.0, 4: 1.0, 5: 1.0}  # mean 2


def multipliers(section: LayerSigma, step: int = 0) -> list[float]:
    table = LayerMultipliers(section, SCORES_OF)
    return [table.multiplier(layer, step, 10) for layer in SCORES_OF]


def test_targeted_is_the_worst_third_and_nothing_else() -> None:
    section = guide(SCORES_OF, "targeted")
    assert multipliers(section) == [0, 0, 1, 1, 0, 0]
    assert section.default_multiplier == 0.0
    assert len(target_layers(dict.fromkeys(range(28), 1.0))) == 10  # as the plan's 6 to 15
    assert target_layers({0: 1.0}) == [0]


def test_variable_is_in_proportion_and_inverse_against_it() -> None:
    assert multipliers(guide(SCORES_OF, "variable")) == [0.5, 1.0, 2.0, 1.5, 0.5, 0.5]
    assert multipliers(guide(SCORES_OF, "inverse")) == [1.5, 1.0, 0.0, 0.5, 1.5, 1.5]
    assert max(multipliers(guide(SCORES_OF, "ceiling"))) == 1.0
    assert min(multipliers(guide({0: 1.0, 1: 9.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}, "inverse"))) == 0


def test_the_published_multipliers_follow_from_the_published_errors() -> None:
    """E13j of the documents: 42.65 over a mean of 36.4 is 1.17 for layer 15, 0.83 for layer 0."""
    errors = {0: 30.08, 1: 36.4 * 2 + 36.4 - 30.08 - 42.65, 2: 42.65}
    section = guide(errors, "variable")
    published = load_config(preset="e13j").noise.layers.layer_multipliers
    assert section.layer_multipliers[0] == pytest.approx(published[0], abs=0.005)
    assert section.layer_multipliers[2] == pytest.approx(published[15], abs=0.005)


def test_the_zone_is_the_run_of_bad_layers_and_quiet_late() -> None:
    section = guide(SCORES_OF, "zone")
    assert worst_zone(SCORES_OF) == (2, 3)
    assert multipliers(section, step=0) == [1] * 6
    assert multipliers(section, step=9) == [1, 1, 0.5, 0.5, 1, 1]
    assert worst_zone({0: 5.0, 1: 1.0, 2: 1.0}) == (0,)
    assert worst_zone(dict.fromkeys(range(4), 1.0))  # equal layers still have a zone


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_normalised_multipliers_have_mean_one(strategy: str) -> None:
    section = guide(SCORES_OF, strategy, normalize=True)
    for step in (0, 9):
        assert sum(multipliers(section, step)) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("scores", "strategy", "message"),
    [
        (SCORES_OF, "clever", "unknown strategy"),
        ({}, "variable", "none negative"),
        ({0: -1.0, 1: 2.0}, "variable", "none negative"),
        ({0: 0.0, 1: 0.0}, "targeted", "not all zero"),
    ],
)
def test_what_gives_no_guidance_is_an_error(
    scores: dict[int, float], strategy: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        guide(scores, strategy)


def test_scores_that_hardly_differ_are_said_to() -> None:
    assert "hardly differ" in spread({0: 1.0, 1: 1.02, 2: 0.97})
    assert "hardly differ" not in spread(SCORES_OF)
    assert "hardly differ" not in spread({0: 0.5, 1: 1.05, 2: 1.08, 3: 1.08})


def test_the_documents_block_has_their_keys() -> None:
    block = layer_sigma_config(guide(SCORES_OF, "zone"))
    assert block["enabled"] is True and block["zone_schedule"]["enabled"] is True
    assert block["zone_schedule"]["middle_layers"] == [2, 3]
    with pytest.raises(ValueError, match="cannot say"):
        layer_sigma_config(guide(SCORES_OF, "zone", normalize=True))


def test_every_score_is_a_number_a_layer() -> None:
    found = scan(tiny(), texts(), Recipe(), loss="layer")
    for score in SCORES:
        try:
            scores = layer_scores(found, score)
        except ValueError as error:  # a random model's loss may fall
            assert "no layer adds to the loss" in str(error)
            continue
        assert sorted(scores) == [0, 1] and min(scores.values()) >= 0


def test_scores_that_were_not_measured_are_an_error() -> None:
    weights = scan(tiny(), texts(2), Recipe(injection_point="weight"), loss="none")
    with pytest.raises(ValueError, match="needs a quantised input"):
        layer_scores(weights, "input")
    with pytest.raises(ValueError, match="needs a scan with loss"):
        layer_scores(weights, "loss")
    with pytest.raises(ValueError, match="unknown score"):
        layer_scores(weights, "luck")
