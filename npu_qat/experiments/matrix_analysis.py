"""From the result files of a matrix to rows, answered questions and checks.

Everything in a report comes from the matrix file and the result files and is computed here
(``matrix_report`` makes pages of it), so a page can be made anew at any time and compared with the
committed one.

**Rows.** The mean over seeds with Student's t interval. A row without training, or with one seed,
has the interval over problems instead, and says so: it does not know what another seed would do.

**Questions.** A contrast is a weighted sum of rows, made seed by seed (all arms of a seed read the
same problems in the same order), with its t interval and a paired t test; p-values are corrected by
Holm's method within a topic. "No effect found" means that the corrected p-value is 0.05 or more;
the interval says how large an effect may have been missed.

**Checks.** What makes arms comparable is verified from the results: the same data in the same
order, the same number of updates, model and test problems; that no two arms are the same run under
two names; that the audit passed and noise was there; that arms which cannot work were refused or
failed.

Accuracies are shares. Perplexities are averaged and compared on the log scale: a mean is geometric,
a contrast is a ratio ("+3 %": 3 % more perplexity), and less is better.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npu_qat.evaluation.intervals import across_seeds, paired_difference
from npu_qat.evaluation.perplexity import perplexity_ratio
from npu_qat.evaluation.significance import holm, paired_t_test
from npu_qat.experiments.matrix import Arm, Cell, Contrast, Matrix, cells
from npu_qat.experiments.matrix_store import Store, unpack_outcomes

LEVEL = 0.05
# With fewer seeds the interval is so wide that to find nothing says nothing.
ENOUGH_SEEDS = 3
VERDICTS = ("better", "worse")
# Of a difference of differences: the gain by something, here against there.
GAIN_VERDICTS = ("larger", "smaller")
TOO_FEW = "two seeds: too few to tell"
ONE_SEED = "one seed: interval over problems, not tested"
ONE_SEED_ALONE = "one seed: not tested"
COMMITS = "commits.json"
Result = dict[str, Any]

TOPICS = {
    "viable": "Is W4A4 viable for training?",
    "aqn": "Does noise (AQN) help?",
    "guided": "Is guided noise worth its complexity?",
    "gap": "What is the gap to full precision?",
    "difference": "Is the gain of guided noise larger in W4A4 than in W4A16?",
    "levers": "Levers beyond the documents",
    "other": "Other questions",
}


@dataclass(frozen=True)
class Scale:
    """How a metric is averaged and shown: accuracy in percent, or perplexity."""

    metric: str

    @property
    def is_accuracy(self) -> bool:
        return self.metric == "accuracy"

    def of(self, evaluation: Result) -> float:
        """The value that is averaged."""
        if self.is_accuracy:
            return float(evaluation["strict"]["mean"])
        return math.log(evaluation["answer_perplexity"]["mean"])

    def interval(self, evaluation: Result) -> tuple[float, float]:
        """Its interval over problems."""
        if self.is_accuracy:
            return evaluation["strict"]["low"], evaluation["strict"]["high"]
        found = evaluation["answer_perplexity"]
        return math.log(found["low"]), math.log(found["high"])

    def shown(self, value: float) -> float:
        """A value as it is shown: percent, or perplexity."""
        return 100 * value if self.is_accuracy else math.exp(value)

    def text(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.is_accuracy else f"{math.exp(value):.3f}"

    def difference(self, value: float) -> str:
        """A contrast: points, or percent of perplexity."""
        if self.is_accuracy:
            return f"{100 * value:+.1f}"
        return f"{100 * (math.exp(value) - 1):+.1f} %"

    @property
    def unit(self) -> str:
        return "points" if self.is_accuracy else "relative perplexity"

    def better(self, value: float) -> bool:
        """Whether a positive answer to "is a better than b?" has this sign."""
        return value > 0 if self.is_accuracy else value < 0


@dataclass
class Row:
    """A row of the table: an arm, or one way of serving it, on one model."""

    name: str
    title: str
    arm: Arm
    model: str
    values: dict[int, float] = field(default_factory=dict)
    evaluations: list[Result] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    @property
    def anchor(self) -> bool:
        return not self.arm.train

    def evaluation(self, seed: int) -> Result:
        """That of ``seed``; an anchor's is that of every seed."""
        return self.evaluations[0 if self.anchor else list(self.values).index(seed)]

    def estimate(self, scale: Scale) -> tuple[float, float, float, str] | None:
        """Mean, low, high, and over what the interval is; None without results."""
        if not self.values:
            return None
        values = list(self.values.values())
        if len(values) >= 2:
            e = across_seeds(values)
            return e.mean, e.low, e.high, f"{e.n} seeds"
        low, high = scale.interval(self.evaluations[0])
        over = "problems" if self.anchor else "problems, 1 seed"
        return values[0], low, high, over


