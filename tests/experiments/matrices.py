"""A small matrix and fabricated results for the tests of matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from npu_qat.experiments.matrix import Cell, Matrix, cells, load_matrix
from npu_qat.experiments.matrix_store import FORMAT, Store, pack_outcomes

TEXT = """
name: small
title: A small matrix
preset: demo
set: {train.steps: 3, evaluation.baselines: [], noise.enabled: false}
seeds: [0, 1, 2]
variants:
  bf16: {quant.injection_point: none}
  w4a4: {quant.injection_point: both}
  noisy: {noise.enabled: true}
arms:
  - {name: start, title: Start, train: false, use: [w4a4]}
  - {name: bf16, title: BF16, use: [bf16], serve: {w4a4: [w4a4]}}
  - {name: plain, title: Plain, use: [w4a4]}
  - {name: noisy, title: Noisy, use: [w4a4, noisy]}
  - {name: late, title: Late, use: [w4a4], set: {train.lr: 1e-4}, seeds: [0], priority: 2}
  - {name: never, title: Never, use: [w4a4], set: {noise.target_modules: [nope]}, seeds: [0],
     expect: refused}
contrasts:
  - {question: "Noise?", answers: aqn, arms: {noisy: 1, plain: -1}}
  - {question: "Training?", answers: viable, arms: {plain: 1, start: -1}}
  - {question: "In 4 bits?", answers: viable, arms: {plain: 1, bf16@w4a4: -1}}
  - {question: "Late?", arms: {late: 1, plain: -1}}
"""


def write_matrix(folder: Path, text: str = TEXT) -> Matrix:
    path = folder / "small.yaml"
    path.write_text(text)
    return load_matrix(path)


def evaluation(solved: int, of: int = 100) -> dict[str, Any]:
    """An accuracy record with ``solved`` right answers."""
    share = solved / of
    return {
        "n": of,
        "strict": {"mean": share, "low": share - 0.1, "high": share + 0.1},
        "flexible": {"mean": share, "low": share - 0.1, "high": share + 0.1},
        "outcomes": pack_outcomes([i < solved for i in range(of)]),
    }


def record(cell: Cell, solved: dict[str, int], **changes: Any) -> dict[str, Any]:
    """The record of a done cell; ``solved`` by row."""
    noisy = cell.config is not None and cell.config.noise.enabled
    noise: dict[str, Any] = {"noisy_steps": 0}
    if noisy:
        noise = {
            "noisy_steps": 2,
            "sigma_first": 0.005,
            "sigma_last": 0.0005,
            "realized_over_scheduled": 1.01,
            "rms_realized": 0.002,
            "norms_changed": [7],
            "norms_expected": [7],
        }
    training = {
        "steps": 3,
        "updates": 12,
        "data": f"data-{cell.seed}",
        "adapter": f"adapter-{cell.id}",
        "curves": {"accuracy_train": [0.2, 0.3, 0.4]},
        "noise": noise,
        "audit": {
            "verdict": "pass",
            "checks": [],
            "adapters": 4,
            "adapters_without_gradient": 0,
        },
    }
    return {
        "format": FORMAT,
        "matrix": cell.matrix,
        "arm": cell.arm.name,
        "model": cell.model,
        "seed": cell.seed,
        "digest": cell.digest,
        "code": "c0de",
        "status": "done",
        "evaluations": {row: evaluation(n) for row, n in solved.items()},
        **(training if cell.arm.train else {}),
        "environment": {
            "backend": "emulation",
            "processor": "a processor",
            "versions": {"python": "3.11.0", "torch": "2.13.0"},
            "git_commit": None,
        },
        "model_digest": "m",
        "train_digest": "t",
        "test_digest": "e",
        "seconds": 10.0,
        "finished": "2026-01-01T00:00:00+00:00",
        **changes,
    }


def failure(cell: Cell, kind: str = "NoiseError") -> dict[str, Any]:
    return {
        **record(cell, {}),
        "status": "failed",
        "error": {"type": kind, "text": "it changes no norm", "traceback": []},
    }


SOLVED = {"bf16": 55, "plain": 43, "noisy": 41, "late": 30}


def fill(matrix: Matrix, folder: Path, **changes: dict[str, Any]) -> Store:
    """Results of every cell, a little different for each seed; ``changes`` by cell id."""
    store = Store(folder)
    for cell in cells(matrix):
        if cell.arm.expect == "refused":
            store.add(cell, failure(cell))
            continue
        name, wobble = cell.arm.name, (0, 2, 1)[cell.seed]
        solved = {name: SOLVED.get(name, 28) + (wobble if cell.arm.train else 0)}
        if name == "noisy":
            solved[name] += 3 * (cell.seed % 2)
        if name == "bf16":
            solved["bf16@w4a4"] = 31 + cell.seed
        store.add(cell, record(cell, solved, **changes.get(cell.id.replace("-", "_"), {})))
    return store


def load(path: Path) -> Any:
    return json.loads(path.read_text())
