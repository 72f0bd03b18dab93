"""From a scan to the noise of each layer: five ways of turning errors into multipliers.

With ``err_l`` the score of decoder layer ``l`` and ``v_l = err_l / mean(err)``:

========  ======================================================  ==========================
strategy  multiplier                                              its origin
========  ======================================================  ==========================
targeted  1 for the layers with the largest scores, 0 elsewhere   the plan's E13c, "RIN-targeted"
variable  ``v_l``: more noise where the error is larger           "RIN-variable" (E13l)
inverse   ``2 - v_l``: less noise where the error is larger       E13m
ceiling   ``inverse / max(inverse)``: never above uniform noise   E13n
zone      uniform; from half of the run on, half as much in the   E14a
          contiguous zone of the largest scores
========  ======================================================  ==========================

Each is a ``noise.layers`` section. ``normalize`` divides by the mean over layers, so that guidance
moves noise between layers and adds none. Without it *targeted* has less noise in total than uniform
noise and *ceiling* always has; then a comparison with uniform noise compares amounts, too.

The zone is the run of neighbouring layers with the largest sum of ``err_l - mean(err)`` (the
maximum subarray): long enough to hold the bad layers, no longer.

Nothing here says that guided noise helps; the published runs never applied any. And where the
scores hardly differ, neither do the multipliers: ``spread`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from npu_qat.config import LayerSigma, Recipe, ZoneSchedule
from npu_qat.sensitivity.scanner import Scan

STRATEGIES = ("targeted", "variable", "inverse", "ceiling", "zone")
SCORES = ("output", "input", "weight", "loss", "leave_one_out", "elementwise")

TARGET_SHARE = 0.35
"""Share of the layers that *targeted* chooses: 10 of 28, as the plan does."""

FLAT_BELOW = 0.1
"""Scores that all lie within this share of their mean cannot guide anything."""

_DIGITS = 4


def check_score(score: str, recipe: Recipe, loss: str) -> None:
    """Raise ``ValueError`` if a scan of ``recipe`` with this ``loss`` will not have ``score``.

    To be asked before a scan, which may take long.
    """
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; choose {', '.join(SCORES)}")
    if score in ("loss", "leave_one_out") and loss == "none":
        raise ValueError(f"score {score!r} needs a scan with loss 'layer' or 'linear'")
    measured = {
        "input": recipe.quantizes_input,
        "weight": recipe.quantizes_weight,
        "elementwise": recipe.quantizes_input or recipe.quantizes_output,
    }
    if not measured.get(score, True):
        raise ValueError(
            f"score {score!r} needs a quantised {'input' if score != 'weight' else score}, "
            f"which injection_point {recipe.injection_point!r} has not; use 'output'"
        )


def layer_scores(scan: Scan, score: str = "output") -> dict[int, float]:
    """The score of each decoder layer, larger for worse; never negative.

    Args:
        scan: a finished scan.
        score: ``output``, ``input`` or ``weight``: the relative error of the median token (or
            row), mean over the layer's linears. ``loss`` or ``leave_one_out``: what the layer as a
            whole adds to the loss, 0 where that is negative. ``elementwise``: the published
            ``mean(|e| / |x|)`` of inputs, which misleads.

    Raises:
        ValueError: an unknown score, or one that this scan did not measure.
    """
    check_score(score, Recipe.model_validate(scan.recipe), "none" if scan.loss is None else "layer")
    if score in ("loss", "leave_one_out"):
        return _loss_scores(scan, score)
    scores = {}
    for index in scan.layers:
        values = []
        for linear in (s for s in scan.linears if s.layer == index):
            if score == "elementwise":
                tensor = linear.input or linear.output_rounding
                values += [tensor.relative_error_elementwise] if tensor else []
            else:
                summary = getattr(linear, score)
                values += [summary.relative_error] if summary else []
        scores[index] = sum(values) / len(values)
    return scores


def _loss_scores(scan: Scan, score: str) -> dict[int, float]:
    assert scan.loss is not None
    name = "one_at_a_time" if score == "loss" else score
    scores = {i: max(getattr(c, name).mean, 0.0) for i, c in scan.loss.layers.items()}
    if not any(scores.values()):
        raise ValueError(
            f"score {score!r}: no layer adds to the loss on these texts; use 'output', "
            "or more texts"
        )
    return scores


def guide(scores: Mapping[int, float], strategy: str, *, normalize: bool = False) -> LayerSigma:
    """The ``noise.layers`` section of ``strategy`` for decoder layers with these ``scores``.

    Raises:
        ValueError: an unknown strategy, or scores that are negative or all zero.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; choose {', '.join(STRATEGIES)}")
    if not scores or min(scores.values()) < 0.0 or max(scores.values()) == 0.0:
        raise ValueError("guidance needs a score for each layer, none negative and not all zero")
    if strategy == "targeted":
        chosen = target_layers(scores)
        return LayerSigma(
            default_multiplier=0.0,
            layer_multipliers=dict.fromkeys(chosen, 1.0),
            normalize=normalize,
        )
    if strategy == "zone":
        zone = worst_zone(scores)
        edge = tuple(i for i in sorted(scores) if i not in zone)
        return LayerSigma(
            normalize=normalize,
            zone_schedule=ZoneSchedule(edge_layers=edge, middle_layers=zone),
        )
    mean = sum(scores.values()) / len(scores)
    multipliers = {layer: score / mean for layer, score in sorted(scores.items())}
    if strategy != "variable":
        # A layer more than twice as bad as the mean has no noise rather than a negative one.
        multipliers = {layer: max(2.0 - m, 0.0) for layer, m in multipliers.items()}
    if strategy == "ceiling":
        top = max(multipliers.values())
        multipliers = {layer: m / top for layer, m in multipliers.items()}
    rounded = {layer: round(m, _DIGITS) for layer, m in multipliers.items()}
    return LayerSigma(layer_multipliers=rounded, normalize=normalize)


