"""How the error grows with depth, beside what the experiment plan predicted.

The plan expects the error of W4A4 to grow exponentially with depth (section 1.2), and tabulates it
(section 3.1) by groups of the 28 layers of Qwen2.5-1.5B: a constant error of weights, an error of
activations that grows and falls again, and their sum. Two different things are measured here:

* **local**: the error that a layer's own linears make on clean inputs; depth plays no part in it;
* **accumulated**: the distance of the hidden state behind each layer from the 16-bit model's when
  every linear up to it is quantised, ``|h_q - h| / |h|`` of the median token.

Whether the accumulated error grows like a line or like an exponential is answered by fitting both,
in the same units, and printing what each explains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PLAN_LAYERS = 28


@dataclass(frozen=True)
class PredictedGroup:
    """A row of the plan's table: layers of 28, and predicted relative errors as shares."""

    name: str
    first: int
    last: int
    weight: float
    activation: float
    total: float
    status: str


# The experiment plan, section 3.1, "Predicted Error Distribution".
PREDICTED = (
    PredictedGroup("L0-L5 (early)", 0, 5, 0.21, 0.15, 0.36, "moderate"),
    PredictedGroup("L6-L15 (middle)", 6, 15, 0.21, 0.25, 0.46, "error dense"),
    PredictedGroup("L16-L25 (deep)", 16, 25, 0.21, 0.30, 0.51, "high"),
    PredictedGroup("L26-L27 (output)", 26, 27, 0.21, 0.20, 0.41, "moderate"),
)


def predicted_group(layer: int, layers: int) -> PredictedGroup:
    """The plan's group of ``layer`` (from 0) in a model of ``layers``, by relative depth."""
    at = int((layer + 0.5) / layers * PLAN_LAYERS)
    return next(group for group in PREDICTED if group.first <= at <= group.last)


@dataclass(frozen=True)
class Growth:
    """Fits of the accumulated error over depth.

    ``line`` and ``exponential`` are the shares of the variance that each explains (R squared, both
    on the errors themselves), ``factor`` the growth of the exponential from layer to layer. None
    where there are fewer than ``MIN_LAYERS`` layers, or one without any error.
    """

    line: float | None
    exponential: float | None
    factor: float | None
    statement: str


MIN_LAYERS = 6
"""Fewer points cannot tell a line from an exponential."""


def fit_growth(errors: Sequence[float]) -> Growth:
    """Fit a line and an exponential to the accumulated ``errors`` by layer."""
    first, last = errors[0], errors[-1]
    span = (
        f"The accumulated error goes from {first:.1%} behind the first layer to {last:.1%} behind "
        f"the last of {len(errors)}."
    )
    if len(errors) < MIN_LAYERS:
        count = f"{len(errors)} layers are" if len(errors) > 1 else "1 layer is"
        reason = f"{count} too few to tell a line from an exponential."
        return Growth(None, None, None, f"{span} {reason}")
    if min(errors) <= 0.0:
        reason = "Where a layer has no error at all, no exponential can be fitted."
        return Growth(None, None, None, f"{span} {reason}")
    depth = [float(i) for i in range(len(errors))]
    a, b = _least_squares(depth, errors)
    c, d = _least_squares(depth, [math.log(e) for e in errors])
    line = _explained(errors, [a + b * i for i in depth])
    exponential = _explained(errors, [math.exp(c + d * i) for i in depth])
    better = "an exponential" if exponential > line else "a line"
    return Growth(
        line,
        exponential,
        math.exp(d),
        f"{span} A line explains {line:.0%} of its variance over depth, an exponential "
        f"{exponential:.0%} (factor {math.exp(d):.3f} a layer): {better} fits better.",
    )


def compare_with_plan(measured: Mapping[int, Mapping[str, float]]) -> list[dict[str, object]]:
    """The plan's table with what was measured beside it.

    Args:
        measured: layer -> ``{"weight", "activation", "accumulated"}``, shares.

    Returns:
        One row a group that the model has layers in; means over those layers.
    """
    rows: list[dict[str, object]] = []
    for group in PREDICTED:
        layers = [i for i in measured if predicted_group(i, len(measured)) is group]
        if not layers:
            continue
        mean = {
            key: sum(measured[i][key] for i in layers) / len(layers)
            for key in ("weight", "activation", "accumulated")
        }
        rows.append(
            {
                "group": group.name,
                "status": group.status,
                "layers": layers,
                "predicted": {
                    "weight": group.weight,
                    "activation": group.activation,
                    "total": group.total,
                },
                "measured": mean,
            }
        )
    return rows


def _least_squares(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )
    return my - slope * mx, slope


def _explained(y: Sequence[float], fitted: Sequence[float]) -> float:
    """R squared; 1 where ``y`` is constant and met."""
    mean = sum(y) / len(y)
    total = sum((v - mean) ** 2 for v in y)
    left = sum((v - f) ** 2 for v, f in zip(y, fitted, strict=True))
    return 1.0 - left / total if total > 0.0 else float(left == 0.0)
