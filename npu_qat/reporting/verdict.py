"""From numbers to sentences: what the arms are, what each comparison says, what the run shows.

The wording follows the interval and nothing else. An interval that holds zero is "not
distinguishable from zero", however large its middle; one that does not is stated with both ends.
A failed audit outranks every accuracy, because the accuracies are then those of something else
than the page says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from npu_qat.reporting.rundata import RunData, number

Tone = Literal["good", "neutral", "bad"]
Role = Literal["bf16_start", "ptq", "bf16_lora", "served", "trained", "other"]

ROLE_ORDER: tuple[Role, ...] = ("bf16_start", "ptq", "bf16_lora", "served", "trained", "other")
"""Rows of the table, from the start to the result."""

# Comparisons by (role of a, role of b), in reading order; {m} is the mode, {p} the 16-bit dtype.
_TITLES: dict[tuple[Role, Role], str] = {
    ("trained", "ptq"): "Gain of training in {m}",
    ("trained", "served"): "{m} training against {p} training, both served in {m}",
    ("trained", "bf16_lora"): "Distance to {p} training and serving",
    ("trained", "bf16_start"): "Distance to the {p} model before training",
    ("ptq", "bf16_start"): "Cost of {m} before training",
    ("served", "bf16_lora"): "Cost of serving the {p}-trained adapter in {m}",
}


@dataclass(frozen=True)
class Arm:
    """One evaluated model: a row of the table."""

    name: str
    role: Role
    title: str
    note: str
    trained_in: str
    served_in: str
    n: int
    strict: Mapping[str, float]
    flexible: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """``a`` minus ``b`` in strict accuracy, a share, with its interval and in words.

    ``terms`` names the two rows of the table, ``words`` says what the interval allows to say.
    """

    roles: tuple[Role, Role]
    title: str
    terms: str
    words: str
    tone: Tone
    difference: float
    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Perplexity:
    """A row of a run that is judged by perplexity.

    ``estimate``: mean, low, high. ``ratio``: the trained arm's over this one's, likewise under
    ``ratio``, ``low`` and ``high``; empty where there is none.
    """

    role: Role
    title: str
    note: str
    estimate: Mapping[str, float]
    ratio: Mapping[str, float]


@dataclass(frozen=True)
class Headline:
    """The answer in one sentence, its numbers, and what it is worth beside 16-bit training."""

    tone: Tone
    text: str
    detail: str
    context: str = ""


def percent(share: float) -> str:
    """``0.5312`` as ``53.1 %``."""
    return f"{100 * share:.1f}\u202f%"


def points(share: float, signed: bool = True) -> str:
    """A difference in percentage points: ``0.149`` as ``+14.9``, with a real minus sign.

    What rounds to zero has no sign.
    """
    text = f"{100 * share:+.1f}" if signed else f"{100 * share:.1f}"
    if float(text) == 0.0:
        return "0.0"
    return text.replace("-", "\u2212")


def precision(run: RunData) -> str:
    """Name of the 16-bit dtype that the run computes in: BF16, FP16 or FP32."""
    return str(run.setting("model.dtype", "bf16")).upper()


def mode(run: RunData) -> str:
    """W4A4, W4A16, ...: from the names of the evaluated arms, else the audit's modules."""
    for name in run.evaluations.get("arms", {}):
        if match := re.fullmatch(r"(w\d+a\d+)_(?:ptq|trained)", name):
            return match[1].upper()
    modes = {module.get("mode") for module in run.audit.get("modules", [])} - {None, "W16A16"}
    return str(modes.pop()) if len(modes) == 1 else "W4A4"


def role(name: str) -> Role:
    """What the arm called ``name`` is, whatever the mode in its name."""
    if name in ("bf16_start", "bf16_lora"):
        return name  # type: ignore[return-value]
    if re.fullmatch(r"bf16_lora_served_w\d+a\d+", name):
        return "served"
    match = re.fullmatch(r"w\d+a\d+_(ptq|trained)", name)
    return match[1] if match else "other"  # type: ignore[return-value]


