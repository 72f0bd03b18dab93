"""The page: one file, no scripts, nothing fetched, readable on a phone and in the dark.

The reader's order is the page's order: the answer in one sentence, the table that it comes from,
the comparisons in words, then the evidence (audit, plots), the cost, samples, and everything needed
to run it again. Everything that comes out of the run directory is escaped; completions of a model
are text that nobody has checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.__about__ import __version__
from npu_qat.reporting import plots, verdict
from npu_qat.reporting.rundata import Record, RunData, number, read_run
from npu_qat.training.rundir import write_atomically

if TYPE_CHECKING:
    import jinja2

SAMPLE_STEPS = 3
"""Steps whose sample completions are shown, from the first to the last, for each arm."""

TEMPLATE = "template.html.j2"


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir``, replacing an older one, and return its path.

    Pieces of the run directory that are missing are named on the page. Raises ``ValueError`` if
    ``run_dir`` is not a directory and ``OSError`` if the page cannot be written.
    """
    target = Path(run_dir) / "report.html"
    page = render(read_run(Path(run_dir)))
    write_atomically(target, page.encode())
    return target


def render(run: RunData) -> str:
    """The page of ``run`` as HTML text."""
    environment = page_environment()
    environment.filters.update(
        percent=verdict.percent,
        points=verdict.points,
        mark=lambda share: verdict.points(share).removesuffix(".0"),
        span=_span,
    )
    rows = verdict.arms(run)
    comparisons = verdict.comparisons(run)
    checks = run.audit.get("checks", [])
    return environment.get_template(TEMPLATE).render(
        run=run,
        version=__version__,
        facts=_facts(run),
        headline=verdict.headline(run),
        level=verdict.confidence(run),
        mode=verdict.mode(run),
        precision=verdict.precision(run),
        arms=rows,
        perplexities=verdict.perplexities(run),
        scale=_scale([(a.strict["low"], a.strict["high"]) for a in rows if a.strict], 0.05),
        comparisons=comparisons,
        difference_scale=_scale([*((c.low, c.high) for c in comparisons), (0.0, 0.0)], 0.05),
        audit=run.audit,
        checks=checks,
        failed=verdict.failed_checks(checks),
        modules=_module_table(run.audit.get("modules", [])),
        gradients=_first_gradients(run.audit.get("first_update_gradients", {})),
        figures=plots.all_figures(run),
        samples=_samples(run),
        environment=flatten(run.environment),
    )


