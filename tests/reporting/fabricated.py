"""A run directory with invented contents. No number in it was measured; every text says so.

The outcomes by problem are drawn from a seeded generator with chosen rates, and accuracies and
intervals are computed from them, so that the files agree with each other like those of a real run.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import NormalDist
from typing import Any

from npu_qat.evaluation.intervals import paired_difference, proportion

RATES = {
    "bf16_start": 0.45,
    "w4a4_ptq": 0.29,
    "bf16_lora": 0.62,
    "bf16_lora_served_w4a4": 0.49,
    "w4a4_trained": 0.57,
}
STEPS, LAYERS, PROBLEMS = 30, 8, 1024
KINDS = {
    "self_attn.q_proj": 0.118,
    "self_attn.k_proj": 0.114,
    "self_attn.v_proj": 0.116,
    "self_attn.o_proj": 0.121,
    "mlp.gate_proj": 0.117,
    "mlp.up_proj": 0.119,
    "mlp.down_proj": 0.124,
}
CONFIG = """\
# FABRICATED by a test of the report; not a run
run: {seed: 0, device: cpu}
model: {path: FABRICATED, dtype: bf16}
quant: {weight_profile: ascend950, activation_profile: ascend950, injection_point: both}
noise: {enabled: true, sigma_start: 0.05, sigma_end: 0.0005, num_stages: 10, norm_dtype: fp32}
train: {method: dapo, steps: 30, lr: 1.0e-04}
dapo: {logp_gap_limit: 0.05}
evaluation: {confidence: 0.95}
"""


def write_run(path: Path, rates: dict[str, float] | None = None, problems: int = PROBLEMS) -> Path:
    """Write a whole run directory at ``path`` and return it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(CONFIG)
    write_json(
        path / "environment.json",
        {"note": "FABRICATED", "device": "cpu", "versions": {"python": "0.0"}, "git_commit": None},
    )
    write_evaluations(path, rates or RATES, problems)
    write_json(path / "audit.json", audit())
    write_json(path / "summary.json", {"steps": STEPS, "seconds": 411.0, "audit": "pass"})
    write_lines(path / "metrics.jsonl", [*metrics("w4a4"), *metrics("bf16_lora")])
    write_lines(path / "samples.jsonl", samples())
    return path


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def outcomes(rates: dict[str, float], problems: int) -> dict[str, list[dict[str, Any]]]:
    """Correlated outcomes: each problem has a difficulty that all arms share."""
    rng = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in rates}
    for i in range(problems):
        level = i % 3 + 1
        shared = 0.8 * rng.gauss(0, 1) + 0.5 * (level - 2)
        for name, rate in rates.items():
            difficulty = shared + 0.6 * rng.gauss(0, 1)
            solved = difficulty < 1.08 * NormalDist().inv_cdf(rate)
            rows[name].append(
                {
                    "id": f"fabricated-{i}",
                    "level": level,
                    "strict": solved,
                    "flexible": solved or rng.random() < 0.04,
                    "length": rng.randint(30, 90),
                    "truncated": False,
                }
            )
    return rows


def write_evaluations(path: Path, rates: dict[str, float], problems: int) -> None:
    rows = outcomes(rates, problems)
    (path / "evaluations").mkdir(exist_ok=True)
    for name, lines in rows.items():
        write_lines(path / "evaluations" / f"{name}.jsonl", lines)
    arms = {
        name: {"n": len(lines), **{s: estimate(lines, s) for s in ("strict", "flexible")}}
        for name, lines in rows.items()
    }
    comparisons = [
        compare(rows, "w4a4_trained", other)
        for other in rows
        if "w4a4_trained" in rows and other != "w4a4_trained"
    ]
    write_json(
        path / "evaluations.json", {"confidence": 0.95, "arms": arms, "comparisons": comparisons}
    )


def estimate(lines: list[dict[str, Any]], score: str) -> dict[str, float]:
    e = proportion([line[score] for line in lines])
    return {"mean": e.mean, "low": e.low, "high": e.high}


def compare(rows: dict[str, list[dict[str, Any]]], a: str, b: str) -> dict[str, Any]:
    d = paired_difference([r["strict"] for r in rows[a]], [r["strict"] for r in rows[b]])
    return {
        "a": a,
        "b": b,
        "difference": d.mean,
        "low": d.low,
        "high": d.high,
        "method": d.method,
    }


def sigma(step: int) -> float:
    """The published staircase for 30 steps in 10 stages; ``step`` from 1."""
    stage = (step - 1) * 10 // STEPS
    return 0.0 if stage == 0 else 0.05 * 0.01 ** ((stage - 1) / 8)