def _described(run: RunData) -> dict[Role, tuple[str, str, str, str]]:
    """Role -> title, note, numbers of training, numbers of serving."""
    m, p = mode(run), precision(run)
    return {
        "bf16_start": (f"{p} start", "the model as it came", "\u2013", p),
        "ptq": (f"{m} start (PTQ)", "quantised, not trained", "\u2013", m),
        "bf16_lora": (f"{p} LoRA", "trained and served in 16 bits", p, p),
        "served": (f"{p} LoRA in {m}", "that adapter on the quantised base", p, m),
        "trained": (f"{m} LoRA", "trained through the quantised base", m, m),
    }


def arms(run: RunData) -> list[Arm]:
    """The arms whose accuracy was evaluated, in reading order."""
    described = _described(run)
    rows = []
    for name, values in run.evaluations.get("arms", {}).items():
        if "answer_perplexity" in values:
            continue
        kind = role(name)
        title, note, trained_in, served_in = described.get(kind, (name, "", "\u2013", "\u2013"))
        rows.append(
            Arm(
                name=name,
                role=kind,
                title=title,
                note=note,
                trained_in=trained_in,
                served_in=served_in,
                n=int(values.get("n", 0)),
                strict=values.get("strict", {}),
                flexible=values.get("flexible", {}),
            )
        )
    return sorted(rows, key=lambda arm: ROLE_ORDER.index(arm.role))


def comparisons(run: RunData) -> list[Comparison]:
    """The paired comparisons in reading order."""
    titles = {arm.name: arm.title for arm in arms(run)}
    m, p = mode(run), precision(run)
    found = []
    for row in run.evaluations.get("comparisons", []):
        if "ratio" in row:
            continue
        a, b = str(row["a"]), str(row["b"])
        roles = (role(a), role(b))
        terms = f"{titles.get(a, a)} \u2212 {titles.get(b, b)}"
        title = _TITLES.get(roles, "Difference").format(m=m, p=p)
        difference, low, high = (float(row[key]) for key in ("difference", "low", "high"))
        found.append(
            Comparison(
                roles=roles,
                title=title,
                terms=terms,
                words=_words(difference, low, high),
                tone=_tone(low, high),
                difference=difference,
                low=low,
                high=high,
                method=str(row.get("method", "")),
            )
        )
    order = list(_TITLES)
    return sorted(found, key=lambda c: order.index(c.roles) if c.roles in order else len(order))


def perplexities(run: RunData) -> list[Perplexity]:
    """The arms whose perplexity was evaluated, in reading order."""
    described = _described(run)
    ratios = {row["b"]: row for row in run.evaluations.get("comparisons", []) if "ratio" in row}
    found = []
    for name, values in run.evaluations.get("arms", {}).items():
        if "answer_perplexity" not in values:
            continue
        title, note, _, _ = described.get(role(name), (name, "", "", ""))
        found.append(
            Perplexity(role(name), title, note, values["answer_perplexity"], ratios.get(name, {}))
        )
    return sorted(found, key=lambda row: ROLE_ORDER.index(row.role))


def _perplexity_headline(run: RunData, rows: Sequence[Perplexity]) -> Headline:
    """What training did to the perplexity of the answers."""
    m = mode(run)
    before = next((r for r in rows if r.role == ("bf16_start" if m == "W16A16" else "ptq")), None)
    after = next((r for r in rows if r.role == "trained"), None)
    if before is None or after is None or not before.ratio:
        return _without_gain(m, None, None)
    low, high = before.ratio["low"], before.ratio["high"]
    tone = _tone(-high + 1.0, -low + 1.0)
    change = 100 * abs(before.ratio["ratio"] - 1)
    text = {
        "good": f"Training in {m} lowered the perplexity of the answers by {change:.1f}\u202f%.",
        "bad": f"Training in {m} raised the perplexity of the answers by {change:.1f}\u202f%.",
        "neutral": f"Training in {m} made no measurable difference.",
    }[tone]
    detail = (
        f"{before.estimate['mean']:.3f} before training, {after.estimate['mean']:.3f} after, both "
        f"served in {m} with noise off. {confidence(run)} interval of the ratio: {low:.3f} to "
        f"{high:.3f}, problem by problem."
    )
    return Headline(tone, text, detail)


