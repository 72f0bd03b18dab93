"""Greedy answers, scored twice, in the numbers that will be served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from npu_qat.config import Recipe
from npu_qat.evaluation import accuracy as module
from npu_qat.evaluation.accuracy import Outcome, answer_problems
from npu_qat.layers import QuantizedModel, prepare_model
from npu_qat.tasks import Problem
from npu_qat.training.rollout import Completion
from tests.training.tiny import tiny_model

TEXTS = {
    1: "2 + 2 = 4\n#### 4",
    2: "the answer is 4",
    3: "#### 5 or maybe 4",
    4: "nothing",
}
PROBLEMS = [Problem(f"p{i}", f"question {i}", "#### 4", "4", level=i) for i in TEXTS]


def answers(
    monkeypatch: pytest.MonkeyPatch, quantized: QuantizedModel | None = None
) -> tuple[list[Outcome], list[tuple[object, ...]]]:
    """Outcomes for ``TEXTS`` and the calls of the sampler; token i stands for text i."""
    calls: list[tuple[object, ...]] = []

    def sample(model, prompts, keys, params, **settings):  # type: ignore[no-untyped-def]
        phase = None if quantized is None else quantized._state.phase
        calls.append((prompts, params.temperature, params.max_new_tokens, phase))
        return [Completion([p[0]] * p[0], [0.0] * p[0], truncated=p[0] == 4) for p in prompts]

    monkeypatch.setattr(module, "sample", sample)
    found = answer_problems(
        object(),
        quantized,
        PROBLEMS,
        encode=lambda problem: [problem.level, 9],
        decode=lambda tokens: TEXTS[tokens[0]],
        eos_ids=[1],
        pad_id=0,
        max_new_tokens=17,
        batch_size=3,
    )
    return found, calls


def test_each_problem_has_its_own_outcome_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    found, calls = answers(monkeypatch)
    assert found == [
        Outcome("p1", 1, strict=True, flexible=True, length=1, truncated=False),
        Outcome("p2", 2, strict=False, flexible=True, length=2, truncated=False),
        Outcome("p3", 3, strict=False, flexible=True, length=3, truncated=False),
        Outcome("p4", 4, strict=False, flexible=False, length=4, truncated=True),
    ]
    assert found[0].as_dict().keys() == {
        *("id", "level", "strict", "flexible", "length", "truncated")
    }
    assert calls == [([[1, 9], [2, 9], [3, 9], [4, 9]], 0.0, 17, None)]


def test_it_is_the_evaluation_phase_whatever_surrounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where quantisers are on also if they act during training only."""
    handle = prepare_model(tiny_model(), Recipe(apply_during="training"))
    with handle.phase("rollout"):
        _, calls = answers(monkeypatch, handle)
        assert handle._state.phase == "rollout"
    assert calls[0][-1] == "evaluation"


def test_answers_are_those_of_transformers(tmp_path: Path) -> None:
    model = tiny_model()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    problems = [Problem(f"p{i}", "q", "#### 1", "1", 1) for i in range(2)]
    texts: list[list[int]] = []
    answer_problems(
        model,
        None,
        problems,
        encode=lambda problem: prompts[int(problem.id[1])],
        decode=lambda tokens: texts.append(tokens) or "",
        eos_ids=[95],
        pad_id=0,
        max_new_tokens=6,
        batch_size=1,
    )
    for prompt, tokens in zip(prompts, texts, strict=True):
        out = model.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=6, eos_token_id=95
        )
        assert out[0, len(prompt) :].tolist() == tokens