def target_layers(scores: Mapping[int, float]) -> list[int]:
    """The ``TARGET_SHARE`` of layers with the largest scores, at least one; ties to the lower."""
    count = max(1, int(TARGET_SHARE * len(scores) + 0.5))
    return sorted(sorted(scores, key=lambda layer: (-scores[layer], layer))[:count])


def worst_zone(scores: Mapping[int, float]) -> tuple[int, ...]:
    """The neighbouring layers with the largest sum of ``score - mean``; the first of equals."""
    layers = sorted(scores)
    mean = sum(scores.values()) / len(scores)
    best: tuple[int, ...] = ()
    best_sum, start, total = float("-inf"), 0, 0.0
    for end, layer in enumerate(layers):
        if total <= 0.0:
            start, total = end, 0.0
        total += scores[layer] - mean
        if total > best_sum:
            best, best_sum = tuple(layers[start : end + 1]), total
    return best


def spread(scores: Mapping[int, float]) -> str:
    """One sentence on how much the layers differ, and whether there is anything to guide by."""
    mean = sum(scores.values()) / len(scores)
    worst = max(scores, key=scores.__getitem__)
    ratio = scores[worst] / mean
    text = f"The worst layer, {worst}, has {ratio:.2f} times the mean score."
    moved = max(abs(score / mean - 1.0) for score in scores.values())
    if moved < FLAT_BELOW:
        return (
            f"{text} The layers hardly differ, so there is little to guide by: the variable "
            f"strategy changes the noise of a layer by {moved:.0%} at most, and targeted chooses "
            "by small differences."
        )
    return text


def layer_sigma_config(layers: LayerSigma) -> dict[str, object]:
    """``layers`` in the keys of the design documents' ``layer_sigma_config``.

    That block knows no ``normalize``, so a normalised table is written divided by its mean; a zone
    schedule, whose mean changes in time, cannot be.

    Raises:
        ValueError: a normalised zone schedule.
    """
    if layers.normalize and layers.zone_schedule is not None:
        raise ValueError("layer_sigma_config cannot say a normalised zone_schedule")
    block: dict[str, object] = {
        "enabled": layers.enabled,
        "default_multiplier": layers.default_multiplier,
        "layer_multipliers": dict(layers.layer_multipliers),
    }
    if layers.zone_schedule is not None:
        block["zone_schedule"] = {"enabled": True, **layers.zone_schedule.model_dump(mode="json")}
    return block