@dataclass
class Answer:
    """A contrast with what the results say; ``low`` to ``p`` are None where nothing can be said.

    The interval is over seeds, or over problems if there is one seed.
    """

    contrast: Contrast
    model: str
    seeds: list[int]
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None

    def words(self, scale: Scale) -> str:
        """What may be concluded."""
        if self.estimate is None:
            return "not yet measured"
        if self.p_holm is None:
            return ONE_SEED if self.low is not None else ONE_SEED_ALONE
        if self.p_holm >= LEVEL:
            return "no effect found" if len(self.seeds) >= ENOUGH_SEEDS else TOO_FEW
        verdicts = GAIN_VERDICTS if self.contrast.answers == "difference" else VERDICTS
        return verdicts[0] if scale.better(self.estimate) else verdicts[1]


@dataclass
class Check:
    """A verified property of the results."""

    name: str
    ok: bool
    detail: str


@dataclass
class Analysis:
    """Everything a page shows; ``cells`` is the folder of the results, seen from the page."""

    matrix: Matrix
    scale: Scale
    rows: list[Row]
    answers: list[Answer]
    checks: list[Check]
    failures: list[Result]
    results: list[Result]
    missing: list[str]
    stale: list[str]
    commits: dict[str, str] = field(default_factory=dict)
    cells: str = "cells"


def analyse(matrix: Matrix, results: Path) -> Analysis:
    """Read ``results`` and compute everything.

    ``COMMITS`` two folders above names the commit of a code digest, for results from a machine
    whose copy of the code was not a clean checkout of it.

    Raises ``ValueError`` if a result file is damaged.
    """
    table = results.parent.parent / COMMITS
    commits = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
    planned = cells(matrix)
    store = Store(results, any_code=True)
    found: dict[str, Result] = {}
    failures, missing = [], []
    for cell in planned:
        result = store.result(cell)
        failed = store.failures(cell)
        if result is not None:
            found[cell.id] = result
        elif failed:
            failures.append(failed[-1])
        else:
            missing.append(cell.id)
    metric = next((c.config.evaluation.metric for c in planned if c.config), "accuracy")
    scale = Scale(metric)
    rows = _rows(matrix, planned, found, scale)
    return Analysis(
        matrix,
        scale,
        rows,
        _answers(matrix, rows, scale),
        _checks(matrix, planned, found, failures, missing),
        failures,
        list(found.values()),
        missing,
        store.unknown(planned),
        commits,
    )


# --- rows and answers -------------------------------------------------------------------------


def _rows(
    matrix: Matrix, planned: Sequence[Cell], found: dict[str, Result], scale: Scale
) -> list[Row]:
    rows: dict[tuple[str, str], Row] = {}
    for model in matrix.models or [""]:
        for arm in matrix.arms:
            if arm.expect == "refused":
                continue
            for name in (arm.name, *(f"{arm.name}@{s}" for s in arm.serve)):
                served = name.partition("@")[2]
                title = f"{arm.title}, served in {_served_title(served)}" if served else arm.title
                rows[model, name] = Row(name, title, arm, model)
    for cell in planned:
        result = found.get(cell.id)
        if result is None:
            continue
        for name, evaluation in result["evaluations"].items():
            row = rows.get((cell.model, name))
            if row is not None and row.arm is cell.arm:
                row.values[cell.seed] = scale.of(evaluation)
                row.evaluations.append(evaluation)
                row.results.append(result)
    return list(rows.values())


def _served_title(name: str) -> str:
    return name.upper().replace("-", " ")


