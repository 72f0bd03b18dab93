"""Runs whose adapters start from the quantisation error: the start itself, training, resuming."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from npu_qat.config import RunConfig
from npu_qat.experiments.run import evaluate_as
from tests.experiments.running import carry_out, configuration, metrics
from tests.training.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = save_tiny_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)
    return configuration(
        model,
        lora={"r": 8, "alpha": 8, "init": "quantisation_error"},
        train={
            **{"method": "sft", "steps": 2, "lr": 1e-4, "warmup_steps": 1},
            **{"micro_batch_size": 4, "checkpoint_every": 1},
        },
        noise={"enabled": False},
        evaluation={
            **{"problems": 8, "baselines": ["ptq", "bf16_lora"], "batch_size": 4},
            **{"metric": "answer_perplexity"},
        },
    )


@pytest.fixture(scope="module")
def done(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done") / "run"
    carry_out(config, folder)
    return folder


def test_the_audit_says_that_the_start_took_error_away(done: Path) -> None:
    audit = json.loads((done / "audit.json").read_text())
    [check] = [c for c in audit["checks"] if "start from the quantisation error" in c["name"]]
    assert check["ok"] and audit["verdict"] == "pass"


def test_the_16_bit_arm_starts_as_ever(done: Path, config: dict[str, Any], tmp_path: Path) -> None:
    """It has no such error; its first loss is that of a run without the key."""
    config = {**config, "lora": {"r": 8, "alpha": 8}}
    carry_out(config, tmp_path / "run")
    first = [
        next(m for m in metrics(run) if m["arm"] == "bf16_lora") for run in (done, tmp_path / "run")
    ]
    assert first[0]["loss"] == first[1]["loss"]
    quantised = [
        next(m for m in metrics(run) if m["arm"] == "w4a4") for run in (done, tmp_path / "run")
    ]
    assert quantised[0]["loss"] != quantised[1]["loss"]


def test_a_run_that_goes_on_is_the_uninterrupted_one(
    done: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    carry_out(config, tmp_path / "run")
    evaluations = tmp_path / "run" / "evaluations"
    (evaluations / "w4a4_trained.jsonl").unlink()
    newest = max((tmp_path / "run" / "checkpoints" / "w4a4").iterdir())
    for file in sorted(newest.rglob("*"), reverse=True):
        file.unlink()
    newest.rmdir()
    carry_out(config, tmp_path / "run", resume=True)
    name = "evaluations/w4a4_trained.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (done / name).read_bytes()


def test_the_start_alone_can_be_evaluated(config: dict[str, Any], tmp_path: Path) -> None:
    """Problem by problem it is nearer to the 16-bit model than plain rounding is."""

    def likelihoods(changes: dict[str, Any], name: str) -> list[float]:
        given = RunConfig.model_validate({**config, **changes})
        evaluate_as(given, name, tmp_path / name, Console(file=io.StringIO()))
        lines = (tmp_path / name / "evaluations" / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line)["nll"] for line in lines]

    def distance(a: list[float], b: list[float]) -> float:
        return sum(abs(x - y) for x, y in zip(a, b, strict=True))

    plain = {"lora": {"r": 48, "alpha": 48}}
    full_rank = {"lora": {**plain["lora"], "init": "quantisation_error"}}
    recipe = {"quant": {"injection_point": "weight"}}
    bf16 = likelihoods({**plain, "quant": {"injection_point": "none"}}, "bf16")
    ptq = likelihoods({**plain, **recipe}, "ptq")
    started = likelihoods({**full_rank, **recipe}, "started")
    assert distance(started, bf16) < 0.5 * distance(ptq, bf16)
