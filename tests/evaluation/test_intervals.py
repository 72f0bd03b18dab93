"""Intervals against published worked examples, tables, symmetries and exact coverage."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_qat.evaluation.intervals import across_seeds, paired_difference, proportion


def outcomes(successes: int, n: int) -> list[bool]:
    return [True] * successes + [False] * (n - successes)


def pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Outcomes of a and b with these counts of the fourfold table."""
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


# One proportion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, Stat. Med. 17:857, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_values(successes: int, n: int, low: float, high: float) -> None:
    estimate = proportion(outcomes(successes, n))
    assert estimate.mean == successes / n
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)
    assert estimate.n == n


def test_wilson_limits_lie_exactly_z_standard_errors_away() -> None:
    """The definition: at both limits the observed rate is 1.96 standard errors off."""
    estimate = proportion(outcomes(37, 90))
    for limit in (estimate.low, estimate.high):
        standard_error = math.sqrt(limit * (1 - limit) / 90)
        assert abs(37 / 90 - limit) / standard_error == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize(("successes", "rate"), [(0, 0.0), (12, 1.0)])
def test_extremes_touch_the_end_and_keep_a_width(successes: int, rate: float) -> None:
    estimate = proportion(outcomes(successes, 12))
    assert rate in (estimate.low, estimate.high)
    assert estimate.high - estimate.low > 0.2


def test_more_confidence_is_wider() -> None:
    widths = [
        (e := proportion(outcomes(5, 30), level)).high - e.low for level in (0.5, 0.9, 0.95, 0.99)
    ]
    assert widths == sorted(widths)
    assert len(set(widths)) == 4


# A paired difference ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "difference", "low", "high"),
    [
        # Newcombe 1998, Stat. Med. 17:2635, a worked contrast of the paper (no "neither").
        ((36, 12, 2, 0), 0.2, 0.0569, 0.3404),
        # Altman et al., Statistics with Confidence (2000), table 6.2: 0.011 to 0.226.
        ((14, 5, 0, 22), 0.122, 0.0115, 0.2265),
        # Fagerland et al., Stat. Med. 33:2850 (2014), airway data: -0.507 to -0.026.
        ((1, 1, 7, 12), -0.286, -0.507, -0.026),
    ],
)
def test_paired_interval_equals_published_values(
    table: tuple[int, int, int, int], difference: float, low: float, high: float
) -> None:
    result = paired_difference(*pairs(*table))
    assert (result.mean, result.low, result.high) == pytest.approx(
        (difference, low, high), abs=5e-4
    )
    assert (result.only_a, result.only_b, result.n) == (table[1], table[2], sum(table))


def test_pairing_narrows_the_interval_of_correlated_outcomes() -> None:
    a, b = pairs(500, 60, 20, 420)
    paired = paired_difference(a, b)
    shuffled = paired_difference(a, b[::2] + b[1::2])
    assert paired.mean == shuffled.mean
    assert paired.high - paired.low < 0.6 * (shuffled.high - shuffled.low)
    assert paired.distinguishable


def test_the_order_of_the_problems_does_not_matter_but_the_pairing_does() -> None:
    a, b = pairs(30, 12, 5, 53)
    order = [(37 * i) % 100 for i in range(100)]
    assert paired_difference([a[i] for i in order], [b[i] for i in order]) == paired_difference(
        a, b
    )


def test_no_difference_at_all_still_has_a_width_around_zero() -> None:
    result = paired_difference(*pairs(40, 0, 0, 60))
    assert result.low < 0.0 < result.high
    assert not result.distinguishable


counts = st.integers(0, 40)


@settings(max_examples=200, deadline=None)
@given(counts, counts, counts, counts)
def test_swapping_the_arms_mirrors_the_interval(both: int, a: int, b: int, neither: int) -> None:
    if both + a + b + neither == 0:
        return
    one = paired_difference(*pairs(both, a, b, neither))
    other = paired_difference(*pairs(both, b, a, neither))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-12)
    assert -1.0 <= one.low <= one.mean <= one.high <= 1.0


def test_coverage_is_near_the_nominal_level() -> None:
    """Exact, by enumeration: how often the interval holds the true difference at n = 24."""
    n, cells = 24, (0.35, 0.25, 0.1, 0.3)
    truth = cells[1] - cells[2]
    covered = 0.0
    for both in range(n + 1):
        for a in range(n + 1 - both):
            for b in range(n + 1 - both - a):
                table = (both, a, b, n - both - a - b)
                result = paired_difference(*pairs(*table))
                if result.low <= truth <= result.high:
                    ways = math.factorial(n) / math.prod(map(math.factorial, table))
                    covered += ways * math.prod(p**k for p, k in zip(cells, table, strict=True))
    assert 0.93 < covered < 0.97


# Over seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "t"),
    [(2, 12.706), (3, 4.3027), (4, 3.1824), (5, 2.7764), (6, 2.5706), (11, 2.2281), (31, 2.0423)],
)
def test_t_interval_equals_the_table(seeds: int, t: float) -> None:
    """Alternating values 0 and 1 around their mean; the table gives the two-sided 95 % quantile."""
    values = [float(i % 2) for i in range(seeds)]
    mean = sum(values) / seeds
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (seeds - 1))
    estimate = across_seeds(values)
    assert estimate.mean == pytest.approx(mean)
    assert estimate.high - mean == pytest.approx(t * spread / math.sqrt(seeds), rel=2e-5)
    assert mean - estimate.low == pytest.approx(estimate.high - mean)
    assert estimate.n == seeds


def test_t_interval_at_another_level() -> None:
    estimate = across_seeds([1.0, 2.0, 3.0], confidence=0.99)
    assert estimate.high - 2.0 == pytest.approx(9.9248 / math.sqrt(3), rel=1e-5)


# Errors -------------------------------------------------------------------------------------------


def test_what_has_no_interval_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 problems"):
        proportion([])
    with pytest.raises(ValueError, match="0 problems"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="same problems in the same order, got 2 and 1"):
        paired_difference([True, False], [True])
    with pytest.raises(ValueError, match="2 or more"):
        across_seeds([0.5])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, -0.5])
def test_a_level_outside_of_zero_to_one_is_an_error(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"0\.95 for 95 %"):
        proportion([True], confidence)
    with pytest.raises(ValueError, match=r"0\.95 for 95 %"):
        across_seeds([0.1, 0.2], confidence)
