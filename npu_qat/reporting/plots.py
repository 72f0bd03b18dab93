"""The plots of the report, as SVG that follows the page's colours.

A page that is read in light and in dark cannot hold pictures with fixed colours. matplotlib draws
every line here in a stand-in colour (``#0101xx``), which is replaced by a CSS variable afterwards;
the page defines the variables twice. Text stays text, so it can be searched, scales with the
reader's font settings and costs no glyph outlines. Each figure is drawn 460 units wide, so that its
labels stay legible when it fills a phone's screen and two fit beside each other on a desktop.

Each function takes a run and returns a ``Figure``, or None if the run has nothing to show there.
Captions state numbers from the data: what a person who cannot see the plot would want to know.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npu_qat.evaluation.intervals import proportion
from npu_qat.reporting.rundata import Record, RunData, number
from npu_qat.reporting.verdict import ROLE_ORDER, arms, percent, precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, TALL = 4.6, 2.7, 3.5
DPI = 100

_KIND_COLORS = tuple(f"k{i}" for i in range(1, 8))
_NAMES = ("ink", "muted", "line", "quant", "base", "ptq", "served", "limit", *_KIND_COLORS)
# CSS variable -> stand-in colour. The page's style sheet defines every one of these variables.
COLORS = {name: f"#0101{i:02x}" for i, name in enumerate(_NAMES, start=16)}

_ROLE_COLORS = {
    "bf16_start": "muted",
    "ptq": "ptq",
    "bf16_lora": "base",
    "served": "served",
    "trained": "quant",
    "other": "ink",
}
_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MARKERS = "osD^v<>"


@dataclass(frozen=True)
class Figure:
    """A plot: an id for its elements, a title, a caption in words, and the SVG text."""

    slug: str
    title: str
    caption: str
    svg: str


def all_figures(run: RunData) -> list[Figure]:
    """Every plot that the run has data for, in reading order."""
    makers: Sequence[Callable[[RunData], Figure | None]] = (
        learning,
        loss,
        accuracy_by_level,
        logp_gap,
        noise,
        weight_error,
        input_error,
        signal,
        lengths,
        speed,
    )
    return [figure for make in makers if (figure := make(run)) is not None]


# Learning -----------------------------------------------------------------------------------------


def learning(run: RunData) -> Figure | None:
    """Training accuracy, reward, and held-out accuracy by step."""
    series = _series(run, "accuracy_train")
    if not series:
        return None
    with drawing() as (axes, finish):
        ax = axes[0]
        for arm, (steps, values) in series.items():
            color = _arm_color(arm)
            ax.plot(steps, _times(100, values), color=color, label=_arm_label(run, arm))
            if (reward := _series(run, "reward_mean").get(arm)) is not None:
                ax.plot(reward[0], _times(100, reward[1]), color=color, lw=1.1, ls=(0, (1.5, 1.5)))
        points = sum(_held_out(ax, run.metrics[arm], _arm_color(arm)) for arm in series)
        if _series(run, "reward_mean"):
            ax.plot([], [], color=COLORS["muted"], lw=1.1, ls=(0, (1.5, 1.5)), label="reward × 100")
        ax.set_ylabel("solved, %")
        caption = _trends(run, series, percent)
        if points:
            caption += " Diamonds: held-out problems, with intervals."
        return finish("learning", "Accuracy and reward on training prompts", caption)


def loss(run: RunData) -> Figure | None:
    """Loss by step, for supervised runs: a policy-gradient loss says nothing about progress."""
    series = _series(run, "loss")
    if not series or _series(run, "accuracy_train"):
        return None
    with drawing() as (axes, finish):
        for arm, (steps, values) in series.items():
            axes[0].plot(steps, values, color=_arm_color(arm), label=_arm_label(run, arm))
        axes[0].set_ylabel("loss")
        return finish("loss", "Loss", _trends(run, series, "{:.3f}".format))


def accuracy_by_level(run: RunData) -> Figure | None:
    """Strict accuracy of each arm with its interval, in all and by difficulty."""
    level = run.evaluations.get("confidence", run.setting("evaluation.confidence", 0.95))
    shown = [arm for arm in arms(run) if run.outcomes.get(arm.name)]
    if not shown:
        return None
    levels = sorted({row["level"] for arm in shown for row in run.outcomes[arm.name]})
    groups: list[int | None] = [None, *(levels if len(levels) > 1 else [])]
    with drawing() as (axes, finish):
        ax = axes[0]
        for i, arm in enumerate(shown):
            offset = (i - (len(shown) - 1) / 2) * 0.8 / len(shown)
            for x, wanted in enumerate(groups):
                rows = [r for r in run.outcomes[arm.name] if wanted in (None, r["level"])]
                if not rows:
                    continue
                e = proportion([bool(row["strict"]) for row in rows], float(level))
                color = COLORS[_ROLE_COLORS[arm.role]]
                below, above = 100 * (e.mean - e.low), 100 * (e.high - e.mean)
                ax.errorbar(
                    x + offset,
                    100 * e.mean,
                    [[below], [above]],
                    color=color,
                    fmt=_MARKERS[ROLE_ORDER.index(arm.role) % len(_MARKERS)],
                    ms=4.5,
                    elinewidth=1.6,
                    label=arm.title if x == 0 else None,
                )
        labels = ["all" if g is None else f"level {g}" for g in groups]
        ax.set_xticks(range(len(groups)), labels)
        ax.set_xlim(-0.6, len(groups) - 0.4)
        ax.set_ylabel("solved, %")
        best = [f"{arm.title} {percent(arm.strict['mean'])}" for arm in shown if arm.strict]
        return finish(
            "by-level",
            "Held-out accuracy (strict) with intervals",
            "All levels: " + ", ".join(best) + ".",
            step_axis=False,
        )


# Evidence -----------------------------------------------------------------------------------------


def logp_gap(run: RunData) -> Figure | None:
    """Mean |log pi_old - log pi_rollout| a token with noise off and on, and the limit."""
    off, on = _series(run, "logp_gap_off_mean"), _series(run, "logp_gap_on_mean")
    if not off and not on:
        return None
    limit = run.setting("dapo.logp_gap_limit")
    with drawing() as (axes, finish):
        ax = axes[0]
        for arm, (steps, values) in off.items():
            label = f"{_arm_label(run, arm)}, noise off"
            ax.plot(steps, values, color=_arm_color(arm), marker="o", ms=2.5, label=label)
        for arm, (steps, values) in on.items():
            label = f"{_arm_label(run, arm)}, noise on"
            ax.plot(steps, values, color=_arm_color(arm), ls=(0, (1.5, 1.5)), label=label)
        positive = [v for s in (*off.values(), *on.values()) for v in s[1] if v > 0]
        if limit is not None:
            ax.axhline(float(limit), color=COLORS["limit"], lw=1.4, ls="--", label="limit")
            positive.append(float(limit))
        if positive and max(positive) > 10 * min(positive):
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
        ax.set_ylabel("mean |Δ log p| a token")
        return finish(
            "logp-gap", "Do rollout and training compute one model?", _gap_caption(off, on, limit)
        )


def noise(run: RunData) -> Figure | None:
    """Sigma on the norm weights, measured, beside the schedule."""
    found = {
        arm: [r for r in records if (number(r, "sigma") or 0.0) > 0.0]
        for arm, records in run.metrics.items()
    }
    found = {arm: records for arm, records in found.items() if records}
    if not found:
        return None
    with drawing() as (axes, finish):
        ax = axes[0]
        stages = run.audit.get("noise", {}).get("stages", [])
        for i, (first, last, sigma) in enumerate(_planned_noise(stages, found)):
            label = "schedule" if i == 0 else None
            ends = [first - 0.5, last + 0.5]
            ax.plot(ends, [sigma] * 2, color=COLORS["muted"], lw=5, alpha=0.45, label=label)
        for arm, records in found.items():
            pairs = [(r["step"], v) for r in records if (v := number(r, "sigma_realized"))]
            steps, measured = [step for step, _ in pairs], [value for _, value in pairs]
            label = f"{_arm_label(run, arm)}, measured"
            ax.plot(steps, measured, color=_arm_color(arm), ls="", marker="o", ms=3.5, label=label)
        _mark_clean_start(ax, stages)
        ax.set_yscale("log")
        ax.set_ylabel("sigma")
        return finish("noise", "Noise on the norms: planned and measured", _noise_caption(found))


def weight_error(run: RunData) -> Figure | None:
    """Relative quantisation error of the weights, by layer and kind of linear."""
    return _error(run, "weight_rel_error", "weight-error", "Quantisation error of weights")


def input_error(run: RunData) -> Figure | None:
    """Relative quantisation error of the inputs, by layer and kind of linear."""
    return _error(run, "input_rel_error", "input-error", "Quantisation error of inputs")


def signal(run: RunData) -> Figure | None:
    """How much of the rollouts can teach (informative groups), and how often the ratio clips."""
    shares = {
        arm: ([r["step"] for r in rows], [r["groups_informative"] / r["groups_seen"] for r in rows])
        for arm, records in run.metrics.items()
        if (rows := [r for r in records if r.get("groups_seen") and "groups_informative" in r])
    }
    low, high = _series(run, "clip_fraction_low"), _series(run, "clip_fraction_high")
    if not shares and not high:
        return None
    with drawing(2) as (axes, finish):
        for arm, (steps, values) in shares.items():
            label = _arm_label(run, arm)
            axes[0].plot(steps, _times(100, values), color=_arm_color(arm), label=label)
        for arm, (steps, values) in high.items():
            axes[1].plot(steps, _times(100, values), color=_arm_color(arm))
        for arm, (steps, values) in low.items():
            axes[1].plot(
                steps, _times(100, values), color=_arm_color(arm), lw=1.1, ls=(0, (1.5, 1.5))
            )
        axes[0].set_ylabel("informative\ngroups, %")
        axes[0].set_ylim(0, 100)
        axes[1].set_ylabel("clipped\ntokens, %")
        axes[1].set_ylim(bottom=0)
        return finish(
            "signal",
            "Learning signal",
            "Groups whose answers are not all right or all wrong. "
            + _trends(run, shares, percent)
            + " Below: tokens whose ratio is clipped from above (solid) and from below (dotted).",
        )


# Cost ---------------------------------------------------------------------------------------------


def lengths(run: RunData) -> Figure | None:
    """Length of completions and share of truncated ones."""
    series, cut = _series(run, "completion_length_mean"), _series(run, "truncated_fraction")
    if not series:
        return None
    with drawing(2) as (axes, finish):
        for arm, (steps, values) in series.items():
            axes[0].plot(steps, values, color=_arm_color(arm), label=_arm_label(run, arm))
        for arm, (steps, values) in cut.items():
            axes[1].plot(steps, _times(100, values), color=_arm_color(arm))
        axes[0].set_ylabel("mean tokens")
        axes[1].set_ylabel("truncated, %")
        axes[1].set_ylim(bottom=0)
        return finish(
            "lengths", "Length of completions", _trends(run, series, "{:.0f} tokens".format)
        )


def speed(run: RunData) -> Figure | None:
    """Seconds a step, rollout and update, and sampled tokens a second."""
    rollout, update = _series(run, "rollout_seconds"), _series(run, "update_seconds")
    rate = _series(run, "tokens_per_second")
    if not rollout and not update:
        return None
    with drawing(2 if rate else 1) as (axes, finish):
        for arm, (steps, values) in (rollout or update).items():
            axes[0].plot(steps, values, color=_arm_color(arm), label=_arm_label(run, arm))
        if rollout:
            for arm, (steps, values) in update.items():
                color = _arm_color(arm)
                axes[0].plot(steps, values, color=color, lw=1.1, ls=(0, (1.5, 1.5)))
        for arm, (steps, values) in rate.items():
            axes[1].plot(steps, values, color=_arm_color(arm))
        axes[0].set_ylabel("seconds a step")
        axes[0].set_ylim(bottom=0)
        if rate:
            axes[1].set_ylabel("tokens a second")
            axes[1].set_ylim(bottom=0)
        what = "Rollouts (solid) and updates (dotted)." if rollout else "Updates."
        return finish("speed", "Speed", f"{what} {_median_seconds(run, rollout, update)}")


# Captions -----------------------------------------------------------------------------------------

Series = dict[str, tuple[list[int], list[float]]]


def _trends(run: RunData, series: Series, show: Callable[[float], str]) -> str:
    """``W4A4: 41.0 % in the first steps, 52.3 % in the last.`` for each arm."""
    parts = []
    for arm, (_, values) in series.items():
        k = max(1, len(values) // 10)
        first, last = sum(values[:k]) / k, sum(values[-k:]) / k
        where = "step" if k == 1 else f"{k} steps"
        parts.append(
            f"{_arm_label(run, arm)}: {show(first)} in the first {where}, {show(last)} in the last."
        )
    return " ".join(parts)


def _gap_caption(off: Series, on: Series, limit: Any) -> str:
    text = []
    if off:
        largest = max(v for s in off.values() for v in s[1])
        text.append(f"Largest with noise off: {largest:.2g}")
        if limit is not None:
            relation = "within" if largest <= float(limit) else "ABOVE"
            text[-1] += f", {relation} the limit of {float(limit):g}"
        text[-1] += "."
    if on:
        largest = max(v for s in on.values() for v in s[1])
        text.append(f"Largest with noise on: {largest:.2g}, which is meant and does not gate.")
    return " ".join(text)


def _noise_caption(found: Mapping[str, list[Record]]) -> str:
    records = [r for rows in found.values() for r in rows]
    changed = sorted({int(r["norms_changed"]) for r in records if "norms_changed" in r})
    pairs = [(number(r, "sigma_realized"), float(r["sigma"])) for r in records]
    worst = max((abs(m / s - 1.0) for m, s in pairs if m is not None), default=None)
    counts = "unknown" if not changed else f"{changed[0]} norms changed in each"
    if len(changed) > 1:
        counts = f"{changed[0]} to {changed[-1]} norms changed"
    text = f"{len(records)} noisy steps, {counts}."
    if worst is not None:
        text += f" Measured sigma is at most {100 * worst:.1f}\u202f% off the schedule."
    return text


def _median_seconds(run: RunData, rollout: Series, update: Series) -> str:
    parts = []
    for arm in {**rollout, **update}:
        total = sum(sorted(s[arm][1])[len(s[arm][1]) // 2] for s in (rollout, update) if arm in s)
        parts.append(f"{_arm_label(run, arm)}: {total:.1f} s in a median step.")
    return " ".join(parts)


# Drawing ------------------------------------------------------------------------------------------


def _series(run: RunData, key: str) -> Series:
    """Steps and values of ``key`` for each arm that has some."""
    found = {}
    for arm, records in run.metrics.items():
        pairs = [(r["step"], v) for r in records if (v := number(r, key)) is not None]
        if pairs:
            found[arm] = ([step for step, _ in pairs], [value for _, value in pairs])
    return found


def _times(factor: float, values: Sequence[float]) -> list[float]:
    return [factor * value for value in values]


def _arm_color(arm: str) -> str:
    """Colour of a *training* arm: bf16_lora, or the quantised one."""
    return COLORS["base"] if arm == "bf16_lora" else COLORS["quant"]


def _arm_label(run: RunData, arm: str) -> str:
    return f"{precision(run)} LoRA" if arm == "bf16_lora" else arm.upper()


def _held_out(ax: Axes, records: Sequence[Record], color: str) -> int:
    """Draw evaluations in training as points with intervals; returns how many there are."""
    drawn = 0
    for record in records:
        score = record.get("evaluation")
        if isinstance(score, Mapping) and (mean := number(score, "strict")) is not None:
            low, high = number(score, "low"), number(score, "high")
            spread = [[100 * (mean - (low or mean))], [100 * ((high or mean) - mean)]]
            ax.errorbar(record["step"], 100 * mean, spread, color=color, fmt="D", ms=4)
            drawn += 1
    return drawn


def _planned_noise(
    stages: Sequence[Mapping[str, Any]], found: Mapping[str, Sequence[Record]]
) -> list[tuple[int, int, float]]:
    """(first step, last step, sigma) of the schedule, steps from 1 as in the metrics.

    From the audit, whose stages count from 0; before there is an audit, from the steps made.
    """
    if stages:
        planned = [s for s in stages if s["sigma"] > 0.0]
        return [(s["first_step"] + 1, s["last_step"] + 1, s["sigma"]) for s in planned]
    return [(r["step"], r["step"], r["sigma"]) for rows in found.values() for r in rows]


def _mark_clean_start(ax: Axes, stages: Sequence[Mapping[str, Any]]) -> None:
    """Say that the first stage has no noise by design: a logarithmic axis cannot show 0."""
    if stages and stages[0].get("sigma") == 0.0:
        end = stages[0]["last_step"] + 1.5
        ax.axvspan(0.5, end, color=COLORS["line"], alpha=0.5, lw=0)
        ax.text(
            (0.5 + end) / 2,
            0.04,
            "no noise",
            transform=ax.get_xaxis_transform(),
            rotation=90,
            ha="center",
            va="bottom",
            color=COLORS["muted"],
            fontsize=9,
        )


def _error(run: RunData, key: str, slug: str, title: str) -> Figure | None:
    kinds: dict[str, list[tuple[int, float]]] = {}
    for module in run.audit.get("modules", []):
        value, layer = number(module, key), module.get("layer")
        if value is not None and layer is not None:
            kinds.setdefault(str(module["name"]).rpartition(".")[2], []).append((layer, value))
    if not any(value > 0.0 for rows in kinds.values() for _, value in rows):
        return None
    names = sorted(kinds, key=lambda k: (_KINDS.index(k) if k in _KINDS else len(_KINDS), k))
    with drawing() as (axes, finish):
        ax = axes[0]
        for i, name in enumerate(names):
            layers, values = zip(*sorted(kinds[name]), strict=True)
            ax.plot(
                layers,
                _times(100, values),
                color=COLORS[_KIND_COLORS[i % len(_KIND_COLORS)]],
                marker=_MARKERS[i % len(_MARKERS)],
                ms=3.5,
                lw=1.3,
                label=name.removesuffix("_proj"),
            )
        ax.set_xlabel("decoder layer")
        ax.set_ylabel("relative error, %")
        ax.set_ylim(bottom=0)
        means = {name: sum(v for _, v in rows) / len(rows) for name, rows in kinds.items()}
        worst, best = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        caption = (
            f"Norm of the error over norm of the tensor. Mean by kind: largest {worst} "
            f"({percent(means[worst])}), smallest {best} ({percent(means[best])})."
        )
        return finish(slug, title, caption, step_axis=False, integer_axis=True)


@contextmanager
def drawing(panels: int = 1) -> Iterator[tuple[list[Axes], Callable[..., Figure]]]:
    """Axes in the page's style, one above the other, and the function that makes the ``Figure``."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_style()):
        canvas = Canvas(figsize=(WIDTH, HEIGHT if panels == 1 else TALL), layout="constrained")
        axes = list(canvas.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])

        def finish(
            slug: str,
            title: str,
            caption: str,
            *,
            step_axis: bool = True,
            integer_axis: bool = False,
        ) -> Figure:
            if step_axis:
                axes[-1].set_xlabel("step")
            if step_axis or integer_axis:
                axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
            handles, labels = axes[0].get_legend_handles_labels()
            if len(labels) > 1:
                columns = 4 if max(map(len, labels)) < 8 else 3 if max(map(len, labels)) < 16 else 2
                canvas.legend(handles, labels, loc="outside upper left", ncols=columns)
            out = io.StringIO()
            metadata = dict.fromkeys(("Date", "Creator", "Type", "Format"))
            canvas.savefig(out, format="svg", metadata=metadata)
            return Figure(slug, title, caption, inline_svg(out.getvalue(), slug, title))

        yield axes, finish