def _answers(matrix: Matrix, rows: Sequence[Row], scale: Scale) -> list[Answer]:
    answers = []
    for model in matrix.models or [""]:
        by_name = {row.name: row for row in rows if row.model == model}
        answers += [_answer(contrast, model, by_name) for contrast in matrix.contrasts]
        for topic in TOPICS:
            tested = [
                a
                for a in answers
                if a.model == model and a.contrast.answers == topic and a.p is not None
            ]
            for answer, p in zip(
                tested, holm([a.p for a in tested if a.p is not None]), strict=True
            ):
                answer.p_holm = p
    return answers


def _answer(contrast: Contrast, model: str, rows: dict[str, Row]) -> Answer:
    parts = [(rows[name], weight) for name, weight in contrast.arms.items()]
    trained = [set(row.values) for row, _ in parts if not row.anchor]
    if any(not row.values for row, _ in parts) or not trained:
        return Answer(contrast, model, [])
    seeds = sorted(set.intersection(*trained))
    if not seeds:
        return Answer(contrast, model, [])

    def of_seed(seed: int) -> float:
        return sum(
            weight * (next(iter(row.values.values())) if row.anchor else row.values[seed])
            for row, weight in parts
        )

    values = [of_seed(seed) for seed in seeds]
    if len(values) < 2:
        low, high = _over_problems(contrast, rows, seeds[0])
        return Answer(contrast, model, seeds, values[0], low, high)
    e = across_seeds(values)
    return Answer(contrast, model, seeds, e.mean, e.low, e.high, paired_t_test(values))


def _over_problems(
    contrast: Contrast, rows: dict[str, Row], seed: int
) -> tuple[float | None, float | None]:
    """The interval of a plain difference of one seed, problem by problem; None for others."""
    signs = {weight: name for name, weight in contrast.arms.items()}
    if sorted(contrast.arms.values()) != [-1.0, 1.0]:
        return None, None
    a, b = (rows[signs[sign]].evaluation(seed) for sign in (1.0, -1.0))
    if "outcomes" in a:
        found = paired_difference(unpack_outcomes(a["outcomes"]), unpack_outcomes(b["outcomes"]))
        return found.low, found.high
    ratio = perplexity_ratio(a["nll"], b["nll"], a["answer_tokens"])
    return math.log(ratio.low), math.log(ratio.high)


# --- checks -----------------------------------------------------------------------------------


def _checks(
    matrix: Matrix,
    planned: Sequence[Cell],
    found: dict[str, Result],
    failures: Sequence[Result],
    missing: Sequence[str],
) -> list[Check]:
    arms = {arm.name: arm for arm in matrix.arms}
    done = [(cell, found[cell.id]) for cell in planned if cell.id in found]
    trained = [(cell, result) for cell, result in done if cell.arm.train]
    checks = [
        _same("every arm of a seed read the same problems in the same order", trained, "data"),
        _same("every arm of a seed made the same number of updates", trained, "updates"),
        _same(
            "every arm of a seed ran on the same kind of device",
            [(cell, {"device": device_of(result)}) for cell, result in trained],
            "device",
        ),
        _constant("every cell used the same model", done, "model_digest"),
        _constant("every cell trained on the same problems", done, "train_digest"),
        _constant("every cell was evaluated on the same problems", done, "test_digest"),
        _distinct(trained),
        _audited(trained),
        _noisy(trained),
        *_expected(arms, trained, failures, done),
    ]
    unexpected = [f for f in failures if arms[f["arm"]].expect != "refused"]
    checks.append(
        Check(
            "no cell failed that should not have",
            not unexpected,
            "; ".join(f"{cell_name(f)}: {f['error']['type']}" for f in unexpected) or "none did",
        )
    )
    checks.append(
        Check(
            "every cell has a result",
            not missing,
            f"{len(missing)} of {len(planned)} do not: {', '.join(missing[:6])}"
            + (" ..." if len(missing) > 6 else "")
            if missing
            else f"{len(planned)} cells",
        )
    )
    return checks


def device_of(result: Result) -> str:
    """The accelerator, or the processor without one."""
    found = result["environment"]
    return str(found.get("accelerator", found["processor"]))


def cell_name(result: Result) -> str:
    """``Cell.id`` of the cell that made ``result``."""
    return "--".join(filter(None, [result["arm"], result["model"], f"s{result['seed']}"]))


