"""A supervised run that is judged by perplexity, with a teacher: its files and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.experiments.running import carry_out, configuration, metrics
from tests.training.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_tiny_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("done") / "run"
    config = configuration(
        model,
        train={
            **{"method": "sft", "steps": 3, "lr": 1e-3, "warmup_steps": 1},
            **{"micro_batch_size": 4, "checkpoint_every": 1},
        },
        noise={"enabled": False},
        distill={"weight": 0.5, "teacher": "bf16_lora"},
        evaluation={
            **{"problems": 8, "baselines": ["ptq", "bf16_lora"], "every": 2, "batch_size": 4},
            **{"metric": "answer_perplexity"},
        },
    )
    carry_out(config, folder)
    return folder


def test_its_evaluations_hold_likelihoods_and_ratios(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    assert set(summary["arms"]) == {
        *("w4a4_ptq", "w4a4_trained", "bf16_lora", "bf16_lora_served_w4a4"),
    }
    for name, arm in summary["arms"].items():
        rows = [
            json.loads(x) for x in (done / "evaluations" / f"{name}.jsonl").read_text().splitlines()
        ]
        assert len(rows) == arm["n"] == 8 and arm["tokens"] == sum(r["tokens"] for r in rows)
        assert arm["answer_perplexity"]["low"] < arm["answer_perplexity"]["mean"]
    ratios = {c["b"]: c for c in summary["comparisons"]}
    ptq = summary["arms"]["w4a4_ptq"]["answer_perplexity"]["mean"]
    trained = summary["arms"]["w4a4_trained"]["answer_perplexity"]["mean"]
    assert ratios["w4a4_ptq"]["ratio"] == pytest.approx(trained / ptq)


def test_the_teacher_is_trained_first_and_its_term_is_in_the_loss(done: Path) -> None:
    steps = [line for line in metrics(done) if "loss" in line]
    assert [line["arm"] for line in steps] == ["bf16_lora"] * 3 + ["w4a4"] * 3
    assert all("distill_kl" not in line for line in steps[:3])
    assert all(line["distill_kl"] > 0 for line in steps[3:])
    audit = json.loads((done / "audit.json").read_text())
    [check] = [c for c in audit["checks"] if "divergence from the teacher" in c["name"]]
    assert check["ok"] and check["measured"] == "3 steps"


def test_every_step_says_which_problems_it_read(done: Path) -> None:
    steps = [line for line in metrics(done) if "loss" in line]
    by_arm = {arm: [s["data"] for s in steps if s["arm"] == arm] for arm in ("bf16_lora", "w4a4")}
    assert by_arm["bf16_lora"] == by_arm["w4a4"] and len(set(by_arm["w4a4"])) == 3


def test_its_page_speaks_of_perplexity(done: Path) -> None:
    page = (done / "report.html").read_text()
    assert "Perplexity of the answers" in page and "perplexity" in page.split("</h1>")[0]
    assert "Accuracy on held-out problems" not in page
