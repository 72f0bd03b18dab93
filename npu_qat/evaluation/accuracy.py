"""How well a model answers: greedy, noise off, in the numbers that will be served.

Every problem is answered once, greedily, through the same sampler that rollouts use, in phase
``evaluation`` (quantisers on whatever ``apply_during`` says). Two scores are kept for each problem:
the strict one that training rewards (``#### N``) and the flexible one (last number in the text),
because a model that lost only the format looks destroyed by the first and unharmed by the second.
Outcomes are kept by problem, so that arms can be compared pairwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from npu_qat.layers import QuantizedModel
from npu_qat.tasks import Problem, accuracy_reward, flexible_reward
from npu_qat.training.rollout import SamplingParams, sample


@dataclass(frozen=True)
class Outcome:
    """One answered problem."""

    id: str
    level: int
    strict: bool
    flexible: bool
    length: int
    truncated: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def answer_problems(
    model: Any,
    quantized: QuantizedModel | None,
    problems: Sequence[Problem],
    *,
    encode: Callable[[Problem], list[int]],
    decode: Callable[[list[int]], str],
    eos_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    stop: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Answer ``problems`` greedily and score each.

    Args:
        model: a causal language model in evaluation mode, without noise.
        quantized: its handle, or None for a 16-bit model.
        problems: what to answer.
        encode: prompt tokens of a problem.
        decode: text of a completion.
        eos_ids, pad_id: of the tokenizer.
        max_new_tokens: longest answer.
        batch_size: rows decoded together.
        stop: called once a token; may raise to abandon the evaluation.

    Returns:
        One outcome a problem, in order.
    """
    with nullcontext() if quantized is None else quantized.phase("evaluation"):
        completions = sample(
            model,
            [encode(problem) for problem in problems],
            [],
            SamplingParams(max_new_tokens, temperature=0.0),
            eos_ids=eos_ids,
            pad_id=pad_id,
            batch_size=batch_size,
            stop=stop,
        )
    outcomes = []
    for problem, completion in zip(problems, completions, strict=True):
        text = decode(completion.tokens)
        outcomes.append(
            Outcome(
                id=problem.id,
                level=problem.level,
                strict=accuracy_reward(text, problem) == 1.0,
                flexible=flexible_reward(text, problem) == 1.0,
                length=len(completion.tokens),
                truncated=completion.truncated,
            )
        )
    return outcomes
