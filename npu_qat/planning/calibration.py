"""From measured rows to efficiencies, and the error of their predictions on other rows.

    python -m npu_qat.planning.calibration rows.json --soc h100 --json calibration.json

Efficiencies are fitted to all rows. What is reported as their error is that of fits which have not
seen the model in question: each model is predicted by a fit to the rows of all others. Bytes have
no fitted number at all: every row tests them.

The fit minimises relative errors. No byte moves less than once; how often one of logits moves is
counted. A pass takes the longer of device
and host, so rows are sorted into those of the one and of the other by the present fit, each part is
fitted by least squares with coefficients that cannot be negative, and that is repeated; the best
round is taken.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npu_qat.config import LoraSection, ModelConfig, Recipe, RunConfig
from npu_qat.planning.cases import RANK
from npu_qat.planning.efficiency import Calibration, Efficiency, Error
from npu_qat.planning.facts import ModelFacts, model_facts
from npu_qat.planning.hardware import Hardware, find_hardware
from npu_qat.planning.memory import REDUCE_BUCKET, Layout, Load, predict_memory
from npu_qat.planning.model import architecture, build_on_meta
from npu_qat.planning.steps import (
    Work,
    gathering_seconds,
    micro_batch_work,
    optimizer_seconds,
    pass_seconds,
    prefill_work,
    token_seconds,
    token_work,
)

Row = dict[str, Any]
# Coefficients that stand in for ones that no row tells: no cost.
NEUTRAL = Efficiency(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, None, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0)
ROUNDS = 20
LEAST_UPDATES, LEAST_ROLLOUTS = 4, 2
# Times that a byte of fp32 logits is moved, counted from ``training/batches.py``, not fitted: in
# measured rows logits grow with everything else, and a fit gives them time that is Python's. One
# pass over fp32 logits is 1, over 16-bit ones 0.5.
#   forward    matmul writes 0.5; cast 1.5; log-softmax reads for the maximum, the sum and the
#              result (a row of a vocabulary is larger than a chip's caches) and writes: 4
#   backward   cast and log-softmax of a piece again 5.5; gather fills zeros 1; log-softmax reads
#              gradients twice, the result, and writes: 4; cast 1.5; pieces are put together 1, and
#              into zeros for the position that predicts nothing 1.5; matmul reads 0.5
# 21 in all, and ``micro_batch_work`` counts logits three times. (A forward pass alone: 6.)
LOGIT_MOVES = 7.0
# Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom, then the normal's.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


# ---------------------------------------------------------------- rows


@functools.cache
def _facts(model: str, changes: tuple[tuple[str, int], ...], storage: str) -> ModelFacts:
    from npu_qat.layers.plan import plan_linears

    a = architecture(model, **dict(changes))
    config = RunConfig(
        quant=Recipe(base_storage=storage),
        lora=LoraSection(r=RANK, alpha=RANK),
        model=ModelConfig(),
    )
    on_meta = build_on_meta(a, config.model)
    return model_facts(on_meta, a, plan_linears(on_meta, config.quant), config)


def facts_of(row: Row) -> ModelFacts:
    """The counts of the model that ``row`` measured."""
    return _facts(row["model"], tuple(sorted(row["changes"].items())), row["storage"])


def layout_of(row: Row, hardware: Hardware) -> Layout:
    """How the row's processes were laid out."""
    return Layout(
        devices=row["processes"],
        zero=row["zero"],
        checkpointing=row.get("checkpointing", False),
        bucket=row["bucket"] or REDUCE_BUCKET,
        fused=hardware.fused,
    )


