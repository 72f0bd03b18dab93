"""Arithmetic word problems, generated: an endless supply with answers that are right by design.

A small model can learn them in minutes, so they carry the demo on a machine with no network. They
look like GSM8K's: a short story, one equation a line, then `#### N`:

    Tom has 14 apples. He buys 3 bags of 6. How many apples does Tom have now?
    3*6=18
    14+18=32
    #### 32

The level of a problem is its number of equations, one to four; higher levels also use larger
numbers (`LEVELS`). A `_Work` sheet computes every number that appears, so an equation cannot be
wrong; a draft that would need a negative number, a fraction or one over the level's limit is
thrown away and drawn anew.

Everything follows from the seed: split and seed open a random stream, and the n-th problem is the
n-th that the stream gives for this split. So a larger `test_size` keeps the problems of a smaller
one and adds to them, and the training size moves no test problem. The two splits are disjoint for
every pair of seeds (`npu_qat.tasks.problem.is_held_out`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from npu_qat.tasks.problem import Problem, is_held_out, question_hash

DEFAULT_TRAIN_SIZE = 4096
DEFAULT_TEST_SIZE = 1024


@dataclass(frozen=True)
class Level:
    """Sizes of the numbers in a level's problems: inclusive ranges and the largest result."""

    steps: int
    count: tuple[int, int]
    small: tuple[int, int]
    limit: int


LEVELS: dict[int, Level] = {
    1: Level(steps=1, count=(4, 50), small=(2, 9), limit=200),
    2: Level(steps=2, count=(6, 70), small=(2, 9), limit=400),
    3: Level(steps=3, count=(10, 99), small=(2, 12), limit=999),
    4: Level(steps=4, count=(15, 150), small=(3, 15), limit=2500),
}

_PEOPLE = (
    ("Tom", "He"), ("Ben", "He"), ("Max", "He"), ("Sam", "He"), ("Leo", "He"), ("Jack", "He"),
    ("Ann", "She"), ("Mia", "She"), ("Eva", "She"), ("Lily", "She"), ("Zoe", "She"),
    ("Kate", "She"),
)  # fmt: skip
_THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "toys", "nuts")
_GOODS = ("book", "cup", "hat", "lamp", "pen", "toy", "bag", "ball")
_BOXES = ("bags", "boxes", "packs", "jars")


class _Rejected(Exception):
    """This draft broke a rule of its level; draw another."""


