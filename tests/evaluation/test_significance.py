"""Tests over seeds, against values that any statistics table or program gives."""

from __future__ import annotations

import pytest

from npu_qat.evaluation.significance import holm, paired_t_test


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0], 0.0741799),  # t = 3.4641, 2 degrees of freedom
        ([0.5, -0.5, 0.25, -0.25], 1.0),
        ([2.1, 1.9, 2.4, 2.0, 1.6], 0.00010537),  # t = 15.339, 4 degrees
        ([-1.0, -2.0, -3.0], 0.0741799),
    ],
)
def test_the_p_value_is_students(differences: list[float], p: float) -> None:
    assert paired_t_test(differences) == pytest.approx(p, rel=2e-3)


def test_differences_without_scatter() -> None:
    assert paired_t_test([0.0, 0.0]) == 1.0
    assert paired_t_test([0.1, 0.1]) == 0.0


def test_one_seed_is_no_test() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        paired_t_test([0.3])


def test_holm_multiplies_the_smallest_by_the_number_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