def load_of(row: Row) -> Load:
    """What the row put through the model."""
    if row["kind"] == "decode":
        return Load(1, 1, 1, row["sequences"], row["prompt"], row["new_tokens"])
    tokens = row["tokens"]
    return Load(row["sequences"], tokens, tokens - tokens // 4, padded=row["ragged"])


def memory_of(row: Row, hardware: Hardware) -> tuple[float, float]:
    """(measured, predicted) bytes of a row at its peak, the tensors that were there before included
    where the device counts them."""
    predicted = predict_memory(facts_of(row), layout_of(row, hardware), load_of(row))
    phase = "rollout" if row["kind"] == "decode" else "update"
    measured = row["peak"] - row["outside"]
    parts = predicted.phases[phase]
    if row["before"] == 0:  # a CPU counts what the update made
        parts = {k: v for k, v in parts.items() if k in MADE_IN_AN_UPDATE}
        if row["zero"] == 3:
            parts.pop("gradient bucket", None)
    return float(measured), float(sum(parts.values()))


MADE_IN_AN_UPDATE = (
    "base, gathered",
    "LoRA, fp32 gradients",
    "gradient bucket",
    "activations",
    "layer inputs",
    "logits, or one layer",
)


# ---------------------------------------------------------------- the fit


def least_squares(
    rows: Sequence[Sequence[float]], targets: Sequence[float], scales: Sequence[float]
) -> list[float]:
    """Coefficients, none negative, that minimise the errors of ``rows @ c = targets``, each in
    units of its scale.

    The best of all subsets of columns whose solution has no negative number; there are few columns.
    """
    import numpy as np

    scale = np.asarray(scales, dtype=float)
    a = np.asarray(rows, dtype=float) / scale[:, None]
    b = np.asarray(targets, dtype=float) / scale
    count, best, found = a.shape[1], math.inf, [0.0] * a.shape[1]
    # Fewer columns first: a larger set must be better to be taken.
    for size in range(1, count + 1):
        for columns in itertools.combinations(range(count), size):
            part = a[:, columns]
            solution, _, rank, _ = np.linalg.lstsq(part, b, rcond=None)
            if rank < size or (solution < 0).any():
                continue
            loss = float(((part @ solution - b) ** 2).sum())
            if loss < best - 1e-12:
                best, found = loss, [0.0] * count
                for column, value in zip(columns, solution.tolist(), strict=True):
                    found[column] = value
    return found


def fit(rows: Sequence[Row], hardware: Hardware) -> Efficiency:
    """Efficiencies from measured rows.

    Raises ``ValueError`` if there are too few of them, or the hardware lacks a figure.
    """
    if missing := [o for o in hardware.missing() if o in ("--tflops", "--bandwidth")]:
        raise ValueError(f"a calibration needs the peaks of the device: {', '.join(missing)}")
    updates = [row for row in rows if row["kind"] == "update"]
    decodes = [row for row in rows if row["kind"] == "decode"]
    plain = [row for row in updates if row["zero"] == 0 and row["processes"] == 1]
    if len(plain) < LEAST_UPDATES:
        raise ValueError(
            f"a calibration needs at least {LEAST_UPDATES} updates in one process, of each model's "
            f"others, but found {len(plain)}"
        )
    numbers = NEUTRAL.__dict__ | _fit_passes(plain, hardware)
    numbers["adapter_step_seconds"] = statistics.median(
        max(row["step_seconds"] - optimizer_seconds(facts_of(row), hardware, NEUTRAL), 0.0)
        / (2 * facts_of(row).adapted_linears)
        for row in plain
    )
    if len(decodes) >= LEAST_ROLLOUTS:
        numbers |= _fit_tokens(decodes, hardware, numbers["matmul"])
    numbers["link"] = _link(rows, hardware)
    pools = [row["reserved"] / row["peak"] for row in (*updates, *decodes) if "reserved" in row]
    numbers["reserved"] = max(pools, default=1.0)
    sharded = [row for row in updates if row["zero"] == 3]
    if sharded:
        efficiency = Efficiency(**{**numbers, "zero3_layer_seconds": 0.0})
        numbers["zero3_layer_seconds"] = statistics.median(
            _hook_seconds(row, hardware, efficiency) for row in sharded
        )
    return Efficiency(**numbers)


def _passes(rows: Sequence[Row], hardware: Hardware) -> list[tuple[Work, float]]:
    """Work and seconds of every measured pass: micro-batches, and forward passes alone."""
    found = []
    for row in rows:
        facts, layout, load = facts_of(row), layout_of(row, hardware), load_of(row)
        found.append((micro_batch_work(facts, layout, load), row["micro_seconds"]))
        forward = micro_batch_work(facts, layout, load, backward=False)
        found.append((forward, row["forward_seconds"]))
    return found


def _fit_passes(rows: Sequence[Row], hardware: Hardware) -> dict[str, float]:
    """Columns of the device: matmuls, and moves of activations above one. Those of the host:
    forward and backward passes."""
    passes = _passes(rows, hardware)
    columns, host = [1.0, 0.0], [0.0, 0.0]
    # At first, those with little work a layer wait for the host.
    middle = statistics.median(w.flops / w.layer_passes for w, _ in passes)
    bound = [w.flops / w.layer_passes < middle for w, _ in passes]
    best = math.inf
    for _ in range(ROUNDS):
        device = [p for p, by_host in zip(passes, bound, strict=True) if not by_host]
        waiting = [p for p, by_host in zip(passes, bound, strict=True) if by_host]
        new_columns, new_host = columns, host
        if device:
            new_columns = least_squares(
                [_device_columns(w, hardware) for w, _ in device],
                [max(s - _least_seconds(w, hardware), 0.1 * s) for w, s in device],
                [s for _, s in device],
            )
        if any(w.layer_backwards for w, _ in waiting):
            new_host = least_squares(
                [(w.layer_forwards, w.layer_backwards) for w, _ in waiting],
                [s for _, s in waiting],
                [s for _, s in waiting],
            )
        on_device = [
            _least_seconds(w, hardware)
            + sum(c * x for c, x in zip(new_columns, _device_columns(w, hardware), strict=True))
            for w, _ in passes
        ]
        on_host = [
            new_host[0] * w.layer_forwards + new_host[1] * w.layer_backwards for w, _ in passes
        ]
        loss = sum(
            math.log(max(d, h) / s) ** 2
            for d, h, (_, s) in zip(on_device, on_host, passes, strict=True)
        )
        if loss < best:
            best, columns, host = loss, new_columns, new_host
        now = [h > d for d, h in zip(on_device, on_host, strict=True)]
        if now == bound:
            break
        bound = now
    return {
        "matmul": 1 / columns[0] if columns[0] else 1.0,
        "activation_moves": 1 + columns[1],
        "logit_moves": LOGIT_MOVES,
        "forward_host_seconds": host[0],
        "backward_host_seconds": host[1],
    }


def _device_columns(work: Work, hardware: Hardware) -> tuple[float, float]:
    assert hardware.flops and hardware.bandwidth
    return work.flops / hardware.flops, work.activations / hardware.bandwidth


def _least_seconds(work: Work, hardware: Hardware) -> float:
    """Of moving activations and decoded weights once, and logits as often as they are."""
    assert hardware.bandwidth
    moved = work.activations + work.weights + LOGIT_MOVES * work.logits
    return moved / hardware.bandwidth


def _fit_tokens(rows: Sequence[Row], hardware: Hardware, matmul: float) -> dict[str, float]:
    assert hardware.flops and hardware.bandwidth
    peak, bandwidth = hardware.flops, hardware.bandwidth
    rows = [row for row in rows if row["recorded"]] or rows
    works = [(token_work(facts_of(row), load_of(row)), row["token_seconds"]) for row in rows]

    def least(work: Work) -> float:
        moved = (work.weights + work.activations) / bandwidth
        return moved + work.flops / (matmul * peak)

    columns = least_squares(
        [
            (
                w.weights / bandwidth,
                w.activations / bandwidth,
                w.logits / bandwidth,
                w.layer_passes,
            )
            for w, _ in works
        ],
        [max(s - least(w), 0.1 * s) for w, s in works],
        [s for _, s in works],
    )
    return {
        "decode_weight_moves": 1 + columns[0],
        "decode_cache_moves": 1 + columns[1],
        "decode_logit_moves": columns[2],
        "decode_layer_seconds": columns[3],
    }


def _link(rows: Sequence[Row], hardware: Hardware) -> float:
    """Share of the link's rate that a large all-gather reaches."""
    found = [row for row in rows if row["kind"] == "collective"]
    if not found or not hardware.link:
        return 1.0
    large = max(row["bytes"] for row in found)
    return min(
        row["bytes"] * (row["processes"] - 1) / row["processes"] / row["all_gather"] / hardware.link
        for row in found
        if row["bytes"] == large
    )


def _hook_seconds(row: Row, hardware: Hardware, efficiency: Efficiency) -> float:
    facts, layout, load = facts_of(row), layout_of(row, hardware), load_of(row)
    work = micro_batch_work(facts, layout, load)
    known = pass_seconds(work, hardware, efficiency)
    known += gathering_seconds(work, hardware, efficiency, layout)
    return max(row["micro_seconds"] - known, 0.0) / work.layer_passes


# ---------------------------------------------------------------- the test


def predictions(rows: Sequence[Row], hardware: Hardware) -> list[dict[str, Any]]:
    """Measured numbers beside their predictions: ``{quantity, row, measured, predicted}``.

    Times of a model are predicted by a fit to the rows of the other models; bytes need no fit.

    Raises ``ValueError`` if there is only one model.
    """
    measured = [row for row in rows if row["kind"] in ("update", "decode")]
    sizes = sorted({facts_of(row).parameters for row in measured})
    found = []
    for size in sizes:
        mine = [row for row in measured if facts_of(row).parameters == size]
        others = [row for row in rows if row not in mine]
        efficiency = fit(others, hardware)
        decoding = sum(row["kind"] == "decode" for row in others) >= LEAST_ROLLOUTS
        for row in mine:
            found += _of_row(row, hardware, efficiency, decoding=decoding)
    return found


def _of_row(
    row: Row, hardware: Hardware, efficiency: Efficiency, *, decoding: bool
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def add(quantity: str, measured: float, predicted: float) -> None:
        found.append(
            {"quantity": quantity, "row": row, "measured": measured, "predicted": predicted}
        )

    facts, layout, load = facts_of(row), layout_of(row, hardware), load_of(row)
    if row["kind"] == "decode":
        if row["before"]:  # on a CPU a library's scratch memory is all that one sees
            add("rollout memory", *memory_of(row, hardware))
        if decoding and (row["recorded"] or hardware.kind != "cuda"):
            token = token_seconds(token_work(facts, load), hardware, efficiency)
            add("decoding time", row["token_seconds"], token)
        prefill = prefill_work(facts, layout, load)
        add("prefill time", row["prefill_seconds"], pass_seconds(prefill, hardware, efficiency))
        return found
    add("update memory", *memory_of(row, hardware))
    work = micro_batch_work(facts, layout, load)
    seconds = pass_seconds(work, hardware, efficiency)
    if layout.zero == 3:
        if efficiency.zero3_layer_seconds is not None:
            seconds += gathering_seconds(work, hardware, efficiency, layout)
            add("update time, ZeRO-3", row["micro_seconds"], seconds)
        return found
    add("update time", row["micro_seconds"], seconds)
    forward = micro_batch_work(facts, layout, load, backward=False)
    add("forward time", row["forward_seconds"], pass_seconds(forward, hardware, efficiency))
    return found


def errors(found: Sequence[dict[str, Any]]) -> dict[str, Error]:
    """By quantity, the error of predictions."""
    ratios: dict[str, list[float]] = {}
    for one in found:
        ratios.setdefault(one["quantity"], []).append(one["measured"] / one["predicted"])
    return {quantity: prediction_interval(values) for quantity, values in ratios.items()}


def prediction_interval(ratios: Sequence[float]) -> Error:
    """95 % interval for the ratio of one more case, from the spread of their logarithms:
    ``mean +- t sd sqrt(1 + 1 / n)``. With a single row, that row is all that is known."""
    logs = [math.log(ratio) for ratio in ratios]
    worst = max(ratios, key=lambda ratio: abs(math.log(ratio)))
    n, mean = len(logs), statistics.fmean(logs)
    if n == 1:
        return Error(1, min(1.0, ratios[0]), max(1.0, ratios[0]), worst)
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    half = t * statistics.stdev(logs) * math.sqrt(1 + 1 / n)
    return Error(n, math.exp(mean - half), math.exp(mean + half), worst)


def calibrate(path: Path, hardware: Hardware) -> Calibration:
    """Fit and test the rows in ``path``, a file of ``npu_qat.planning.measure``.

    Raises ``ValueError`` if it is none, has too few rows, or was made on another device.
    """
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        rows, environment = measured["rows"], dict(measured["environment"])
        device = str(environment.get("accelerator") or environment["processor"])
        kind = str(environment["device"])
        if not all(isinstance(row["kind"], str) for row in rows):
            raise ValueError("its rows have no kind")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--calibrate {path}: no result of python -m npu_qat.planning.measure: {error}"
        ) from error
    if sum(row["kind"] == "decode" for row in rows) < LEAST_ROLLOUTS:
        raise ValueError(f"--calibrate {path}: needs at least {LEAST_ROLLOUTS} rollouts")
    if not _same_device(kind, device, hardware):
        raise ValueError(f"--calibrate {path}: measured on {device}, not on {hardware.name}")
    efficiency = fit(rows, hardware)
    tested = errors(predictions(rows, hardware))
    storages = tuple(
        sorted({row["storage"] for row in rows if row["kind"] in ("update", "decode")})
    )
    return Calibration(efficiency, tested, path.name, device, storages)


def _same_device(kind: str, name: str, hardware: Hardware) -> bool:
    """Whether rows of a device ``name`` of PyTorch's type ``kind`` are of ``hardware``.

    By the model in its name (``H100``); names of NPUs do not tell more than that they are some.
    """
    if not kind.startswith(hardware.kind):
        return False
    models = [word for word in hardware.name.split() if re.fullmatch(r"[A-Z]+\d+[A-Z]*", word)]
    return hardware.kind != "cuda" or not {*models}.isdisjoint(re.findall(r"\w+", name.upper()))


def main() -> int:
    """Write a calibration, and print what it says."""
    parser = argparse.ArgumentParser(
        prog="npu_qat.planning.calibration", description="Fit efficiencies to measured rows."
    )
    parser.add_argument("rows", type=Path, help="a file of npu_qat.planning.measure")
    parser.add_argument("--soc", required=True, help="the device that it was measured on")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the result")
    args = parser.parse_args()
    try:
        found = calibrate(args.rows, find_hardware(args.soc))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(found.as_dict(), indent=1) + "\n"
    args.json.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
