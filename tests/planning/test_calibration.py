"""A fit finds the efficiencies that made its rows; its error is that of rows it has not seen."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from npu_qat.planning.calibration import (
    LOGIT_MOVES,
    NEUTRAL,
    calibrate,
    errors,
    facts_of,
    fit,
    layout_of,
    least_squares,
    load_of,
    prediction_interval,
    predictions,
)
from npu_qat.planning.efficiency import Efficiency, load_calibration, shipped_calibration
from npu_qat.planning.hardware import HARDWARE, find_hardware
from npu_qat.planning.memory import predict_memory
from npu_qat.planning.steps import (
    gathering_seconds,
    micro_batch_work,
    optimizer_seconds,
    pass_seconds,
    prefill_work,
    token_seconds,
    token_work,
)
from npu_qat.training import batches

H100 = HARDWARE["h100"]
TRUE = Efficiency(
    matmul=0.6,
    activation_moves=4.0,
    logit_moves=LOGIT_MOVES,
    forward_host_seconds=1.5e-3,
    backward_host_seconds=2.5e-3,
    adapter_step_seconds=2e-5,
    zero3_layer_seconds=4e-4,
    link=0.5,
    decode_weight_moves=1.3,
    decode_cache_moves=2.0,
    decode_logit_moves=9.0,
    decode_layer_seconds=5e-5,
    reserved=1.04,
)
MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")


def made_rows(true: Efficiency = TRUE) -> list[dict[str, Any]]:
    """Rows of a device whose efficiencies are exactly ``true``."""
    rows: list[dict[str, Any]] = [
        {"kind": "collective", "processes": 2, "bytes": 1 << 28, "all_gather": 0.0},
    ]
    rows[0]["all_gather"] = rows[0]["bytes"] / 2 / (true.link * 450e9)
    for model in MODELS:
        common = {"model": model, "changes": {}, "bucket": None, "outside": 7}
        for storage in ("image", "packed"):
            for zero, processes in ((0, 1), (3, 2)):
                for sequences, tokens, again in (
                    (1, 512, False),
                    (4, 2048, False),
                    (8, 2048, True),
                ):
                    row = common | {
                        "kind": "update",
                        "storage": storage,
                        "zero": zero,
                        "processes": processes,
                        "sequences": sequences,
                        "tokens": tokens,
                        "checkpointing": again,
                        "ragged": True,
                    }
                    rows.append(row | times(row, true))
            for sequences in (8, 64, 256):
                row = common | {
                    "kind": "decode",
                    "storage": storage,
                    "zero": 0,
                    "processes": 1,
                    "sequences": sequences,
                    "prompt": 256,
                    "new_tokens": 81,
                    "recorded": True,
                }
                rows.append(row | times(row, true))
    return rows


def times(row: dict[str, Any], true: Efficiency) -> dict[str, float]:
    facts, layout, load = facts_of(row), layout_of(row, H100), load_of(row)
    phase = "rollout" if row["kind"] == "decode" else "update"
    tensors = predict_memory(facts, layout, load).total(phase)
    found = {"before": 1, "peak": tensors + 7, "reserved": (tensors + 7) * true.reserved}
    if row["kind"] == "decode":
        prefill = pass_seconds(prefill_work(facts, layout, load), H100, true)
        token = token_seconds(token_work(facts, load), H100, true)
        return found | {"prefill_seconds": prefill, "token_seconds": token}
    work = micro_batch_work(facts, layout, load)
    forward = micro_batch_work(facts, layout, load, backward=False)
    return found | {
        "micro_seconds": pass_seconds(work, H100, true)
        + gathering_seconds(work, H100, true, layout),
        "forward_seconds": pass_seconds(forward, H100, true),
        "step_seconds": optimizer_seconds(facts, H100, true),
    }


def test_known_efficiencies_are_found_again() -> None:
    found = fit(made_rows(), H100)
    for name, value in TRUE.__dict__.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.03), name


def test_the_error_is_that_of_a_model_that_the_fit_has_not_seen() -> None:
    rows = made_rows()
    found = errors(predictions(rows, H100))
    assert set(found) == {
        "update memory", "rollout memory", "update time", "update time, ZeRO-3", "forward time",
        "decoding time", "prefill time",
    }  # fmt: skip
    assert all(error.worst == pytest.approx(1, rel=0.05) for error in found.values())
    assert found["update memory"].worst == pytest.approx(1)
    # One model runs at half the speed: no fit to the others can know, and its own rows do not help.
    slower = [
        row | {"micro_seconds": 2 * row["micro_seconds"]}
        if row.get("model") == "qwen2.5-7b" and "micro_seconds" in row
        else row
        for row in rows
    ]
    ratios = [
        one["measured"] / one["predicted"]
        for one in predictions(slower, H100)
        if one["quantity"] == "update time" and one["row"]["model"] == "qwen2.5-7b"
    ]
    assert ratios == pytest.approx([2.0] * len(ratios), rel=0.05)
    assert errors(predictions(slower, H100))["update time"].high > 1.5


def test_a_fit_to_one_model_alone_cannot_be_tested() -> None:
    rows = [row for row in made_rows() if row.get("model", MODELS[0]) == MODELS[0]]
    assert fit(rows, H100).matmul > 0
    with pytest.raises(ValueError, match="found 0"):
        predictions(rows, H100)


def test_stage_3_that_was_not_measured_is_not_predicted() -> None:
    rows = [row for row in made_rows() if row.get("zero") != 3]
    efficiency = fit(rows, H100)
    assert efficiency.zero3_layer_seconds is None
    assert "update time, ZeRO-3" not in errors(predictions(rows, H100))


def test_coefficients_are_never_negative() -> None:
    assert least_squares([(1, 0), (0, 1), (1, 1)], [2, 3, 5], [1, 1, 1]) == pytest.approx([2, 3])
    found = least_squares([(1, 1), (2, 1), (3, 1)], [1, 3, 5], [1, 1, 1])  # exact: -1
    assert min(found) >= 0 and found[0] > 0


def test_an_interval_holds_what_the_spread_says() -> None:
    ratios = [0.9, 1.0, 1.1, 1.05, 0.95]
    error = prediction_interval(ratios)
    logs = [math.log(r) for r in ratios]
    mean = sum(logs) / 5
    sd = math.sqrt(sum((x - mean) ** 2 for x in logs) / 4)
    assert error.high == pytest.approx(math.exp(mean + 2.776 * sd * math.sqrt(1.2)))
    assert (error.rows, error.worst) == (5, 0.9)
    assert error.low < min(ratios) and error.high > max(ratios)
    single = prediction_interval([1.3])
    assert (single.low, single.high) == (1.0, 1.3)


def test_a_file_that_is_no_measurement_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for text in ("", "{}", "[]", '{"rows": 3, "environment": {}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"no result of python -m npu_qat\.planning\.measure"):
            calibrate(file, H100)
    with pytest.raises(ValueError, match=r"rows\.json"):
        load_calibration(file)


def test_too_few_rows_and_unknown_peaks_are_refused(tmp_path: Path) -> None:
    few = [row for row in made_rows() if row["kind"] != "update"]
    with pytest.raises(ValueError, match="at least 4 updates in one process"):
        fit(few, H100)
    file = tmp_path / "rows.json"
    silent = [row for row in made_rows() if row["kind"] != "decode"]
    file.write_text(
        json.dumps({"rows": silent, "environment": {"processor": "host", "device": "cpu"}})
    )
    with pytest.raises(ValueError, match="needs at least 2 rollouts"):
        calibrate(file, H100)
    with pytest.raises(ValueError, match="needs the peaks of the device: --tflops"):
        fit(made_rows(), find_hardware("ascend-950dt"))


def test_a_calibration_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    environment = {"accelerator": "NVIDIA H100 PCIe", "processor": "host", "device": "cuda"}
    file.write_text(json.dumps({"rows": made_rows(), "environment": environment}))
    made = calibrate(file, H100)
    assert (made.device, made.source) == ("NVIDIA H100 PCIe", "rows.json")
    assert made.storages == ("image", "packed")
    copy = tmp_path / "calibration.json"
    copy.write_text(json.dumps(made.as_dict()))
    assert load_calibration(copy) == made
    shipped = shipped_calibration()
    assert shipped is None or 0 < shipped.efficiency.matmul <= 1
    assert made.error("update time") is not None and made.error("nothing") is None
    assert replace(NEUTRAL, matmul=0.5) != NEUTRAL


@pytest.mark.parametrize(
    ("environment", "soc", "fits"),
    [
        ({"device": "cpu", "processor": "AMD EPYC"}, "h100", False),
        ({"device": "cuda", "accelerator": "NVIDIA H200"}, "h100", False),
        ({"device": "cuda", "accelerator": "NVIDIA H100 80GB HBM3"}, "a100-80gb", False),
        ({"device": "cuda", "accelerator": "NVIDIA GH200 480GB"}, "h200", False),
        ({"device": "cuda", "accelerator": "NVIDIA A100-SXM4-80GB"}, "a100-80gb", True),
        ({"device": "cuda", "accelerator": "NVIDIA L40S"}, "l40s", True),
        ({"device": "npu", "accelerator": "Ascend910_9392"}, "h100", False),
        ({"device": "npu", "accelerator": "Ascend950"}, "ascend-950dt", True),
    ],
)
def test_rows_of_another_device_are_refused(
    environment: dict[str, str], soc: str, fits: bool, tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": made_rows(), "environment": environment}))
    hardware = find_hardware(soc, tflops=300, bandwidth=3000, link=100)
    if fits:
        assert calibrate(file, hardware).device == environment["accelerator"]
        return
    device = environment.get("accelerator") or environment["processor"]
    with pytest.raises(ValueError, match=f"measured on {device}, not on {hardware.name}"):
        calibrate(file, hardware)


class Traffic(TorchDispatchMode):
    """Bytes that each kind of operation reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            touched = [t for t in tree_leaves((args, made)) if isinstance(t, torch.Tensor)]
            self.bytes[func.overloadpacket.__name__] += sum(t.nbytes for t in touched)
        return made


