"""What was found, as lines for a terminal and as one HTML page.

The page follows the report of a run: one file, no scripts, nothing fetched, readable on a phone and
in the dark, numbers in words beside every plot. Texts from files are escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npu_qat.__about__ import __version__
from npu_qat.parity.levels import FAIL, PASS, QUESTIONS, SKIPPED, Level, ParityReport
from npu_qat.parity.observe import TITLES
from npu_qat.reporting.html import flatten, page_environment
from npu_qat.reporting.plots import COLORS, Figure, drawing
from npu_qat.training.rundir import write_atomically

TEMPLATE = "report.html.j2"
_MARKS = {PASS: "PASS", FAIL: "FAIL", SKIPPED: "----"}


def headline(report: ParityReport) -> str:
    """The answer in one sentence."""
    failed = [level.key for level in report.levels if level.verdict == FAIL]
    skipped = [level.key for level in report.levels if level.verdict == SKIPPED]
    if failed:
        return f"The export does not compute what was trained: {', '.join(failed)} failed."
    if skipped:
        return (
            "The weights are those of training; the serving stack rounds activations otherwise, so "
            f"{', '.join(skipped)} {'was' if len(skipped) == 1 else 'were'} not judged."
        )
    return "The export computes what was trained, from codes to tokens."


def as_text(report: ParityReport) -> Iterator[str]:
    """Lines for a terminal."""
    yield f"{report.folder} ({report.format}): {headline(report)}"
    yield f"activations: trained {report.trained}, served {report.served}"
    for level in report.levels:
        title, question = QUESTIONS[level.key]
        yield ""
        yield f"{_MARKS[level.verdict]}  {level.key} {title}: {question}"
        if level.skipped:
            part = "in part, by its weights" if level.checks else "not"
            yield f"      judged {part}: {level.skipped}"
        for check in level.checks:
            mark = "ok" if check.ok else "FAIL"
            yield f"      {mark:4}  {check.name}: {check.measured}  [expected: {check.expected}]"
        if "library" in level.data:
            yield f"      note  {level.data['library']}"


def write_html(report: ParityReport, target: Path) -> None:
    """Write the page to ``target``, replacing an older one.

    Raises ``OSError`` if it cannot be written.
    """
    write_atomically(target, render(report).encode())


def render(report: ParityReport) -> str:
    """The page as HTML text."""
    environment = page_environment(Path(__file__).parent)
    return environment.get_template(TEMPLATE).render(
        report=report,
        version=__version__,
        headline=headline(report),
        questions=QUESTIONS,
        figures=figures(report),
        statistics=_statistics(report),
        recorded=flatten(report.recording),
        checked=flatten({"checked_on": report.checked_on, "environment": report.environment}),
        facts=_facts(report),
        PASS=PASS,
        FAIL=FAIL,
    )


def _facts(report: ParityReport) -> list[tuple[str, str]]:
    return [
        ("export", report.folder.name),
        ("format", report.format),
        ("base", report.recording["base_fingerprint"][:12]),
        ("trained on", report.recording["computed_on"]["device"]),
        ("served on", report.checked_on["device"]),
    ]


def _statistics(report: ParityReport) -> list[dict[str, Any]]:
    """Rows of the table of L2: measured, floor, limit."""
    data = _level(report, "L2").data
    if not data:
        return []
    return [
        {
            "title": title,
            "measured": data["measured"][name],
            "limit": data["limits"][name],
            "ok": data["measured"][name] <= data["limits"][name],
            "noise": {variant: values[name] for variant, values in data["noise"].items()},
        }
        for name, title in TITLES.items()
    ]


def _level(report: ParityReport, key: str) -> Level:
    return next(level for level in report.levels if level.key == key)


# --- plots --------------------------------------------------------------------------------------


def figures(report: ParityReport) -> list[Figure]:
    """Every plot that there are numbers for."""
    makers = (_causes, _ulps, _floor, _gaps)
    return [figure for make in makers if (figure := make(report)) is not None]


def _causes(report: ParityReport) -> Figure | None:
    """Differing codes by cause; only if some differ."""
    data = _level(report, "L0").data
    counts: dict[str, int] = {}
    found = [data.get("inputs", {}), *data.get("weights", {}).get("causes", {}).values()]
    for row in found:
        for part in ("codes", "scales"):
            for kind, n in row.get(part, {}).items():
                counts[f"{kind} ({part})"] = counts.get(f"{kind} ({part})", 0) + n
    if not counts:
        return None
    with drawing() as (axes, finish):
        ax = axes[0]
        names = list(counts)
        ax.barh(names, [counts[name] for name in names], color=COLORS["limit"], height=0.6)
        ax.set_xscale("log")
        ax.set_xlim(left=0.5)
        ax.grid(axis="x")
        ax.grid(visible=False, axis="y")
        words = ", ".join(f"{n:,} {name}" for name, n in counts.items())
        return finish("causes", "L0: differences by cause", f"{words}.", step_axis=False)


def _ulps(report: ParityReport) -> Figure | None:
    """How far outputs of linears are apart."""
    data = _level(report, "L1").data
    if not data:
        return None
    counts = {int(low): n for low, n in data["ulp_counts"].items()}
    total = sum(counts.values())
    labels = ["0", "1", "2-3", "4-7", "8-15", "16+"]
    with drawing() as (axes, finish):
        ax = axes[0]
        limit = data["limit_ulp"]
        shown = {label: (low, n) for label, (low, n) in zip(labels, counts.items(), strict=True)}
        colors = [COLORS["quant"] if low <= limit else COLORS["limit"] for low in counts]
        heights = [n - 0.5 if n else 0.0 for _, n in shown.values()]
        ax.bar(list(shown), heights, color=colors, width=0.6, bottom=0.5)
        ax.set_yscale("log")
        ax.set_ylim(0.5, 3 * total)
        ax.set_ylabel("output values")
        ax.set_xlabel("units in the last place")
        beyond = total - sum(n for low, n in counts.items() if low <= limit)
        caption = (
            f"{counts[0]:,} of {total:,} output values have distance 0; {beyond:,} lie beyond the "
            f"limit of {limit}."
        )
        return finish("ulps", "L1: outputs of linears, apart by", caption, step_axis=False)


def _floor(report: ParityReport) -> Figure | None:
    """Each statistic of L2 as a share of its limit, with the noise it is judged by."""
    rows = _statistics(report)
    if not rows:
        return None
    with drawing() as (axes, finish):
        ax = axes[0]
        for y, row in enumerate(reversed(rows)):
            share = [value / row["limit"] for value in row["noise"].values() if row["limit"]]
            ax.plot(
                share,
                [y] * len(share),
                "o",
                ms=4.5,
                color=COLORS["muted"],
                label="training against itself" if y == 0 else None,
            )
            ax.plot(
                [row["measured"] / row["limit"] if row["limit"] else 0.0],
                [y],
                "D",
                ms=6,
                color=COLORS["quant"] if row["ok"] else COLORS["limit"],
                label="served against training" if y == 0 else None,
            )
        ax.axvline(1.0, color=COLORS["limit"], lw=1.4, ls="--")
        short = ["mean |Δ log p|", "99 % |Δ log p|", "KL", "top 1", "perplexity", "greedy"]
        ax.set_yticks(range(len(rows)), list(reversed(short)))
        ax.set_xlim(left=-0.04)
        ax.set_xlabel("share of the limit")
        ax.grid(axis="x")
        ax.grid(visible=False, axis="y")
        worst = max(rows, key=lambda r: r["measured"] / r["limit"] if r["limit"] else 0.0)
        caption = (
            f"Nearest to its limit: {worst['title']}, {worst['measured']:.3g} of "
            f"{worst['limit']:.3g}."
        )
        return finish("floor", "L2: served, and the measured noise", caption, step_axis=False)


def _gaps(report: ParityReport) -> Figure | None:
    """Distribution of |d log p| a token, served and under noise."""
    data = _level(report, "L2").data
    if not data:
        return None
    with drawing() as (axes, finish):
        ax = axes[0]
        for values, name, color in (
            (data["noise_gaps"], "1 ulp of noise", "muted"),
            (data["gaps"], "served", "quant"),
        ):
            ordered = sorted(max(value, 1e-6) for value in values)
            shares = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
            ax.plot(ordered, shares, color=COLORS[color], label=name, drawstyle="steps-post")
        ax.set_xscale("log")
        ax.set_xlim(left=8e-7)
        ax.set_ylabel("tokens, %")
        ax.set_xlabel("|Δ log p| at most (left edge: equal)")
        equal = sum(value == 0 for value in data["gaps"])
        caption = (
            f"{equal:,} of {len(data['gaps']):,} tokens have exactly the same log-probability in "
            f"serving as in training; largest difference {max(data['gaps']):.3g}, under noise "
            f"{max(data['noise_gaps']):.3g}."
        )
        return finish("gaps", "L2: log-probabilities, token by token", caption, step_axis=False)