def page_environment(*folders: Path) -> jinja2.Environment:
    """Where templates of a page come from: ``folders`` first, then this room with ``style.css``."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short=_short, svg=Markup)
    return environment


@dataclass(frozen=True)
class Scale:
    """A common axis for intervals: its ends and marks, all as shares."""

    low: float
    high: float
    marks: tuple[float, ...]

    def at(self, value: float) -> str:
        """Position on the axis, in percent of its width."""
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}%"

    def span(self, low: float, high: float) -> str:
        """Length between two values, in percent of the width."""
        return f"{100 * (high - low) / (self.high - self.low):.2f}%"


def _scale(intervals: Sequence[tuple[float, float]], step: float) -> Scale:
    """An axis over all ``intervals`` that ends on multiples of ``step`` and has 2 to 5 marks."""
    if not intervals:
        return Scale(0.0, 1.0, ())
    lowest = min(low for low, _ in intervals)
    highest = max(high for _, high in intervals)
    first, last = int(lowest // step), int(-(-highest // step))
    last = max(last, first + 1)
    every = -(-(last - first) // 4)
    marks = [k * step for k in range(first, last + 1) if k % every == 0]
    return Scale(first * step, last * step, tuple(marks))


def _facts(run: RunData) -> list[tuple[str, str]]:
    """The few facts that say which run this is."""
    facts = []
    if model := run.setting("model.path"):
        facts.append(("model", str(model)))
    if method := run.setting("train.method"):
        facts.append(("method", str(method).upper()))
    profiles = {run.setting("quant.weight_profile"), run.setting("quant.activation_profile")}
    if names := sorted(str(p) for p in profiles if p):
        facts.append(("profile", " / ".join(names)))
    steps = run.summary.get("steps") or max(
        (records[-1]["step"] for records in run.metrics.values()), default=None
    )
    if steps is not None:
        facts.append(("steps", str(steps)))
    if run.setting("run.seed") is not None:
        facts.append(("seed", str(run.setting("run.seed"))))
    if device := run.environment.get("device"):
        facts.append(("device", str(device)))
    if (seconds := number(run.summary, "seconds")) is not None:
        facts.append(("duration", _duration(seconds)))
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _module_table(modules: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Quantised and 16-bit linears, pooled by kind: what was quantised, how, and how often."""
    table: dict[tuple[str, ...], Record] = {}
    keys = ("mode", "weight_profile", "activation_profile", "axis", "storage", "reason")
    for module in modules:
        kind = str(module.get("name", "")).rpartition(".")[2]
        settings = {key: str(module.get(key) or "\u2013") for key in keys}
        row = table.setdefault(
            (kind, *settings.values()),
            {"kind": kind, **settings, "count": 0, "calls": {}, "weight": [], "input": []},
        )
        row["count"] += 1
        for phase, calls in (module.get("calls") or {}).items():
            row["calls"][phase] = row["calls"].get(phase, 0) + int(calls)
        for key in ("weight", "input"):
            if (error := number(module, f"{key}_rel_error")) is not None:
                row[key].append(error)
    for row in table.values():
        for key in ("weight", "input"):
            row[key] = sum(row[key]) / len(row[key]) if row[key] else None
    return list(table.values())


def _first_gradients(gradients: Mapping[str, Any]) -> list[Record]:
    """The first update's largest |gradient| of each lora_B, by kind of linear.

    Only ``lora_B``: it starts at 0, so the first gradient of every ``lora_A`` is 0 by construction.
    """
    kinds: dict[str, Record] = {}
    for name, largest in gradients.items():
        parts = name.split(".")
        if "lora_B" not in parts:
            continue
        kind = parts[parts.index("lora_B") - 1]
        row = kinds.setdefault(kind, {"kind": kind, "count": 0, "zero": [], "largest": 0.0})
        row["count"] += 1
        row["largest"] = max(row["largest"], float(largest))
        if float(largest) == 0.0:
            row["zero"].append(name)
    return list(kinds.values())


def _samples(run: RunData) -> dict[str, list[Record]]:
    """For each arm, the first completion of a few steps spread over the run, newest first."""
    defaults = {"step": 0, "question": "", "completion": "", "strict": False}
    shown: dict[str, list[Record]] = {}
    for arm in dict.fromkeys(str(sample.get("arm")) for sample in run.samples):
        first: dict[int, Record] = {}
        for sample in run.samples:
            if str(sample.get("arm")) == arm:
                first.setdefault(sample.get("step", 0), {**defaults, **sample})
        steps = sorted(first)
        picks = {round(i * (len(steps) - 1) / (SAMPLE_STEPS - 1)) for i in range(SAMPLE_STEPS)}
        shown[arm] = [first[steps[i]] for i in sorted(picks, reverse=True)]
    return shown


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as (dotted key, text) rows."""
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in flatten(inner, f"{prefix}{key}.")]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(prefix.rstrip("."), text)]


def _span(estimate: Mapping[str, float]) -> str:
    """The interval of an accuracy: ``50.0 – 56.1 %``."""
    low = verdict.percent(estimate["low"]).partition("\u202f")[0]
    return f"{low} \u2013 {verdict.percent(estimate['high'])}"


def _short(value: float) -> str:
    """Three significant digits; an exact zero as 0."""
    return f"{value:.3g}"
