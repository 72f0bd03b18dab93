"""docs/scaling.md shows what the result files and the plan say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from npu_qat.planning.calibration import calibrate
from npu_qat.planning.efficiency import SHIPPED, load_calibration
from npu_qat.planning.page import _checked, device_of, filled

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "scaling.md"
RESULTS = DOCS / "results" / "scaling"
FILES = sorted(RESULTS.glob("*.json"))


def test_the_tables_are_those_of_the_result_files() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text, RESULTS) == text, "run: python -m npu_qat.planning.page docs/scaling.md"


def test_every_result_file_is_shown() -> None:
    named = set(re.findall(r"<!-- check (\S+) -->", PAGE.read_text(encoding="utf-8")))
    assert named == {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_bytes_are_predicted_within_a_tenth(file: Path) -> None:
    """No number is fitted for them, so this is the formulas against the allocator."""
    _, found, _ = _checked(file)
    updates = [one for one in found if one["quantity"] == "update memory"]
    assert len(updates) >= 8
    for one in updates:
        assert one["measured"] / one["predicted"] == pytest.approx(1, abs=0.1), one["row"]


def test_the_shipped_calibration_is_that_of_its_file() -> None:
    if not SHIPPED.is_file():
        pytest.skip("this version ships no calibration")
    shipped = load_calibration(SHIPPED)
    file = RESULTS / shipped.source
    measured = json.loads(file.read_text(encoding="utf-8"))
    again = calibrate(file, device_of(measured))
    assert again.device == shipped.device
    for name, value in again.efficiency.__dict__.items():
        found = getattr(shipped.efficiency, name)
        assert found == (None if value is None else pytest.approx(value, rel=1e-6)), name
    assert set(again.errors) == set(shipped.errors)
    for quantity, error in again.errors.items():
        known = shipped.errors[quantity]
        assert (known.low, known.high) == pytest.approx((error.low, error.high), rel=1e-6), quantity
    assert again.storages == shipped.storages
