"""Tests over seeds: is a difference more than chance, and how many such questions were asked?

`paired_t_test` takes one difference a seed (both arms trained with the same seed on the same
problems in the same order, so what a seed does to both cancels) and asks how often a mean at least
as far from zero comes up if the true one is zero. It assumes that differences are roughly normal;
with the few seeds of such experiments no test can check that.

Asking twenty questions at 5 % finds one "effect" that is not there. `holm` corrects for it: the
smallest p-value is multiplied by the number m of questions, the next by m - 1, and so on, and none
may end up below one before it (Holm, Scand. J. Stat. 6:65-70, 1979). It holds whatever the
questions have in common, and is never weaker than Bonferroni's correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from npu_qat.evaluation.intervals import t_central


def paired_t_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of the mean of ``differences`` (one a seed) being zero.

    Raises ``ValueError`` for fewer than 2 differences.
    """
    k = len(differences)
    if k < 2:
        raise ValueError(f"a test over seeds needs 2 or more differences, got {k}")
    mean, spread = fmean(differences), stdev(differences)
    if spread == 0.0:
        # Without any scatter the statistic is infinite, or, for zeros only, says nothing.
        return 1.0 if mean == 0.0 else 0.0
    t = abs(mean) / (spread / math.sqrt(k))
    return max(0.0, 1.0 - t_central(t, k - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given; compare them with the level itself."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
