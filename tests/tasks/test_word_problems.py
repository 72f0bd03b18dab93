"""Generated word problems: right by design, reproducible, and split by the text alone."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from npu_qat.tasks import is_held_out, strict_answer, word_problems
from npu_qat.tasks.word_problems import LEVELS, generate

EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


def check_solution(solution: str) -> tuple[list[int], int]:
    """Parse a worked answer independently of the generator; returns its results and its answer."""
    *lines, last = solution.split("\n")
    results = []
    for line in lines:
        match = EQUATION.fullmatch(line)
        assert match, f"not an equation: {line!r}"
        left, sign, right, value = match.groups()
        a, b, c = int(left), int(right), int(value)
        expected = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
        assert c == expected, line
        results.append(c)
    assert last.startswith("#### ")
    return results, int(last.removeprefix("#### "))


@pytest.mark.parametrize("level", sorted(LEVELS))
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_equation_is_true_and_the_last_result_is_the_answer(split: str, level: int) -> None:
    for problem in generate(split, 1500, [level], seed=7):
        results, answer = check_solution(problem.solution)
        assert answer == results[-1] == int(problem.answer)
        assert strict_answer(problem.solution) == problem.answer
        assert len(results) == level == problem.level
        assert all(1 <= value <= LEVELS[level].limit for value in results)


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_equations_use_only_numbers_from_the_question_or_earlier_results(level: int) -> None:
    """A worked answer must follow from the question. Some words stand for a number."""
    words = {"half": 2, "doubles": 2, "triples": 3, "quadruples": 4}
    for problem in generate("train", 1000, [level], seed=3):
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        known |= {value for word, value in words.items() if word in problem.question}
        if "% off" in problem.question:
            known |= {10} | {number // 10 for number in known}
        for line in problem.solution.split("\n")[:-1]:
            left, _, right, value = EQUATION.fullmatch(line).groups()  # type: ignore[union-attr]
            assert {int(left), int(right)} <= known, problem
            known.add(int(value))


def test_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    first = generate("train", 200, [1, 2, 3], seed=5)
    assert first == generate("train", 200, [1, 2, 3], seed=5)
    assert first != generate("train", 200, [1, 2, 3], seed=6)


def test_known_first_problems() -> None:
    """Committed numbers: the generator must not drift, or stored results lose their meaning."""
    found = [(p.id, p.answer) for p in generate("test", 4, [1, 2, 3, 4], seed=0)]
    assert found == [
        ("wp-6ec8fddee11a3e41", "9"),
        ("wp-047227946ddf8f45", "26"),
        ("wp-75dca8dc182dd5d9", "49"),
        ("wp-d7698322b0065ab0", "273"),
    ]


def test_larger_split_starts_with_the_smaller_one() -> None:
    assert generate("test", 300, [1, 3], seed=0)[:100] == generate("test", 100, [1, 3], seed=0)


def test_splits_share_no_question_whatever_their_seeds() -> None:
    train = {p.question for seed in range(4) for p in generate("train", 1500, [1, 2, 3, 4], seed)}
    test = {p.question for seed in range(4, 8) for p in generate("test", 500, [1, 2, 3, 4], seed)}
    assert not train & test
    assert all(map(is_held_out, test)) and not any(map(is_held_out, train))


def test_problems_of_a_split_are_distinct_with_unique_ids() -> None:
    problems = generate("train", 6000, [1, 2, 3, 4], seed=0)
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == 6000


def test_levels_come_in_the_listed_proportion() -> None:
    counts = Counter(p.level for p in generate("train", 400, [1, 2, 2, 4], seed=0))
    assert counts == {1: 100, 2: 200, 4: 100}


def test_every_template_appears() -> None:
    """A template whose drafts are always rejected would be dead weight."""
    for level in LEVELS:
        problems = generate("train", 3000, [level], seed=0)
        shapes = {re.sub(r"\d+|[A-Z][a-z]+", "", p.question)[:12] for p in problems}
        assert len(shapes) >= 4, shapes


@pytest.mark.parametrize("levels", [[], [0], [1, 9]])
def test_unknown_levels_are_refused(levels: list[int]) -> None:
    with pytest.raises(ValueError, match="choose"):
        generate("train", 1, levels, seed=0)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'test'"):
        generate("dev", 1, [1], seed=0)


def test_draw_problem_refuses_unknown_level() -> None:
    import random

    with pytest.raises(ValueError, match="level 7"):
        word_problems.draw_problem(random.Random(0), 7)
