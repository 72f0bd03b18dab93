"""Perplexity of answers: which tokens count, and its interval."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from npu_qat.evaluation.perplexity import answer_likelihoods, perplexity, perplexity_ratio
from npu_qat.tasks import Problem

VOCABULARY = 11


class Echo(torch.nn.Module):
    """Expects each token to be followed by itself, with a fixed confidence."""

    def forward(self, input_ids, logits_to_keep, **_):  # type: ignore[no-untyped-def]
        logits = 2.0 * torch.nn.functional.one_hot(input_ids, VOCABULARY).float()
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def problem(name: str, question: str, solution: str) -> Problem:
    return Problem(name, question, solution, "0", 1)


def score(problems: list[Problem], batch_size: int) -> list[tuple[str, float, int]]:
    found = answer_likelihoods(
        Echo(),
        None,
        problems,
        encode=lambda p: [int(c) for c in p.question],
        encode_answer=lambda text: [*(int(c) for c in text), 10],
        pad_id=0,
        batch_size=batch_size,
        device=torch.device("cpu"),
    )
    return [(f.id, f.nll, f.tokens) for f in found]


HIT = math.log(VOCABULARY - 1 + math.e**2) - 2.0
MISS = math.log(VOCABULARY - 1 + math.e**2)


def test_only_the_answers_tokens_count_its_end_included() -> None:
    # Prompt 3, answer 3 3 end: two hits (after the prompt, after the first 3) and the end token.
    [(name, nll, tokens)] = score([problem("a", "123", "33")], 1)
    assert (name, tokens) == ("a", 3)
    assert nll == pytest.approx(2 * HIT + MISS, rel=1e-5)


def test_batching_and_order_change_nothing() -> None:
    problems = [problem("a", "123", "33"), problem("b", "1", "4567"), problem("c", "12345678", "8")]
    assert [p[0] for p in score(problems, 2)] == ["a", "b", "c"]
    for one, many in zip(score(problems, 1), score(problems, 3), strict=True):
        assert one[1] == pytest.approx(many[1], rel=1e-6)


def test_perplexity_is_over_tokens_and_its_interval_over_problems() -> None:
    e = perplexity([2.0, 6.0], [2, 4])
    assert e.mean == pytest.approx(math.exp(8 / 6)) and e.n == 2
    assert e.low < e.mean < e.high
    # All problems alike: nothing to be uncertain about.
    same = perplexity([2.0] * 5, [2] * 5)
    assert same.low == pytest.approx(same.high) == pytest.approx(math.e)


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        tokens = torch.randint(5, 20, (200,), generator=generator)
        nll = tokens * (1.0 + 0.5 * torch.randn(200, generator=generator))
        e = perplexity(nll.tolist(), tokens.tolist())
        covered += e.low <= math.e <= e.high
    assert 0.91 < covered / 300 < 0.98


def test_a_ratio_is_paired_by_problem() -> None:
    """Hard problems are hard for both; the ratio does not see how hard."""
    a, b, tokens = [2.0, 20.0, 5.0], [1.9, 19.7, 4.9], [2, 6, 2]
    e = perplexity_ratio(a, b, tokens)
    assert e.mean == pytest.approx(math.exp(0.5 / 10))
    alone = perplexity(a, tokens)
    assert e.high - e.low < 0.2 * (alone.high - alone.low) / alone.mean


def test_other_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="same problems"):
        perplexity_ratio([1.0], [1.0, 2.0], [1, 2])
    with pytest.raises(ValueError, match="2 or more"):
        perplexity([1.0], [1])
