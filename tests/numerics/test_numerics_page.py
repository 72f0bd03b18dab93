"""docs/numerics.md names the profiles that exist. Its examples are run in tests/docs."""

from __future__ import annotations

import re
from pathlib import Path

from npu_qat.numerics import profile_names

PAGE = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text(encoding="utf-8")


def test_the_table_lists_every_profile_in_order() -> None:
    assert re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE) == profile_names()


def test_the_page_names_no_profile_that_does_not_exist() -> None:
    named = re.findall(r'"((?:ocp|ascend950|nvfp4|fork|quant-compute|msmodelslim)[\w.-]*)"', PAGE)
    assert named and set(named) <= set(profile_names())
