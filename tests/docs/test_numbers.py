"""Numbers in the sentences of README and the manual are those of the result files."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from typing import Any

import pytest

from tests.docs.blocks import ROOT

RESULTS = ROOT / "docs" / "results"


def text(page: str) -> str:
    """A page with its line breaks as spaces."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def result(file: str) -> Any:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


# --- the demo ---------------------------------------------------------------------------------


def test_readme_tells_of_the_committed_demo() -> None:
    page, summary = text("README.md"), result("demo-cpu/summary.json")
    for name, arm in summary["arms"].items():
        mean, low, high = (100 * arm["strict"][key] for key in ("mean", "low", "high"))
        row = rf"\| `{name}` \|[^|]+\| {mean:.1f} % \({low:.1f} to {high:.1f}\) \|"
        assert re.search(row, page), row
    gains = {c["b"]: c for c in summary["comparisons"] if c["a"] == "w4a4_trained"}
    for other in ("w4a4_ptq", "bf16_lora_served_w4a4"):
        points = [100 * gains[other][key] for key in ("difference", "low", "high")]
        words = "{:+.1f} points ({:+.1f} to {:+.1f})".format(*points)
        assert words in page


@pytest.mark.parametrize("page", ["README.md", "docs/get-started/index.md", "docs/zh/index.md"])
def test_the_time_of_the_demo_is_that_of_the_committed_one(page: str) -> None:
    minutes = f"{result('demo-cpu/summary.json')['seconds'] / 60:.1f}"
    assert re.search(rf"{minutes} (minutes|分钟)", text(page))


# --- the GPU ----------------------------------------------------------------------------------

STEP = "train-step/{}/qwen2.5-1.5b/4x2048-tokens/{}"


def ratio(row: str) -> float:
    (found,) = [r for r in result("performance/h100.json")["rows"] if r["name"] == row]
    return float(found["ms"] / found["baseline_ms"])


@pytest.mark.parametrize("page", ["README.md", "docs/get-started/gpu.md", "docs/zh/index.md"])
def test_the_times_of_a_training_step_are_the_measured_ones(page: str) -> None:
    said = text(page)
    for arm in ("image-ascend950", "packed-ascend950", "bf16-fused"):
        number = f"{ratio(STEP.format(arm, 'plain')):.2f}"
        assert re.search(rf"(?<![\d.]){number}(?![\d])", said), f"{arm}: {number}"


def test_readme_tells_the_measured_times() -> None:
    said = text("README.md")
    rows = [STEP.format(f"{store}-ascend950", "checkpointing") for store in ("image", "packed")]
    (number,) = {f"{ratio(row):.2f}" for row in rows}
    assert f"with gradient checkpointing {number} with either" in said
    faster = 1 / ratio("decode/packed-ascend950/qwen2.5-1.5b/batch-8/256-tokens")
    assert f"is {faster:.2f} times as fast" in said


# --- the experiments --------------------------------------------------------------------------


@cache
def measured(matrix: str) -> frozenset[str]:
    """Means, ends of intervals, single seeds and differences, as a sentence would round them."""
    report = result(f"{matrix}/report.json")
    numbers: list[float] = []
    for row in report["rows"]:
        numbers += [row.get(key) for key in ("mean", "low", "high")]
        numbers += (row["values"] or {}).values()
    for answer in report["answers"]:
        for key in ("estimate", "low", "high"):
            value = answer.get(key)
            if value is not None:
                logs = answer["unit"] == "log perplexity"
                numbers.append(100 * (math.expm1(value) if logs else value))
    return frozenset(f"{abs(n):.{d}f}" for n in numbers if n is not None for d in (1, 2))


def test_what_readme_says_of_the_experiments_was_measured() -> None:
    page = text("README.md")
    said = page[page.index("One run is one seed") : page.index("The demo's model is tiny")]
    numbers = re.findall(r"(?<![\w.])\d+\.\d+", said)
    assert len(numbers) >= 5
    known = measured("rl-demo") | measured("sft-smollm2")
    assert [n for n in numbers if n not in known] == []


def test_a_number_that_was_not_measured_is_found_out() -> None:
    assert "3.74" in measured("sft-smollm2") and "99.9" not in measured("rl-demo")