def _same(name: str, trained: Sequence[tuple[Cell, Result]], key: str) -> Check:
    """``key`` has one value among the trained cells of each model and seed."""
    groups: dict[tuple[str, int], dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
    for cell, result in trained:
        groups[cell.model, cell.seed][result[key]].append(cell.arm.name)
    odd = []
    for (_, seed), values in groups.items():
        if len(values) > 1:
            usual = max(values, key=lambda v: len(values[v]))
            odd += [
                f"{a} (seed {seed})" for v, names in values.items() if v != usual for a in names
            ]
    several = sum(len(next(iter(v.values()))) > 1 or len(v) > 1 for v in groups.values())
    detail = f"differing: {', '.join(odd)}" if odd else f"{several} seeds with several arms"
    return Check(name, not odd, detail)


def _constant(name: str, done: Sequence[tuple[Cell, Result]], key: str) -> Check:
    values: dict[str, set[str]] = defaultdict(set)
    for cell, result in done:
        values[cell.model].add(result[key])
    odd = {model: sorted(v) for model, v in values.items() if len(v) > 1}
    one = ", ".join(sorted({x for v in values.values() for x in v}))
    return Check(name, not odd, f"several: {odd}" if odd else one or "no results")


def _distinct(trained: Sequence[tuple[Cell, Result]]) -> Check:
    """Arms that differ in their settings trained different adapters."""
    seen: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    for cell, result in trained:
        seen[cell.model, cell.seed, result["adapter"]].append(cell.arm.name)
    equal = [f"{' = '.join(n)} (seed {seed})" for (_, seed, _), n in seen.items() if len(n) > 1]
    return Check(
        "no two arms trained the same adapter, bit for bit",
        not equal,
        f"a setting without effect: {'; '.join(equal)}" if equal else f"{len(seen)} differ",
    )


def _audited(trained: Sequence[tuple[Cell, Result]]) -> Check:
    failed = [cell.id for cell, result in trained if result["audit"]["verdict"] != "pass"]
    count = sum(len(result["audit"]["checks"]) for _, result in trained)
    return Check(
        "the audit of every run passed",
        not failed,
        ", ".join(failed) if failed else f"{len(trained)} runs, {count} checks",
    )


def _noisy(trained: Sequence[tuple[Cell, Result]]) -> Check:
    """Noise was in the runs that ask for it and in no other, on every norm that is to have it."""
    wrong, count = [], 0
    for cell, result in trained:
        assert cell.config is not None
        wanted, noise = cell.config.noise.enabled, result["noise"]
        count += wanted
        there = noise["noisy_steps"] > 0
        if wanted != there or (wanted and noise["norms_changed"] != noise["norms_expected"]):
            wrong.append(cell.id)
    return Check(
        "noise was measured in the runs that ask for it, and in no other",
        not wrong,
        ", ".join(wrong) if wrong else f"{count} runs with noise, {len(trained) - count} without",
    )


def _expected(
    arms: dict[str, Arm],
    trained: Sequence[tuple[Cell, Result]],
    failures: Sequence[Result],
    done: Sequence[tuple[Cell, Result]],
) -> list[Check]:
    """Arms that cannot work were stopped, or show that they did not."""
    checks = []
    for arm in arms.values():
        if arm.expect == "refused":
            errors = [f["error"] for f in failures if f["arm"] == arm.name]
            ran = [cell.id for cell, _ in done if cell.arm.name == arm.name]
            detail = f"{errors[0]['type']}: {errors[0]['text']}" if errors else "not yet tried"
            checks.append(
                Check(
                    f"{arm.name} is refused",
                    bool(errors) and not ran,
                    f"it ran: {', '.join(ran)}" if ran else detail,
                )
            )
        if arm.expect == "no-learning":
            found = [r["audit"] for cell, r in trained if cell.arm.name == arm.name]
            blocked = [a["adapters_without_gradient"] for a in found]
            detail = "not yet run"
            if found:
                detail = f"{min(blocked)} of {found[0]['adapters']} adapters got no gradient at all"
            checks.append(
                Check(
                    f"{arm.name} is shown as failing",
                    bool(found) and 2 * min(blocked) > found[0]["adapters"],
                    detail,
                )
            )
    return checks
