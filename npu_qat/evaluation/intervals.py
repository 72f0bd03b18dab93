"""Confidence intervals for accuracies, for their differences, and over seeds.

An accuracy is a share of ``n`` problems solved. Three questions need three intervals:

**How good is one model?** (`proportion`) Wilson's score interval: all true rates ``p`` that lie
within ``z`` standard errors of the observed one, ``|p_hat - p| <= z sqrt(p (1-p) / n)``. Unlike
``p_hat +- z sqrt(p_hat (1-p_hat) / n)`` it stays inside 0..1 and does not shrink to nothing at 0
or n successes. Wilson 1927; Newcombe, Stat. Med. 17:857-872 (1998), method 3.

**Is one model better than another?** (`paired_difference`) Both answered the *same* problems, and
hard problems are hard for both. The outcomes are correlated, and two separate intervals overstate
the noise of the difference. Newcombe's square-and-add interval for paired data (Stat. Med.
17:2635-2650 (1998), method 10) combines the distances from both rates to their Wilson limits::

    low  = d - sqrt(dl_a^2 - 2 phi dl_a du_b + du_b^2)      d = p_a - p_b
    high = d + sqrt(du_a^2 - 2 phi du_a dl_b + dl_b^2)

``phi`` is the correlation of the two 0/1 outcomes, with a continuity correction when positive. A
bootstrap over problems gives nearly the same at n = 1000, but not the same twice, and nothing
useful when no outcome differs.

**Does it hold beyond this seed?** (`across_seeds`) The two above hold training fixed. Over
repeated trainings the mean has Student's t interval, ``m +- t s / sqrt(k)``; with 3 seeds ``t`` is
4.3, and that is not a defect of the formula.

Rates are shares (0.62, not 62). Pure Python: the normal quantile is in the standard library, and
the t distribution has a finite series for whole degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

PAIRED_METHOD = "Newcombe 1998, method 10 (paired)"


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; ``n`` problems (`proportion`) or seeds (`across_seeds`)."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """``mean``: the rate of a minus the rate of b, on the same ``n`` problems, with its interval.

    ``only_a`` and ``only_b`` count the problems that one solved and the other did not.
    """

    mean: float
    low: float
    high: float
    n: int
    only_a: int
    only_b: int
    method: str = PAIRED_METHOD

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0.0 or self.high < 0.0


def proportion(outcomes: Sequence[bool], confidence: float = 0.95) -> Estimate:
    """Share of true ``outcomes`` with Wilson's interval.

    Raises ``ValueError`` if there are no outcomes or ``confidence`` is not between 0 and 1.
    """
    n = len(outcomes)
    if n == 0:
        raise ValueError("no outcomes: an accuracy over 0 problems has no value")
    successes = sum(map(bool, outcomes))
    low, high = _wilson(successes, n, _normal_quantile(confidence))
    return Estimate(successes / n, low, high, n)


def paired_difference(a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95) -> Difference:
    """``mean(a) - mean(b)`` where ``a[i]`` and ``b[i]`` are outcomes on the same problem ``i``.

    Raises ``ValueError`` for empty sequences or sequences of different lengths.
    """
    if len(a) != len(b):
        raise ValueError(
            f"paired outcomes need the same problems in the same order, got {len(a)} and {len(b)}"
        )
    if not a:
        raise ValueError("no outcomes: a difference over 0 problems has no value")
    n, z = len(a), _normal_quantile(confidence)
    pairs = [(bool(x), bool(y)) for x, y in zip(a, b, strict=True)]
    both, only_a = pairs.count((True, True)), pairs.count((True, False))
    only_b, neither = pairs.count((False, True)), pairs.count((False, False))

    rate_a, rate_b = (both + only_a) / n, (both + only_b) / n
    low_a, high_a = _wilson(both + only_a, n, z)
    low_b, high_b = _wilson(both + only_b, n, z)
    phi = _corrected_phi(both, only_a, only_b, neither)
    difference = (only_a - only_b) / n
    return Difference(
        mean=difference,
        low=difference - _square_and_add(rate_a - low_a, high_b - rate_b, phi),
        high=difference + _square_and_add(high_a - rate_a, rate_b - low_b, phi),
        n=n,
        only_a=only_a,
        only_b=only_b,
    )


def across_seeds(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of one value a seed (an accuracy or a difference) with Student's t interval.

    Raises ``ValueError`` for fewer than 2 values: one seed says nothing about the spread.
    """
    k = len(values)
    if k < 2:
        raise ValueError(f"an interval over seeds needs 2 or more of them, got {k}")
    _check_confidence(confidence)
    mean = fmean(values)
    half = _t_quantile(confidence, k - 1) * stdev(values) / math.sqrt(k)
    return Estimate(mean, mean - half, mean + half, k)


def _wilson(successes: int, n: int, z: float) -> tuple[float, float]:
    """Limits of Wilson's interval, the two roots of ``(s/n - p)^2 = z^2 p (1-p) / n``."""
    rate, shrink = successes / n, z * z / n
    center = (rate + shrink / 2) / (1 + shrink)
    half = z * math.sqrt(rate * (1 - rate) / n + shrink / (4 * n)) / (1 + shrink)
    # At 0 and n successes one root is exactly 0 or 1; rounding would leave it a hair off.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return low, high


def _corrected_phi(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Correlation of two binary outcomes; a positive covariance is corrected by n / 2."""
    n = both + only_a + only_b + neither
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    covariance = both * neither - only_a * only_b
    if covariance > 0:
        return max(covariance - n / 2, 0.0) / math.sqrt(margins)
    return covariance / math.sqrt(margins)


def _square_and_add(x: float, y: float, phi: float) -> float:
    """``sqrt(x^2 - 2 phi x y + y^2)``; the sum is never negative but can round below 0."""
    return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1 (0.95 for 95 %), not {confidence}")


def _normal_quantile(confidence: float) -> float:
    """Two-sided quantile: 1.96 for 0.95."""
    _check_confidence(confidence)
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _t_quantile(confidence: float, degrees: int) -> float:
    """Two-sided quantile of Student's t, ``P(|T| < t) = confidence``, by bisection."""
    low, high = 0.0, 1.0
    while t_central(high, degrees) < confidence:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if t_central(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_central(t: float, degrees: int) -> float:
    """``P(|T| < t)``: Abramowitz and Stegun 26.7.3 (odd degrees) and 26.7.4 (even)."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees - 2, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    if degrees == 1:
        return 2 * theta / math.pi
    total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
