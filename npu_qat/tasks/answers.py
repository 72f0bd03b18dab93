r"""Finding the final answer in a completion, and comparing it with the right one.

Two forms are scored, as published GSM8K work does (verl, `utils/reward_score/gsm8k.py`):

* **strict**: the last match of `#### (-?[0-9.,]+)` in the last 300 characters. Exactly four
  hashes and exactly one space; a currency sign, a plus sign or a second space before the number
  is no match.
* **flexible**: the last run of `-?[0-9.,]+` in the last 300 characters that is more than
  punctuation.

In both, commas are dropped as thousands separators wherever they stand and a full stop at the
end is dropped as punctuation, so that `#### 1,234.` reads `1234`. A run that is then no number
(`1.2.3`) gives no answer: the search does not go on to an earlier one. The published code
compares strings, so `18.0` or `18.` would miss `18`; here answers are compared as decimal
numbers, which only ever turns such a miss into a hit.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

ANSWER_WINDOW = 300
"""Only this many characters at the end of a completion are searched."""

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[0-9.,]+")


def strict_answer(text: str) -> str | None:
    """The number after the last `#### ` in the last 300 characters, or None.

    Returns:
        The number without commas (`"1234.5"`), or None if the form is missing or what follows
        the last marker is no number.
    """
    matches = _STRICT.findall(text[-ANSWER_WINDOW:])
    return _clean(matches[-1]) if matches else None


def flexible_answer(text: str) -> str | None:
    """The last number in the last 300 characters, or None."""
    runs = [run for run in _FLEXIBLE.findall(text[-ANSWER_WINDOW:]) if any(map(str.isdigit, run))]
    return _clean(runs[-1]) if runs else None


def same_number(a: str, b: str) -> bool:
    """Whether two decimal strings are the same number (`"18"`, `"18.0"`, `"1,8"` and so on).

    Compared exactly as `Decimal`; a string that is no finite number equals nothing.
    """
    left, right = _decimal(a), _decimal(b)
    return left is not None and right is not None and left == right


def canonical_number(text: str) -> str | None:
    """`text` as the shortest plain decimal (`"1,250.0"` gives `"1250"`), or None if no number."""
    value = _decimal(text)
    if value is None:
        return None
    plain = format(value, "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain in {"-0", ""} else plain


def _clean(run: str) -> str | None:
    number = run.replace(",", "").removesuffix(".")
    return number if _decimal(number) is not None else None


def _decimal(text: str) -> Decimal | None:
    try:
        value = Decimal(text.replace(",", "").strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
