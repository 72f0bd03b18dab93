"""How likely a model finds the worked answers: perplexity of the answer's tokens alone.

    ppl = exp( sum_i nll_i / sum_i tokens_i )       over problems i

where ``nll_i`` is the negative log-likelihood of problem i's worked solution and end token, given
its chat prompt. The prompt's tokens do not count: they are the same for every model, and easy.

Accuracy asks whether a small model solves a hard benchmark, which it seldom does: differences
drown. Perplexity moves with every token, so it sees what 4 bits cost long before the accuracy does.
It says less about use, and it is compared between models with the same tokenizer only.

Problems are the sampling unit (tokens of one answer hang together), so the interval is that of a
ratio estimator over problems (Cochran, Sampling Techniques, 3rd ed., 6.4), on the log scale:

    r = sum nll / sum tokens,   se(r) = sqrt( n / (n-1) * sum (nll_i - r tokens_i)^2 ) / sum tokens

and two models are compared problem by problem, which takes out how hard each problem is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from npu_qat.evaluation.intervals import Estimate

if TYPE_CHECKING:
    import torch

    from npu_qat.layers import QuantizedModel
    from npu_qat.tasks import Problem

RATIO_METHOD = "ratio estimator over problems, paired"


@dataclass(frozen=True)
class AnswerLikelihood:
    """One problem: ``nll`` (nats) of its worked solution's ``tokens`` tokens."""

    id: str
    level: int
    nll: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def answer_likelihoods(
    model: Any,
    quantized: QuantizedModel | None,
    problems: Sequence[Problem],
    *,
    encode: Callable[[Problem], list[int]],
    encode_answer: Callable[[str], list[int]],
    pad_id: int,
    batch_size: int,
    device: torch.device,
    stop: Callable[[], None] = lambda: None,
) -> list[AnswerLikelihood]:
    """Score the worked solution of each problem, teacher-forced, in phase ``evaluation``.

    Args:
        model: a causal language model in evaluation mode, without noise.
        quantized: its handle, or None for a 16-bit model.
        problems: whose solutions are scored.
        encode: prompt tokens of a problem.
        encode_answer: tokens of a solution, with the token that ends it.
        pad_id: of the tokenizer.
        batch_size: rows a forward pass.
        device: of the model.
        stop: called before each batch; may raise to abandon the evaluation.

    Returns:
        One record a problem, in order.
    """
    import torch

    from npu_qat.training.batches import Sample, collate, completion_logp

    samples = [Sample(encode(p), encode_answer(p.solution)) for p in problems]
    # Rows of similar length together, so that little is padding.
    order = sorted(range(len(samples)), key=lambda i: samples[i].tokens + len(samples[i].prompt))
    nll: dict[int, float] = {}
    with torch.no_grad(), nullcontext() if quantized is None else quantized.phase("evaluation"):
        for start in range(0, len(order), batch_size):
            stop()
            chosen = order[start : start + batch_size]
            batch = collate([samples[i] for i in chosen], pad_id, device)
            rows = -(completion_logp(model, batch) * batch.mask).double().sum(-1)
            nll |= dict(zip(chosen, rows.tolist(), strict=True))
    return [
        AnswerLikelihood(p.id, p.level, nll[i], samples[i].tokens) for i, p in enumerate(problems)
    ]


def perplexity(nll: Sequence[float], tokens: Sequence[int], confidence: float = 0.95) -> Estimate:
    """Perplexity with its interval; ``n`` is the number of problems.

    Raises ``ValueError`` for fewer than 2 problems, or sequences of different lengths.
    """
    return _exp_ratio(nll, tokens, confidence)


def perplexity_ratio(
    a: Sequence[float], b: Sequence[float], tokens: Sequence[int], confidence: float = 0.95
) -> Estimate:
    """``ppl(a) / ppl(b)`` with its interval, from the likelihoods of the same problems' answers.

    1.03 is 3 % more perplexity. Raises ``ValueError`` as ``perplexity``.
    """
    if len(a) != len(b):
        raise ValueError(
            f"paired likelihoods need the same problems in the same order, got {len(a)} and "
            f"{len(b)}"
        )
    return _exp_ratio([x - y for x, y in zip(a, b, strict=True)], tokens, confidence)


def _exp_ratio(values: Sequence[float], tokens: Sequence[int], confidence: float) -> Estimate:
    n = len(values)
    if n != len(tokens) or n < 2:
        raise ValueError(
            f"a perplexity needs 2 or more problems with their numbers of tokens, got {n} and "
            f"{len(tokens)}"
        )
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1 (0.95 for 95 %), not {confidence}")
    total = sum(tokens)
    rate = math.fsum(values) / total
    spread = math.fsum((v - rate * t) ** 2 for v, t in zip(values, tokens, strict=True))
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(n / (n - 1) * spread) / total
    return Estimate(math.exp(rate), math.exp(rate - half), math.exp(rate + half), n)
