"""What a task is: problems with checkable answers, in two disjoint splits, put as chat messages.

A task knows nothing of models or tokenizers. Training asks it for `train` problems and for the
chat messages of each; evaluation asks it for `test` problems; rewards compare a completion with
`Problem.answer`. The worked `Problem.solution` is what supervised fine-tuning imitates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

PUBLISHED_SUFFIX = 'Let\'s think step by step and output the final answer after "####".'
"""The prompt suffix of the published GSM8K runs (verl's `examples/data_preprocess/gsm8k.py`)."""

Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """One question with its worked answer.

    Attributes:
        id: stable name, unique within a task.
        question: the text of the question, without any prompt suffix.
        solution: worked answer; its last line is `#### N`.
        answer: N in canonical form (no thousands separators, no trailing `.0`).
        level: difficulty; the number of worked steps.
    """

    id: str
    question: str
    solution: str
    answer: str
    level: int


@runtime_checkable
class Task(Protocol):
    """What training and evaluation need of a task."""

    @property
    def name(self) -> str: ...

    @property
    def train(self) -> Sequence[Problem]: ...

    @property
    def test(self) -> Sequence[Problem]: ...

    def messages(self, problem: Problem) -> list[Message]:
        """Chat messages that ask `problem`: one user turn, prompt suffix included."""
        ...


@dataclass(frozen=True)
class ProblemSet:
    """A `Task` held in memory."""

    name: str
    train: Sequence[Problem]
    test: Sequence[Problem]
    prompt_suffix: str = PUBLISHED_SUFFIX

    def messages(self, problem: Problem) -> list[Message]:
        """Chat messages that ask `problem`: `question + " " + prompt_suffix` as one user turn."""
        text = f"{problem.question} {self.prompt_suffix}".strip()
        return [{"role": "user", "content": text}]


def question_hash(question: str) -> str:
    """SHA-256 of the question's UTF-8 bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(question.encode("utf-8")).hexdigest()


def is_held_out(question: str, one_in: int = 10) -> bool:
    """Whether a question belongs to the test split: its hash modulo `one_in` is 0.

    The split is a property of the text alone. No seed, size or order of generation can move a
    question from one side to the other, so a model trained on any train split has never seen any
    test question.
    """
    return int(question_hash(question)[:8], 16) % one_in == 0