def metrics(arm: str) -> list[dict[str, Any]]:
    rng = random.Random(arm)
    records = []
    for step in range(1, STEPS + 1):
        rise = 1 - math.exp(-step / 9)
        start, gain = (0.29, 0.27) if arm == "w4a4" else (0.44, 0.17)
        noisy = arm == "w4a4" and sigma(step) > 0
        record = {
            "arm": arm,
            "step": step,
            "time": 1e9 + step,
            "accuracy_train": start + gain * rise + rng.gauss(0, 0.015),
            "reward_mean": start + gain * rise - 0.03 + rng.gauss(0, 0.015),
            "groups_seen": 32,
            "groups_informative": 20 + rng.randint(-3, 3),
            "completion_length_mean": 62 - 9 * rise + rng.gauss(0, 1),
            "truncated_fraction": max(0.0, 0.06 - 0.05 * rise + rng.gauss(0, 0.004)),
            "loss": rng.gauss(0, 0.01),
            "grad_norm": 0.3 + rng.gauss(0, 0.03),
            "clip_fraction_low": 0.004 + abs(rng.gauss(0, 0.001)),
            "clip_fraction_high": 0.006 + abs(rng.gauss(0, 0.001)),
            "logp_gap_off_mean": 0.0004 + abs(rng.gauss(0, 0.0001)),
            "sigma": sigma(step) if noisy else 0.0,
            "norms_changed": 17 if noisy else 0,
            "sigma_realized": sigma(step) * (1 + rng.gauss(0, 0.01)) if noisy else 0.0,
            "rollout_seconds": 4.1 + rng.gauss(0, 0.2),
            "update_seconds": 2.2 + rng.gauss(0, 0.1),
            "tokens_per_second": 3300 + rng.gauss(0, 120),
        }
        if noisy:
            record["logp_gap_on_mean"] = 0.02 * sigma(step) / 0.05 + 0.0005
        records.append(record)
        if step % 10 == 0:
            score = {"strict": start + gain * rise, "low": start + gain * rise - 0.05}
            score["high"] = start + gain * rise + 0.05
            records.append({"arm": arm, "step": step, "evaluation": score})
    return records


def audit() -> dict[str, Any]:
    rng = random.Random(1)
    names = [(f"model.layers.{i}.{kind}", kind, i) for i in range(LAYERS) for kind in KINDS]
    modules = []
    for name, kind, layer in names:
        bump = 1.6 if kind == "mlp.down_proj" and layer in (1, LAYERS - 2) else 1.0
        modules.append(
            {
                "name": name,
                "layer": layer,
                "mode": "W4A4",
                "weight_profile": "ascend950",
                "activation_profile": "ascend950",
                "axis": "row",
                "storage": "image",
                "calls": {"rollout": 9000, "training": 240, "evaluation": 800},
                "weight_rel_error": KINDS[kind] + rng.gauss(0, 0.002),
                "input_rel_error": (KINDS[kind] + 0.03 + rng.gauss(0, 0.006)) * bump,
            }
        )
    modules.append({"name": "lm_head", "layer": None, "mode": "W16A16", "reason": "excluded"})
    stages = [
        {"first_step": 3 * i, "last_step": 3 * i + 2, "sigma": sigma(3 * i + 1), "inert": False}
        for i in range(10)
    ]
    checks = [
        ("planned layers are in the trained model", "56 quantised layers", "56"),
        ("stored weights equal the reference quantisation", "0 layers differ", "0 layers differ"),
        ("noise reaches the norms", "27 noisy blocks change norms", "27 did"),
    ]
    gradients = {
        f"base_model.model.{name}.lora_{side}.default.weight": 0.0 if side == "A" else 0.01
        for name, _, _ in names
        for side in "AB"
    }
    return {
        "verdict": "pass",
        "checks": [{"name": n, "expected": e, "measured": m, "ok": True} for n, e, m in checks],
        "modules": modules,
        "noise": {"enabled": True, "norm_dtype": "float32", "stages": stages},
        "first_update_gradients": gradients,
    }


def samples() -> list[dict[str, Any]]:
    return [
        {
            "arm": arm,
            "step": step,
            "question": f"FABRICATED question {k} of step {step}: 3 boxes of 4 pens?",
            "completion": f"FABRICATED answer of {arm}.\n3 * 4 = 12\n#### {12 if k else 13}",
            "reward": float(k),
            "strict": bool(k),
            "target": "12",
        }
        for arm in ("w4a4", "bf16_lora")
        for step in range(1, STEPS + 1)
        for k in range(2)
    ]
