"""From the `task:` section of a configuration to problems and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npu_qat.config import TaskConfig
from npu_qat.tasks import PUBLISHED_SUFFIX, Task, load_task


def test_default_word_problems() -> None:
    task = load_task(TaskConfig(train_size=30, test_size=12))
    assert isinstance(task, Task)
    assert (task.name, len(task.train), len(task.test)) == ("word_problems", 30, 12)
    assert {p.level for p in task.train} == {1, 2, 3}


def test_default_sizes() -> None:
    task = load_task(TaskConfig())
    assert (len(task.train), len(task.test)) == (4096, 1024)


def test_published_suffix_ends_the_prompt() -> None:
    assert PUBLISHED_SUFFIX == (
        'Let\'s think step by step and output the final answer after "####".'
    )
    task = load_task(TaskConfig(train_size=1, test_size=1))
    problem = task.train[0]
    assert task.messages(problem) == [
        {"role": "user", "content": f"{problem.question} {PUBLISHED_SUFFIX}"}
    ]


@pytest.mark.parametrize(("suffix", "end"), [("", "?"), ("Be brief.", "? Be brief.")])
def test_own_suffix(suffix: str, end: str) -> None:
    task = load_task(TaskConfig(train_size=1, test_size=1, prompt_suffix=suffix))
    assert task.messages(task.train[0])[0]["content"].endswith(end)


def test_word_problems_take_no_path() -> None:
    with pytest.raises(ValueError, match=r"remove task\.path"):
        load_task(TaskConfig(path="somewhere"))


def test_gsm8k_sizes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        lines = [{"question": f"{split} {n}?", "answer": f"#### {n}"} for n in range(5)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    whole = load_task(TaskConfig(name="gsm8k", path=str(tmp_path)))
    assert (len(whole.train), len(whole.test)) == (5, 5)
    part = load_task(TaskConfig(name="gsm8k", path=str(tmp_path), train_size=2, test_size=3))
    assert [p.answer for p in part.train] == ["0", "1"]
    assert len(part.test) == 3
    with pytest.raises(ValueError, match="train_size is 6, but the train split has 5"):
        load_task(TaskConfig(name="gsm8k", path=str(tmp_path), train_size=6))
