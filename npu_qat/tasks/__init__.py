"""What is learnt: problems with checkable answers, prompts, answer extraction and rewards.

`load_task` turns the `task:` section of a configuration into a `Task`: generated arithmetic word
problems, which need no network, or GSM8K from a local path or the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from npu_qat.tasks.answers import (
    ANSWER_WINDOW,
    canonical_number,
    flexible_answer,
    same_number,
    strict_answer,
)
from npu_qat.tasks.problem import (
    PUBLISHED_SUFFIX,
    Message,
    Problem,
    ProblemSet,
    Task,
    is_held_out,
    question_hash,
)
from npu_qat.tasks.rewards import accuracy_reward, flexible_reward, soft_overlong_penalty

if TYPE_CHECKING:
    from npu_qat.config import TaskConfig

__all__ = [
    "ANSWER_WINDOW",
    "PUBLISHED_SUFFIX",
    "Message",
    "Problem",
    "ProblemSet",
    "Task",
    "accuracy_reward",
    "canonical_number",
    "flexible_answer",
    "flexible_reward",
    "is_held_out",
    "load_task",
    "question_hash",
    "same_number",
    "soft_overlong_penalty",
    "strict_answer",
]


def load_task(cfg: TaskConfig) -> Task:
    """The task that a configuration names, loaded and checked.

    `prompt_suffix: None` means the published suffix; an empty string means none.

    Raises:
        ValueError: for an unknown level, a malformed or missing GSM8K file, or a size that the
            data does not have.
        ImportError: if the source needs a package that is not installed.
    """
    suffix = PUBLISHED_SUFFIX if cfg.prompt_suffix is None else cfg.prompt_suffix
    if cfg.name == "gsm8k":
        from npu_qat.tasks.gsm8k import load_gsm8k

        train, test = load_gsm8k(cfg.path)
        return ProblemSet(
            cfg.name,
            _first(train, cfg.train_size, "train"),
            _first(test, cfg.test_size, "test"),
            suffix,
        )
    from npu_qat.tasks import word_problems

    if cfg.path is not None:
        raise ValueError(
            f"task.path is {cfg.path!r}, but word problems are generated and read no file: "
            "remove task.path, or set task.name to gsm8k"
        )
    train_size = cfg.train_size or word_problems.DEFAULT_TRAIN_SIZE
    test_size = cfg.test_size or word_problems.DEFAULT_TEST_SIZE
    train = word_problems.generate("train", train_size, cfg.levels, cfg.seed)
    test = word_problems.generate("test", test_size, cfg.levels, cfg.seed)
    return ProblemSet(cfg.name, train, test, suffix)


def _first(problems: Sequence[Problem], size: int | None, split: str) -> Sequence[Problem]:
    if size is not None and size > len(problems):
        raise ValueError(
            f"task.{split}_size is {size}, but the {split} split has {len(problems)} problems"
        )
    return problems if size is None else problems[:size]
