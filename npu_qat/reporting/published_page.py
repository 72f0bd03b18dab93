"""The page and the heat map of a published scan (``npu-qat scan --method published``).

One row a decoder layer, the four numbers that the published thresholds judge, and what follows
from the flags. The plan's predicted total error stands beside the measured one. The picture shows
the same numbers, each on a scale of its own; the page follows the rules of ``scan_page``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from npu_qat.__about__ import __version__
from npu_qat.reporting.html import page_environment
from npu_qat.reporting.plots import COLORS, Figure, drawing
from npu_qat.reporting.scan_page import Guidance, multiplier_table
from npu_qat.sensitivity.depth import predicted_group
from npu_qat.training.rundir import write_atomically

TEMPLATE = "published.html.j2"

_WRITTEN = 12  # layers up to which the picture has room for numbers

Result = Mapping[str, Any]
"""What ``published_scan`` returns."""


@dataclass(frozen=True)
class Column:
    """A published metric: its key, how it is called and shown, and which end of it is bad."""

    key: str
    title: str
    unit: str
    factor: float
    form: str
    low_is_bad: bool = False


COLUMNS = (
    Column("sqnr_db", "Signal over error", "dB", 1.0, "{:.1f}", low_is_bad=True),
    Column("deadzone_ratio", "Dead zone", "%", 100.0, "{:.1f}"),
    Column("saturation_ratio", "Saturation", "%", 100.0, "{:.2f}"),
    Column("relative_error", "Relative error", "%", 100.0, "{:.1f}"),
)


def write_published_map(result: Result, path: Path, title: str) -> None:
    """A PNG with a strip a metric: decoder layers from left to right, dark is bad."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure as Canvas

    rows = _rows(result)
    layers = result["report"]["per_layer"]
    names = [str(row["layer"]) for row in rows]
    width = max(6.4, 2.2 + 0.34 * len(rows))
    with matplotlib.rc_context({"backend": "Agg", "font.size": 10}):
        canvas = Canvas(figsize=(width, 0.9 + 1.1 * len(COLUMNS)), layout="constrained")
        canvas.suptitle(textwrap.fill(title, int(9 * width)), fontsize=11, fontweight="bold")
        for at, (axes, column) in enumerate(
            zip(canvas.subplots(len(COLUMNS), 1), COLUMNS, strict=True)
        ):
            values = np.array([[column.factor * layer[column.key] for layer in layers]])
            colors = "cividis" if column.low_is_bad else "cividis_r"
            image = axes.imshow(values, aspect="auto", cmap=colors)
            axes.set_yticks([])
            every = max(1, len(rows) // 14)
            axes.set_xticks(range(0, len(rows), every), names[::every])
            axes.set_title(f"{column.title}, {column.unit}", fontsize=10, loc="left")
            canvas.colorbar(image, ax=axes, pad=0.01)
            for x, row in enumerate(rows if len(rows) <= _WRITTEN else ()):
                text, badness = row["cells"][at]
                color = "white" if badness > 0.5 else "black"
                axes.text(x, 0, text, ha="center", va="center", color=color, fontsize=9)
        axes.set_xlabel("decoder layer")
        picture = BytesIO()
        # No software version in the file, so that equal scans give equal bytes.
        canvas.savefig(picture, format="png", dpi=150, metadata={"Software": None})
    write_atomically(path, picture.getvalue())


def write_published_page(
    result: Result, path: Path, *, source: str, guidance: Guidance, files: Mapping[str, str]
) -> None:
    """Write the HTML page.

    Args:
        result: what ``published_scan`` returned.
        path: the file; replaced whole.
        source: which texts were read, in words.
        guidance: scores and multipliers.
        files: what else was written: name -> what it is.
    """
    page = (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            version=__version__,
            config=result["config"],
            summary=result["report"]["summary"],
            rows=_rows(result),
            columns=COLUMNS,
            statement=result["statement"],
            recommendations=result["recommendations"],
            depth=_depth_figure(result),
            source=source,
            guidance=guidance,
            multipliers=multiplier_table(guidance),
            files=files,
        )
    )
    write_atomically(path, page.encode())


def _rows(result: Result) -> list[dict[str, Any]]:
    """Layer, cells (text and badness from 0 to 1 in their column), and the reasons of its flag."""
    layers = result["report"]["per_layer"]
    spans = {c.key: [row[c.key] for row in layers] for c in COLUMNS}
    rows = []
    for layer in layers:
        cells = []
        for column in COLUMNS:
            low, high = min(spans[column.key]), max(spans[column.key])
            share = (layer[column.key] - low) / (high - low) if high > low else 0.0
            badness = 1.0 - share if column.low_is_bad else share
            text = column.form.format(column.factor * layer[column.key])
            cells.append((text, badness if high > low else 0.0))
        rows.append({"layer": layer["layer_id"], "cells": cells, "issues": layer["issues"]})
    return rows


def _depth_figure(result: Result) -> Figure:
    """The measured relative error by depth, and the plan's predicted total as steps."""
    layers = [row["layer_id"] for row in result["report"]["per_layer"]]
    measured = [100 * row["relative_error"] for row in result["report"]["per_layer"]]
    plan = [100 * predicted_group(i, len(layers)).total for i in range(len(layers))]
    with drawing() as (axes, finish):
        axes[0].plot(layers, measured, color=COLORS["quant"], marker="o", ms=3, label="measured")
        dotted = (0, (1.5, 1.5))
        axes[0].step(
            layers, plan, where="mid", color=COLORS["quant"], lw=1.2, ls=dotted, label="plan: total"
        )
        axes[0].set_ylabel("mean |e|/|x|, %")
        axes[0].set_xlabel("decoder layer")
        axes[0].set_ylim(bottom=0)
        return finish(
            "depth",
            "Relative error by depth, beside the plan's prediction",
            "Mean relative error of elements. Dotted: the experiment plan, section 3.1, weights "
            "and activations together, by relative depth.",
            step_axis=False,
            integer_axis=True,
        )