def headline(run: RunData) -> Headline:
    """What the run shows, in one sentence."""
    if run.audit.get("verdict") == "fail":
        failed = [_failure(c) for c in run.audit.get("checks", []) if not c.get("ok")]
        return Headline(
            "bad",
            "The audit failed: do not use the numbers below.",
            "Failed: " + "; ".join(failed or ["the audit gives no detail"]) + ".",
        )
    if run.contradictions:
        text = "The files of this run contradict each other: do not use the numbers below."
        return Headline("bad", text, "The contradictions are listed next.")
    if rows := perplexities(run):
        return _perplexity_headline(run, rows)
    m = mode(run)
    before: Role = "bf16_start" if m == "W16A16" else "ptq"
    gains = [c for c in comparisons(run) if c.roles == ("trained", before)]
    by_role = {arm.role: arm for arm in arms(run)}
    start, end = by_role.get(before), by_role.get("trained")
    if not gains:
        return _without_gain(m, start, end)
    gain = gains[0]
    detail = _gain_detail(run, gain, start, end)
    size = points(abs(gain.difference), signed=False)
    text = {
        "good": f"Training in {m} gained {size} points.",
        "bad": f"Training in {m} lost {size} points.",
        "neutral": f"Training in {m} made no measurable difference.",
    }[gain.tone]
    return Headline(gain.tone, text, detail, _context(run))


def confidence(run: RunData) -> str:
    """Level of the intervals, as ``95 %``; "" if the run directory does not say."""
    level = number(run.evaluations, "confidence")
    if level is None and (setting := run.setting("evaluation.confidence")) is not None:
        level = float(setting)
    return "" if level is None else f"{100 * level:g}\u202f%"


def _words(difference: float, low: float, high: float) -> str:
    ends = f"{points(low)} to {points(high)} points"
    if low > 0.0:
        return f"Better by {points(difference, signed=False)} points; interval {ends}, above zero."
    if high < 0.0:
        return f"Worse by {points(-difference, signed=False)} points; interval {ends}, below zero."
    return f"{points(difference)} points, interval {ends}: not distinguishable from zero."


def _tone(low: float, high: float) -> Tone:
    if low > 0.0:
        return "good"
    return "bad" if high < 0.0 else "neutral"


def _gain_detail(run: RunData, gain: Comparison, start: Arm | None, end: Arm | None) -> str:
    interval = f"{points(gain.low)} to {points(gain.high)} points"
    name = f"{confidence(run)} interval of the difference".strip()
    if gain.tone == "neutral":
        interval = f"{name}: {interval}, not distinguishable from zero."
    else:
        interval = f"{name}: {interval}."
    if start is None or end is None or not start.strict or not end.strict:
        return interval[0].upper() + interval[1:]
    return (
        f"{percent(start.strict['mean'])} of {end.n:,} held-out problems solved before training, "
        f"{percent(end.strict['mean'])} after, both served in {mode(run)} with noise off. "
        f"{interval[0].upper() + interval[1:]}"
    )


def _context(run: RunData) -> str:
    """The same training in 16 bits, served in 4: was training in 4 bits needed?"""
    found = [c for c in comparisons(run) if c.roles == ("trained", "served")]
    served = next((arm for arm in arms(run) if arm.role == "served"), None)
    if not found or served is None or not served.strict:
        return ""
    m, p, c = mode(run), precision(run), found[0]
    text = f"Trained in {p} and then served in {m}: {percent(served.strict['mean'])}, "
    interval = f"interval of the difference: {points(c.low)} to {points(c.high)}"
    if c.tone == "neutral":
        return f"{text}not distinguishable from training in {m} ({interval})."
    size, word = points(abs(c.difference), signed=False), "less" if c.tone == "good" else "more"
    return f"{text}{size} points {word} ({interval})."


def _without_gain(m: str, start: Arm | None, end: Arm | None) -> Headline:
    if start is None and end is None:
        text = "This run has not been evaluated."
        return Headline("neutral", text, f"Its accuracy in {m} is not known yet.")
    text = f"The effect of training in {m} is not known."
    if start is not None and end is not None:
        return Headline("neutral", text, "Both evaluations are there, but not their comparison.")
    missing = "before" if start is None else "after"
    return Headline("neutral", text, f"There is no evaluation in {m} {missing} training.")


def _failure(check: Mapping[str, Any]) -> str:
    return f"{check['name']} (expected {check.get('expected')}, measured {check.get('measured')})"


def failed_checks(checks: Sequence[Mapping[str, Any]]) -> int:
    """Number of checks that did not pass."""
    return sum(not check.get("ok") for check in checks)