@dataclass
class _Work:
    """The worked answer under way: computes, checks and writes down one equation at a time."""

    limit: int
    lines: list[str] = field(default_factory=list)
    result: int = 0

    def add(self, a: int, b: int) -> int:
        return self._write(a, "+", b, a + b)

    def subtract(self, a: int, b: int) -> int:
        return self._write(a, "-", b, a - b)

    def multiply(self, a: int, b: int) -> int:
        return self._write(a, "*", b, a * b)

    def divide(self, a: int, b: int) -> int:
        if a % b:
            raise _Rejected
        return self._write(a, "/", b, a // b)

    def _write(self, a: int, sign: str, b: int, value: int) -> int:
        if not 1 <= value <= self.limit:
            raise _Rejected
        self.lines.append(f"{a}{sign}{b}={value}")
        self.result = value
        return value


@dataclass(frozen=True)
class _Draw:
    """Random ingredients of one problem."""

    rng: random.Random
    level: Level

    def count(self) -> int:
        return self.rng.randint(*self.level.count)

    def small(self) -> int:
        return self.rng.randint(*self.level.small)

    def pick(self, choices: Sequence[str]) -> str:
        return choices[self.rng.randrange(len(choices))]

    def person(self) -> tuple[str, str]:
        return _PEOPLE[self.rng.randrange(len(_PEOPLE))]

    def people(self, number: int) -> list[str]:
        return [name for name, _ in self.rng.sample(_PEOPLE, number)]

    def goods(self) -> list[str]:
        return self.rng.sample(_GOODS, 2)


Template = Callable[[_Draw, _Work], str]
_TEMPLATES: dict[int, list[Template]] = {steps: [] for steps in LEVELS}


def _template(*steps: int) -> Callable[[Template], Template]:
    """Register a template for the levels whose number of equations it can write."""

    def register(function: Template) -> Template:
        for number in steps:
            _TEMPLATES[number].append(function)
        return function

    return register


# One to four steps: a stock that changes. Listed twice, since it is the most varied template.


@_template(1, 1, 2, 2, 3, 3, 4, 4)
def _stock(draw: _Draw, work: _Work) -> str:
    name, pronoun = draw.person()
    things = draw.pick(_THINGS)
    total = draw.count()
    story = [f"{name} has {total} {things}."]
    while len(work.lines) < draw.level.steps:
        left = draw.level.steps - len(work.lines)
        event = draw.rng.randrange(6 if left > 1 else 5)
        if event == 0:
            number = draw.count()
            story.append(f"{pronoun} buys {number} more.")
            total = work.add(total, number)
        elif event == 1:
            number = draw.count()
            story.append(f"{pronoun} gives away {number}.")
            total = work.subtract(total, number)
        elif event == 2:
            number = draw.count()
            story.append(f"{pronoun} loses {number}.")
            total = work.subtract(total, number)
        elif event == 3:
            times = draw.rng.randint(2, 4)
            word = ("doubles", "triples", "quadruples")[times - 2]
            story.append(f"{pronoun} {word} them.")
            total = work.multiply(total, times)
        elif event == 4:
            story.append(f"{pronoun} sells half.")
            total = work.divide(total, 2)
        else:
            number, each = draw.small(), draw.small()
            story.append(f"{pronoun} buys {number} {draw.pick(_BOXES)} of {each}.")
            total = work.add(total, work.multiply(number, each))
    return f"{' '.join(story)} How many {things} does {name} have now?"


# One step.


@_template(1)
def _product(draw: _Draw, work: _Work) -> str:
    number, each = draw.small(), draw.count()
    things = draw.pick(_THINGS)
    work.multiply(each, number)
    return f"{number} {draw.pick(_BOXES)} hold {each} {things} each. How many {things} are there?"


@_template(1)
def _equal_shares(draw: _Draw, work: _Work) -> str:
    name, _ = draw.person()
    things = draw.pick(_THINGS)
    friends, each = draw.small(), draw.small()
    total = friends * each
    work.divide(total, friends)
    return f"{name} shares {total} {things} among {friends} friends. How many does each get?"


@_template(1)
def _pages_left(draw: _Draw, work: _Work) -> str:
    name, _ = draw.person()
    pages, read = draw.count(), draw.count()
    work.subtract(pages, read)
    return f"A book has {pages} pages. {name} reads {read}. How many pages are left?"


# Two steps.


@_template(2)
def _change(draw: _Draw, work: _Work) -> str:
    name, _ = draw.person()
    goods = draw.pick(_GOODS)
    price, number = draw.small(), draw.small()
    cost = work.multiply(number, price)
    paid = cost + draw.count()
    work.subtract(paid, cost)
    return (
        f"A {goods} costs {price} dollars. {name} buys {number} and pays {paid} dollars. "
        "How much change is there?"
    )


@_template(2)
def _together(draw: _Draw, work: _Work) -> str:
    first, second = draw.people(2)
    things = draw.pick(_THINGS)
    total, more = draw.count(), draw.count()
    if draw.rng.randrange(2):
        other = work.add(total, more)
        word = "more"
    else:
        other = work.subtract(total, more)
        word = "fewer"
    work.add(total, other)
    return (
        f"{first} has {total} {things}. {second} has {more} {word}. How many do they have together?"
    )


@_template(2)
def _journey(draw: _Draw, work: _Work) -> str:
    speed, hours, more = draw.count(), draw.small(), draw.count()
    work.add(work.multiply(speed, hours), more)
    return (
        f"A train goes {speed} miles an hour for {hours} hours, then {more} miles more. "
        "How far does it go?"
    )


@_template(2)
def _free_seats(draw: _Draw, work: _Work) -> str:
    rows, seats, taken = draw.small(), draw.count(), draw.count()
    work.subtract(work.multiply(seats, rows), taken)
    return f"A hall has {rows} rows of {seats} seats. {taken} are taken. How many seats are free?"


# Three steps.


@_template(3)
def _two_products(draw: _Draw, work: _Work) -> str:
    name, _ = draw.person()
    first, second = draw.goods()
    price, other_price = draw.count(), draw.count()
    number, other_number = draw.small(), draw.small()
    cost = work.multiply(price, number)
    other_cost = work.multiply(other_price, other_number)
    work.add(cost, other_cost)
    return (
        f"A {first} costs {price} dollars and a {second} {other_price}. "
        f"{name} buys {number} of the first and {other_number} of the second. "
        "What is the total cost?"
    )


@_template(3)
def _wages(draw: _Draw, work: _Work) -> str:
    name, pronoun = draw.person()
    wage, hours, days, spent = draw.small(), draw.small(), draw.small(), draw.count()
    daily = work.multiply(wage, hours)
    work.subtract(work.multiply(daily, days), spent)
    return (
        f"{name} earns {wage} dollars an hour and works {hours} hours a day for {days} days. "
        f"{pronoun} spends {spent} dollars. How much is left?"
    )


@_template(3)
def _reading_race(draw: _Draw, work: _Work) -> str:
    first, second = draw.people(2)
    pages, other_pages = draw.count(), draw.count()
    days, other_days = draw.small(), draw.small()
    total = work.multiply(pages, days)
    work.subtract(total, work.multiply(other_pages, other_days))
    return (
        f"{first} reads {pages} pages a day for {days} days. "
        f"{second} reads {other_pages} a day for {other_days} days. "
        f"How many more pages does {first} read?"
    )


@_template(3)
def _discount(draw: _Draw, work: _Work) -> str:
    name, pronoun = draw.person()
    price, tenths = 10 * draw.rng.randint(2, 30), draw.rng.randint(1, 9)
    off = work.multiply(work.divide(price, 10), tenths)
    work.subtract(price, off)
    return (
        f"A {draw.pick(_GOODS)} costs {price} dollars. {name} buys it at {10 * tenths} % off. "
        f"How much does {pronoun.lower()} pay?"
    )


# Four steps.


@_template(4)
def _shopping_change(draw: _Draw, work: _Work) -> str:
    name, _ = draw.person()
    first, second = draw.goods()
    price, other_price = draw.count(), draw.count()
    number, other_number = draw.small(), draw.small()
    cost = work.multiply(price, number)
    total = work.add(cost, work.multiply(other_price, other_number))
    paid = total + draw.count()
    work.subtract(paid, total)
    return (
        f"A {first} costs {price} dollars and a {second} {other_price}. "
        f"{name} buys {number} of the first and {other_number} of the second "
        f"and pays {paid} dollars. How much change is there?"
    )


@_template(4)
def _harvest(draw: _Draw, work: _Work) -> str:
    rows, trees, each, boxes = draw.small(), draw.small(), draw.small(), draw.small()
    sold = draw.count()
    number = work.multiply(rows, trees)
    left = work.subtract(work.multiply(number, each), sold)
    work.divide(left, boxes)
    return (
        f"A farm has {rows} rows of {trees} trees with {each} apples each. {sold} are sold. "
        f"The rest fill {boxes} boxes. How many apples are in a box?"
    )


@_template(4)
def _three_friends(draw: _Draw, work: _Work) -> str:
    first, second, third = draw.people(3)
    things = draw.pick(_THINGS)
    total, times, more = draw.count(), draw.rng.randint(2, 5), draw.count()
    other = work.multiply(total, times)
    last = work.add(other, more)
    work.add(work.add(total, other), last)
    return (
        f"{first} has {total} {things}. {second} has {times} times as many. "
        f"{third} has {more} more than {second}. How many do they have together?"
    )


def draw_problem(rng: random.Random, level: int) -> Problem:
    """Draw one problem of a level; the stream decides everything.

    Raises:
        ValueError: if the level does not exist.
    """
    if level not in LEVELS:
        raise ValueError(f"no word-problem level {level}: choose from {sorted(LEVELS)}")
    templates = _TEMPLATES[level]
    while True:
        work = _Work(limit=LEVELS[level].limit)
        try:
            question = templates[rng.randrange(len(templates))](_Draw(rng, LEVELS[level]), work)
        except _Rejected:
            continue
        answer = str(work.result)
        solution = "\n".join([*work.lines, f"#### {answer}"])
        return Problem(f"wp-{question_hash(question)[:16]}", question, solution, answer, level)


def stream(split: str, levels: Sequence[int], seed: int) -> Iterator[Problem]:
    """Endless distinct problems of one split (`"train"` or `"test"`), cycling through `levels`.

    A level that is listed twice comes twice as often.

    Raises:
        ValueError: if `split` or a level is unknown, or `levels` is empty.
    """
    if split not in {"train", "test"}:
        raise ValueError(f"no split {split!r}: choose 'train' or 'test'")
    unknown = sorted(set(levels) - set(LEVELS))
    if unknown or not levels:
        raise ValueError(f"levels {list(levels)}: choose one or more of {sorted(LEVELS)}")
    rng = random.Random(f"word problems, {split}, {seed}")
    seen: set[str] = set()
    while True:
        for level in levels:
            problem = draw_problem(rng, level)
            while problem.id in seen or is_held_out(problem.question) != (split == "test"):
                problem = draw_problem(rng, level)
            seen.add(problem.id)
            yield problem


def generate(split: str, size: int, levels: Sequence[int], seed: int) -> list[Problem]:
    """The first `size` problems of a split."""
    return list(islice(stream(split, levels, seed), size))
