"""Growth over depth, and the experiment plan's table."""

from __future__ import annotations

import math

import pytest

from npu_qat.sensitivity.depth import PREDICTED, compare_with_plan, fit_growth, predicted_group


def test_the_plans_table_covers_its_28_layers() -> None:
    names = [predicted_group(layer, 28).name for layer in range(28)]
    assert [names.count(group.name) for group in PREDICTED] == [6, 10, 10, 2]
    assert [group.total for group in PREDICTED] == [0.36, 0.46, 0.51, 0.41]
    assert all(g.total == pytest.approx(g.weight + g.activation) for g in PREDICTED)


def test_other_depths_are_compared_by_relative_depth() -> None:
    assert [predicted_group(i, 3).first for i in range(3)] == [0, 6, 16]
    assert predicted_group(29, 30).name.startswith("L26")


@pytest.mark.parametrize(
    ("errors", "better"),
    [
        ([0.1 + 0.02 * i for i in range(12)], "a line fits better"),
        ([0.05 * math.exp(0.3 * i) for i in range(12)], "an exponential fits better"),
    ],
)
def test_lines_and_exponentials_are_told_apart(errors: list[float], better: str) -> None:
    growth = fit_growth(errors)
    assert better in growth.statement
    assert growth.line is not None and growth.exponential is not None
    assert max(growth.line, growth.exponential) == pytest.approx(1.0)


def test_the_factor_is_that_of_the_exponential() -> None:
    growth = fit_growth([0.05 * 1.2**i for i in range(10)])
    assert growth.factor == pytest.approx(1.2)


def test_few_layers_decide_nothing() -> None:
    growth = fit_growth([0.2, 0.25, 0.28])
    assert growth.line is None and "3 layers are too few" in growth.statement
    assert "1 layer is too few" in fit_growth([0.2]).statement


def test_a_layer_without_error_has_no_exponential() -> None:
    growth = fit_growth([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert growth.exponential is None and "too few" not in growth.statement
    assert "no exponential can be fitted" in growth.statement


def test_groups_without_layers_are_left_out() -> None:
    measured = {i: {"weight": 0.2, "activation": 0.1 * i, "accumulated": 0.3} for i in range(3)}
    rows = compare_with_plan(measured)
    assert [row["layers"] for row in rows] == [[0], [1], [2]]
    assert rows[1]["measured"] == {"weight": 0.2, "activation": 0.1, "accumulated": 0.3}
