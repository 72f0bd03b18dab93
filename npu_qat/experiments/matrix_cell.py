"""Carry out one cell of a matrix and make its record.

The record is what a report needs and nothing that does not fit into a repository: outcomes problem
by problem (so that any comparison can be made later), the learning curve, what noise was really
there, the audit's checks, which problems every step read, a checksum of the trained adapter, and
what it all depended on. Checkpoints, samples and TensorBoard files stay in the run's folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import traceback
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.experiments.matrix import Cell, settings_of
from npu_qat.experiments.matrix_store import FORMAT, PACKAGE, code_digest, pack_outcomes

if TYPE_CHECKING:
    from rich.console import Console

# Curves that a report may draw, where the method has them.
CURVES = (
    *("accuracy_train", "reward_mean", "loss", "grad_norm", "distill_kl", "completion_length_mean"),
    *("logp_gap_on_mean", "logp_gap_off_mean", "tis_weight_mean", "clip_fraction_high"),
)
DIGITS = 5


def run_cell(cell: Cell, run_dir: Path, console: Console) -> dict[str, Any]:
    """Carry out ``cell`` in ``run_dir`` (going on where an earlier attempt stopped).

    Returns:
        The record; ``status`` is ``done``, or ``failed`` with the error.

    Raises:
        Interrupted: the user stopped it; nothing is to be recorded.
    """
    from npu_qat.training.loop import Interrupted

    started = time.time()
    record = {
        "format": FORMAT,
        "matrix": cell.matrix,
        "arm": cell.arm.name,
        "model": cell.model,
        "seed": cell.seed,
        "digest": cell.digest,
        "code": code_digest(),
        "settings": settings_of(cell.config),
        "served": {name: settings_of(config) for name, config in cell.served.items()},
    }
    try:
        if cell.config is None:
            raise ValueError(cell.refusal)
        found = _carry_out(cell, run_dir, console)
        record |= {"status": "done", **found}
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the other cells go on
        console.print(f"{cell.id} failed: {type(error).__name__}: {error}", markup=False)
        record |= {
            "status": "failed",
            "error": {
                "type": type(error).__name__,
                "text": str(error),
                "traceback": _without_places(traceback.format_exc(limit=-6)).splitlines()[-12:],
            },
            **_environment(run_dir),
        }
        audit = _read(run_dir / "audit.json")
        if audit is not None:
            record["audit"] = _audit(audit)
    record |= {"seconds": round(time.time() - started, 1), "finished": _now()}
    return record


def _carry_out(cell: Cell, run_dir: Path, console: Console) -> dict[str, Any]:
    """Train and evaluate, or only evaluate; what there is to record of it."""
    from npu_qat.experiments.run import evaluate_as, execute

    config, row = cell.config, cell.arm.name
    assert config is not None
    if not cell.arm.train:
        found = {row: _evaluation(run_dir, row, evaluate_as(config, row, run_dir, console))}
        return {"evaluations": found, **_environment(run_dir), **_inputs(cell, run_dir, row)}
    resumable = config.run.model_copy(update={"resume": "auto"})
    summary = execute(config.model_copy(update={"run": resumable}), run_dir, console, report=False)
    trained = f"{summary['mode']}_trained"
    arm = summary["mode"]
    found = {}
    for name, measured in summary["arms"].items():
        found[row if name == trained else name] = _evaluation(run_dir, name, measured)
    for name, served in cell.served.items():
        adapter = run_dir / "adapters" / summary["mode"]
        measured = evaluate_as(served, f"served-{name}", run_dir, console, adapter=adapter)
        found[f"{row}@{name}"] = _evaluation(run_dir, f"served-{name}", measured)
    return {
        "evaluations": found,
        **_training(run_dir, arm),
        **_environment(run_dir),
        **_inputs(cell, run_dir, trained),
    }


def _evaluation(run_dir: Path, name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """``measured`` with its outcomes problem by problem, in few characters."""
    rows = _lines(run_dir / "evaluations" / f"{name}.jsonl")
    if "strict" in measured:
        return {**measured, "outcomes": pack_outcomes([row["strict"] for row in rows])}
    return {
        **measured,
        "nll": [round(row["nll"], 4) for row in rows],
        "answer_tokens": [row["tokens"] for row in rows],
    }


def _training(run_dir: Path, arm: str) -> dict[str, Any]:
    """What the steps of ``arm`` and the audit say."""
    steps = [line for line in _lines(run_dir / "metrics.jsonl") if line["arm"] == arm]
    during = [line for line in steps if "evaluation" in line]
    steps = [line for line in steps if "data" in line]
    audit = _read(run_dir / "audit.json")
    assert audit is not None
    adapter = run_dir / "adapters" / arm / "adapter_model.safetensors"
    return {
        "steps": len(steps),
        "updates": sum(line.get("updates", 0) for line in steps),
        # One digest of the problems of all steps, in order, and one of each step.
        "data": hashlib.sha256("".join(line["data"] for line in steps).encode()).hexdigest()[:12],
        "data_steps": [line["data"][:4] for line in steps],
        "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest()[:16],
        "curves": {
            name: [_short(line.get(name)) for line in steps]
            for name in CURVES
            if any(line.get(name) is not None for line in steps)
        },
        "held_out": [{"step": line["step"], **line["evaluation"]} for line in during],
        "noise": _noise(audit),
        "audit": _audit(audit),
    }


def _noise(audit: Mapping[str, Any]) -> dict[str, Any]:
    """What noise was really there, measured from the tensors."""
    noisy = [r for r in audit["noise"]["steps"] if r["sigma"] > 0]
    if not noisy:
        return {"noisy_steps": 0}
    ratios = [r["sigma_realized"] / r["sigma"] for r in noisy]
    squares = [r["rms_realized"] ** 2 for r in noisy]
    return {
        "noisy_steps": len({r["step"] for r in noisy}),
        "sigma_first": noisy[0]["sigma"],
        "sigma_last": noisy[-1]["sigma"],
        # The first is free of multipliers, the second holds them.
        "realized_over_scheduled": _short(sum(ratios) / len(ratios)),
        "rms_realized": _short((sum(squares) / len(squares)) ** 0.5),
        "norms_changed": sorted({r["norms_changed"] for r in noisy}),
        "norms_expected": sorted({r["norms_expected"] for r in noisy}),
    }


def _audit(audit: Mapping[str, Any]) -> dict[str, Any]:
    gradients = {k: v for k, v in audit.get("first_update_gradients", {}).items() if "lora_B" in k}
    return {
        "verdict": audit["verdict"],
        "checks": audit["checks"],
        "adapters": len(gradients),
        "adapters_without_gradient": sum(value == 0.0 for value in gradients.values()),
    }


def _environment(run_dir: Path) -> dict[str, Any]:
    found = _read(run_dir / "environment.json")
    return {} if found is None else {"environment": found}


def _inputs(cell: Cell, run_dir: Path, evaluation: str) -> dict[str, Any]:
    """Checksums of the model, of the training problems and of the problems that were evaluated."""
    from npu_qat.layers.base_model import model_source
    from npu_qat.tasks import load_task

    assert cell.config is not None
    rows = _lines(run_dir / "evaluations" / f"{evaluation}.jsonl")
    train = "\n".join(
        f"{p.id}\t{p.question}\t{p.solution}" for p in load_task(cell.config.task).train
    )
    return {
        "model_digest": model_digest(model_source(cell.config.model)),
        "train_digest": hashlib.sha256(train.encode()).hexdigest()[:12],
        "test_digest": hashlib.sha256("\n".join(r["id"] for r in rows).encode()).hexdigest()[:12],
    }


@lru_cache(maxsize=8)
def model_digest(source: str) -> str:
    """Digest of a local model's configuration and weights; of another one its hub name."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _without_places(text: str) -> str:
    """``text`` without the folders of this machine: a result may be published."""
    text = text.replace(f"{PACKAGE.parent}/", "")
    return re.sub(r"/[^\s\"']*/(site-packages|lib/python[0-9.]+)/", r"\1/", text)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): texts may hold U+2028.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
