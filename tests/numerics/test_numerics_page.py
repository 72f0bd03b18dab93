"""docs/numerics.md: its examples run and print what they say, its table names every profile."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from npu_qat.numerics import profile_names

PAGE = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_table_lists_every_profile_in_order() -> None:
    assert re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE) == profile_names()


def test_the_examples_run_and_print_what_their_comments_say() -> None:
    assert len(EXAMPLES) >= 7
    namespace: dict[str, object] = {}
    for example in EXAMPLES:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(example, "docs/numerics.md", "exec"), namespace)
        promised = re.findall(r"^print\(.*\)  # (.*)$", example, flags=re.MULTILINE)
        assert output.getvalue().splitlines()[: len(promised)] == promised


def test_the_page_names_no_profile_that_does_not_exist() -> None:
    named = re.findall(r'"((?:ocp|ascend950|nvfp4|fork|quant-compute|msmodelslim)[\w.-]*)"', PAGE)
    assert named and set(named) <= set(profile_names())
