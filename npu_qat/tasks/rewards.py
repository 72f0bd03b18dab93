"""Reward functions: plain functions of a completion, nothing learnt, nothing hidden.

Training uses the strict form alone, so that a model cannot earn reward without saying which
number is its answer; the flexible form is reported beside it.
"""

from __future__ import annotations

from npu_qat.tasks.answers import flexible_answer, same_number, strict_answer
from npu_qat.tasks.problem import Problem


def accuracy_reward(text: str, problem: Problem) -> float:
    """1.0 if the completion's strict answer (`#### N`) is the right number, else 0.0."""
    found = strict_answer(text)
    return float(found is not None and same_number(found, problem.answer))


def flexible_reward(text: str, problem: Problem) -> float:
    """1.0 if the last number of the completion is the right one, else 0.0."""
    found = flexible_answer(text)
    return float(found is not None and same_number(found, problem.answer))


def soft_overlong_penalty(length: int, max_length: int, buffer: int, factor: float = 1.0) -> float:
    """DAPO's soft penalty for answers that come near the length limit.

    `clamp((max_length - buffer - length) / buffer, -1, 0) * factor`: nothing up to
    `max_length - buffer` tokens, then a straight line down to `-factor` at `max_length`
    (DAPO, arXiv 2503.14476, equation 13). The published W4A4 runs used max_length 1024,
    buffer 256, factor 0.5.

    Args:
        length: tokens in the completion, its end-of-sequence token included.
        max_length: largest number of tokens that a completion may have.
        buffer: length of the ramp in tokens; 0 switches the penalty off.
        factor: penalty at the limit.

    Returns:
        A number in [-factor, 0], to be added to the reward.

    Raises:
        ValueError: if `buffer` is negative or longer than `max_length`, or `factor` is negative.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(
            f"overlong buffer is {buffer} tokens, but completions have at most {max_length}: "
            f"choose a buffer between 0 (no penalty) and {max_length}"
        )
    if factor < 0:
        raise ValueError(f"overlong factor is {factor}: give the size of the penalty, not its sign")
    if buffer == 0:
        return 0.0
    return min(max((max_length - buffer - length) / buffer, -1.0), 0.0) * factor
