"""The same global batch gives the same update, whatever the launch.

One plain process and two under torchrun, every ZeRO stage, two micro-batch sizes (3 leaves one rank
with a filler). Compared: gradient norms before clipping, metrics, the sums over all weights and
moments after four updates, logits of the generation path.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.launching import launch

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("invariance_worker.py")
FP32 = [f"{stage}:{micro}:float32" for stage in range(4) for micro in (3, 5)]
BF16 = [f"{stage}:3:bfloat16" for stage in range(4)]


def run_all(launcher: str, processes: int) -> dict[str, dict[str, Any]]:
    printed = launch(launcher, processes, [str(WORKER), *FP32, *BF16])
    results = [
        json.loads(line.partition("RESULT ")[2])
        for line in printed.splitlines()
        if "RESULT " in line
    ]
    assert [r["case"] for r in results] == [*FP32, *BF16]
    assert {r["world_size"] for r in results} == {processes}
    return {r["case"]: r for r in results}


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    return run_all("python", 1)


@pytest.fixture(scope="module")
def two() -> dict[str, dict[str, Any]]:
    return run_all("torchrun", 2)


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number in ``value`` with its place."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{place}/{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, f"{place}/{index}")
    else:
        yield place, float(value)


def assert_equal(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    compared = ("norms", "metrics", "sums", "logits")
    a, b = (dict(numbers({key: r[key] for key in compared})) for r in (found, wanted))
    assert a.keys() == b.keys() and len(a) > 90
    for place, value in a.items():
        assert value == pytest.approx(b[place], rel=tolerance, abs=1e-7), place


REFERENCE = "0:3:float32"


@pytest.mark.parametrize("case", FP32)
def test_one_process(case: str, one: dict[str, dict[str, Any]]) -> None:
    assert_equal(one[case], one[REFERENCE], 1e-5)


@pytest.mark.parametrize("case", FP32)
def test_two_processes(
    case: str, one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]
) -> None:
    assert_equal(two[case], one[REFERENCE], 1e-5)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", BF16[:3])
def test_every_stage_on_a_bf16_base(
    case: str, processes: int, one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]
) -> None:
    """Among the stages: in bf16 the rows of another micro-batch round differently."""
    results = one if processes == 1 else two
    assert_equal(results[case], results[BF16[0]], 1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_stage_3_on_a_bf16_base(
    processes: int, one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]
) -> None:
    """Its hooks sit in autograd's graph and change the order in which the branches of the residual
    stream add up their 16-bit gradients. The forward pass is the same to the last bit."""
    results = one if processes == 1 else two
    stage_0, stage_3 = results[BF16[0]], results[BF16[3]]
    for name, value in stage_3["metrics"][0].items():
        assert value == pytest.approx(stage_0["metrics"][0][name], rel=1e-6), name
    assert stage_3["norms"][0] == pytest.approx(stage_0["norms"][0], rel=5e-3)


def test_the_updates_were_no_trifles(one: dict[str, dict[str, Any]]) -> None:
    result = one[REFERENCE]
    assert len(result["norms"]) == 4 and min(result["norms"]) > 0.05
    assert max(m["clip_fraction_low"] for m in result["metrics"]) > 0
    assert max(m["clip_fraction_high"] for m in result["metrics"]) > 0
    assert one[BF16[0]]["norms"] != result["norms"]


def test_all_ranks_see_the_gradient_evidence(
    one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]
) -> None:
    """Of a rank whose share is a filler alone it would be zero, and its audit would fail."""
    for result in (one[REFERENCE], two["2:3:float32"]):
        assert len(result["first"]) == 28
        assert min(result["first"].values()) > 0


def test_nan_on_one_rank_ends_all_of_them(tmp_path: Path) -> None:
    """The others would wait for its gradient until a timeout of many minutes."""
    worker = Path(__file__).with_name("nan_worker.py")
    launch("torchrun", 2, [str(worker), str(tmp_path), "0", "3"], timeout=120)
    for stage in (0, 3):
        other, own = ((tmp_path / f"{rank}-{stage}.txt").read_text() for rank in (0, 1))
        assert "step 2: the loss of another process is NaN" in other
        assert "step 2: the loss is nan" in own and "layers.1.input_layernorm" in own
