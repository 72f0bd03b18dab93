"""The published answer forms, at their edges."""

from __future__ import annotations

import pytest

from npu_qat.tasks import (
    ANSWER_WINDOW,
    canonical_number,
    flexible_answer,
    same_number,
    strict_answer,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### -12", "-12"),
        ("#### 2.50", "2.50"),
        ("#### 18.", "18"),
        ("#### 7 apples", "7"),
        ("#### 5\n#### 6", "6"),
        ("##### 9", "9"),
        ("The answer is 7", None),
        ("####7", None),
        ("####  7", None),
        ("#### $7", None),
        ("#### +7", None),
        ("#### seven", None),
        ("### 7", None),
        ("#### 1.2.3", None),
        ("#### .", None),
        ("#### ,", None),
        ("#### 4\n#### .", None),
        ("", None),
    ],
)
def test_strict_form(text: str, answer: str | None) -> None:
    assert strict_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("first 3, then 12 apples.", "12"),
        ("it costs $1,050.", "1050"),
        ("down to -4 degrees", "-4"),
        ("#### 7", "7"),
        ("no number ... at all, .", None),
        ("12 and then ...", "12"),
        ("", None),
    ],
)
def test_flexible_form(text: str, answer: str | None) -> None:
    assert flexible_answer(text) == answer


def test_only_the_last_300_characters_count() -> None:
    marker = "#### 42"
    fits = marker + "x" * (ANSWER_WINDOW - len(marker))
    assert strict_answer(fits) == "42"
    assert strict_answer(fits + "x") is None
    assert flexible_answer("42" + "x" * (ANSWER_WINDOW - 2)) == "42"
    assert flexible_answer("42" + "x" * ANSWER_WINDOW) is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("18", "18.0", True),
        ("1,000", "1000", True),
        ("-0", "0", True),
        ("0.1", "0.10", True),
        ("0.1", "0.1000000000000000055", False),
        ("18", "-18", False),
        ("18", "", False),
        ("", "", False),
        ("nan", "nan", False),
        ("inf", "inf", False),
    ],
)
def test_numbers_are_compared_exactly(a: str, b: str, same: bool) -> None:
    assert same_number(a, b) is same
    assert same_number(b, a) is same


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("1,250.0", "1250"), ("-0", "0"), ("0.50", "0.5"), ("100", "100"), ("x", None)],
)
def test_canonical_number(text: str, canonical: str | None) -> None:
    assert canonical_number(text) == canonical
