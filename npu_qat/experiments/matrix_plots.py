"""Two plots as SVG text: rows with their intervals, and learning curves.

Written by hand and not by a plotting library, because a committed page is compared with what its
result files give today: the same numbers must give the same bytes on every machine and with every
version. Text stays text. Colours are in between, so that they hold on a white and on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 900
LABELS = 430  # room for the rows' names
ROW = 24
MARGIN = 30
INK, LINE, MAIN = "#6b7785", "#9aa5b1", "#2f81c7"
# Told apart by eye; more lines than these are dashed.
COLORS = ("#2f81c7", "#d1712b", "#3d9a5f", "#b3508f", "#a08a1c", "#c04f4f", "#3c9aa8", "#7a7a7a")
# Letters that fit beside the rows and in a legend as wide as the plot.
ROW_LETTERS, LEGEND_LETTERS = 56, 112


@dataclass(frozen=True)
class Dot:
    """A row: name, mean and interval; ``hollow`` for rows without training."""

    label: str
    mean: float
    low: float
    high: float
    hollow: bool = False


def dot_plot(dots: Sequence[Dot], unit: str) -> str:
    """Rows from top to bottom, each a dot with its interval."""
    height = MARGIN + ROW * len(dots) + 2 * MARGIN
    ticks = _ticks([d.low for d in dots] + [d.high for d in dots])
    x = _axis(ticks, LABELS, WIDTH - MARGIN)
    bottom = MARGIN + ROW * len(dots)
    parts = []
    for tick in ticks:
        parts += [
            _line(x(tick), MARGIN - 8, x(tick), bottom, LINE, 0.5),
            _text(x(tick), bottom + 18, _number(tick), "middle"),
        ]
    parts.append(_text((LABELS + WIDTH - MARGIN) / 2, bottom + 40, unit, "middle"))
    for i, dot in enumerate(dots):
        y = MARGIN + ROW * i + ROW / 2
        fill = "none" if dot.hollow else MAIN
        parts += [
            _text(LABELS - 14, y + 4, _cut(dot.label, ROW_LETTERS), "end"),
            _line(x(dot.low), y, x(dot.high), y, MAIN, 2),
            f'<circle cx="{x(dot.mean):.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{MAIN}" '
            f'stroke-width="1.5"/>',
        ]
    return _svg(height, parts)


def curve_plot(series: Mapping[str, Sequence[float]], unit: str) -> str:
    """Lines by step, from step 1, with a legend below."""
    plot, left = 340, 60
    height = plot + 2 * MARGIN + 18 * len(series) + 10
    values = [value for line in series.values() for value in line]
    steps = max((len(line) for line in series.values()), default=1)
    ticks = _ticks(values)
    y = _axis(ticks, plot, MARGIN)
    x = _axis([1, max(steps, 2)], left, WIDTH - MARGIN)
    parts = [_text(left, MARGIN - 14, unit, "start")]
    for tick in ticks:
        parts += [
            _line(left, y(tick), WIDTH - MARGIN, y(tick), LINE, 0.5),
            _text(left - 8, y(tick) + 4, _number(tick), "end"),
        ]
    shares = (0.25, 0.5, 0.75, 1.0) if steps > 4 else (1.0,)
    for step in sorted({1, *(round(steps * share) for share in shares)}):
        parts.append(_text(x(step), plot + 18, str(step), "middle"))
    parts.append(_text((left + WIDTH) / 2, plot + 36, "step", "middle"))
    for i, (label, line) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        dash = "" if i < len(COLORS) else ' stroke-dasharray="5 3"'
        points = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in enumerate(line, start=1))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.4"{dash}/>'
        )
        at = plot + 60 + 18 * i
        parts += [
            f'<line x1="{left}" y1="{at - 4}" x2="{left + 22}" y2="{at - 4}" stroke="{color}" '
            f'stroke-width="2"{dash}/>',
            _text(left + 28, at, _cut(label, LEGEND_LETTERS), "start"),
        ]
    return _svg(height, parts)


def _ticks(values: Sequence[float]) -> list[float]:
    """Four to eight round numbers that enclose ``values``."""
    if not values:
        return [0.0, 1.0]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * k, 10) for k in range(first, max(last, first + 1) + 1)]


def _axis(ticks: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """Maps the first tick to ``start`` and the last to ``end``."""
    low, high = ticks[0], ticks[-1]
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _number(value: float) -> str:
    return f"{value:g}"


def _cut(label: str, letters: int) -> str:
    return label if len(label) <= letters else f"{label[: letters - 4]} ..."


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
        f'stroke-width="{width}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}">'
    )
    return "\n".join([head, *parts, "</svg>", ""])