def _style() -> dict[Any, Any]:
    ink, muted, line = COLORS["ink"], COLORS["muted"], COLORS["line"]
    return {
        "backend": "Agg",
        "svg.fonttype": "none",
        "svg.hashsalt": "npu-qat",
        "font.size": 11,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": line,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.labelsize": 10.5,
        "grid.color": line,
        "grid.linewidth": 0.8,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "lines.linewidth": 1.9,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 10,
        "legend.handlelength": 1.4,
        "legend.columnspacing": 1.2,
        "legend.handletextpad": 0.5,
        "legend.borderpad": 0.0,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "savefig.dpi": DPI,
    }


def inline_svg(text: str, slug: str, title: str) -> str:
    """An SVG file as an element of a page: CSS colours, ids of its own, a size that scales."""
    body = text[text.index("<svg") :]
    for name, stand_in in COLORS.items():
        body = body.replace(stand_in, f"var(--{name})")
    body = re.sub(r'\bid="([^"]+)"', rf'id="{slug}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{slug}-\1)", body)
    body = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'href="#{slug}-\2"', body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", body)
    size = re.search(r'viewBox="[^"]+"', body)
    assert size is not None, "matplotlib writes a viewBox"
    head = f'<svg {size[0]} role="img" aria-labelledby="{slug}-title">'
    head += f'<title id="{slug}-title">{html.escape(title)}</title>'
    return re.sub(r"<svg[^>]*>", lambda _: head, body, count=1).strip()