def test_logits_are_moved_as_often_as_the_code_moves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch's dispatcher sees, and what its kernels are known to do beside that."""
    monkeypatch.setattr(batches, "CHUNK_ELEMENTS", 1)  # in pieces, as a real vocabulary
    rows, tokens, vocabulary = 4, 16, 2048
    logits = torch.randn(rows, tokens + 1, vocabulary, dtype=torch.bfloat16, requires_grad=True)
    samples = [batches.Sample([1], [3] * tokens) for _ in range(rows)]
    batch = batches.collate(samples, 0, torch.device("cpu"))
    with Traffic() as traffic:
        found = batches.completion_logp(lambda **_: SimpleNamespace(logits=logits), batch)
        found.sum().backward()
    whole = 4 * rows * tokens * vocabulary
    seen = {name: size / whole for name, size in traffic.bytes.items()}
    # These touch a token's number of a row; under a dispatch mode the second also makes a copy.
    of_tokens = {"gather": seen.pop("gather"), "scatter_add": seen.pop("scatter_add")}
    assert min(of_tokens.values()) > 0
    softmax = 2 * 2 + 1  # maximum and sum, forward and again; the gradients' sum
    zeros, matmuls = 0.5, 0.5 + 0.5  # before the slice's gradient is put in; head, both ways
    moves = sum(seen.values()) + softmax + zeros + matmuls
    assert moves / 3 == pytest.approx(LOGIT_MOVES, rel=0.02)
