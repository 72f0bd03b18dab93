"""The page and the heat map of a sensitivity scan.

The page follows the report's rules: one file, no scripts, nothing fetched, readable in the dark
and on a phone. Its heat maps are tables whose cells are coloured by CSS, so that the numbers can be
read and copied; the PNG shows the same for slides and issues, where tables do not go.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_qat.__about__ import __version__
from npu_qat.config import LayerSigma
from npu_qat.noise import LayerMultipliers
from npu_qat.reporting import verdict
from npu_qat.reporting.html import page_environment
from npu_qat.reporting.plots import COLORS, Figure, drawing
from npu_qat.sensitivity import LinearScan, Scan
from npu_qat.sensitivity.depth import predicted_group
from npu_qat.sensitivity.loss import LossContribution
from npu_qat.sensitivity.scanner import errors_by_layer
from npu_qat.training.rundir import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = "scan.html.j2"
_KIND_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WORST_SHOWN = 10
_CHANNELS_SHOWN = 12


@dataclass(frozen=True)
class Guidance:
    """What a scan suggests: the score it goes by, the scores, and the section of each strategy."""

    score: str
    scores: dict[int, float]
    sections: dict[str, LayerSigma]
    statement: str


@dataclass(frozen=True)
class Measure:
    """One number of each linear: how it is called, found, written and judged."""

    slug: str
    title: str
    unit: str
    value: Callable[[Scan, LinearScan], float | None]
    form: str
    low_is_bad: bool


def _loss(scan: Scan, linear: LinearScan) -> float | None:
    found = scan.loss and scan.loss.linears.get(linear.path)
    return 1000.0 * found.one_at_a_time.mean if found else None


MEASURES = (
    Measure(
        "input",
        "Input: signal over 4-bit error, median token",
        "dB",
        lambda _, s: s.input.sqnr_db["p50"] if s.input else None,
        "{:.1f}",
        True,
    ),
    Measure(
        "weight",
        "Weight: signal over 4-bit error, median output channel",
        "dB",
        lambda _, s: s.weight.sqnr_db["p50"] if s.weight else None,
        "{:.1f}",
        True,
    ),
    Measure(
        "output",
        "Result: signal over error, median token",
        "dB",
        lambda _, s: s.output.sqnr_db["p50"],
        "{:.1f}",
        True,
    ),
    Measure(
        "dead",
        "Input: non-zero elements that become zero",
        "%",
        lambda _, s: 100.0 * s.input.dead_zone if s.input else None,
        "{:.0f}",
        False,
    ),
    Measure(
        "loss", "Loss added by this linear alone", "millinats a token", _loss, "{:+.1f}", False
    ),
)


@dataclass(frozen=True)
class Cell:
    """A value, as text, and its place between the best (0) and the worst (1) of its grid."""

    value: float
    text: str
    badness: float


@dataclass(frozen=True)
class Grid:
    """A measure of all linears, by decoder layer (``rows``: name, cells) and by kind."""

    measure: Measure
    kinds: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def grids(scan: Scan) -> list[Grid]:
    """The measures that this scan has, by decoder layer and kind of linear."""
    kinds = kinds_of(scan)
    found = []
    for measure in MEASURES:
        values = {(s.layer, s.kind): measure.value(scan, s) for s in scan.linears}
        numbers = [v for v in values.values() if v is not None]
        if not numbers:
            continue
        low, high = min(numbers), max(numbers)
        rows = []
        for layer in _layer_keys(scan):
            cells: list[Cell | None] = []
            for kind in kinds:
                value = values.get((layer, kind))
                if value is None:
                    cells.append(None)
                    continue
                share = (value - low) / (high - low) if high > low else 0.0
                badness = 1.0 - share if measure.low_is_bad else share
                cells.append(Cell(value, measure.form.format(value), badness))
            rows.append(("–" if layer is None else str(layer), cells))
        found.append(Grid(measure, kinds, rows))
    return found


def kinds_of(scan: Scan) -> list[str]:
    """Kinds of linears in reading order: attention, feed-forward, then others."""
    kinds = {s.kind for s in scan.linears}
    known = [kind for kind in _KIND_ORDER if kind in kinds]
    return [*known, *sorted(kinds - set(known))]


def _layer_keys(scan: Scan) -> list[int | None]:
    outside: list[int | None] = [None] if any(s.layer is None for s in scan.linears) else []
    return [*scan.layers, *outside]


# The picture --------------------------------------------------------------------------------------


def write_heat_map(scan: Scan, path: Path, title: str) -> None:
    """A PNG with one panel a measure: kinds of linears over decoder layers."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    shown = grids(scan)
    layers, kinds = len(_layer_keys(scan)), len(kinds_of(scan))
    width = max(6.4, 2.2 + 0.34 * layers)
    with matplotlib.rc_context({"backend": "Agg", "font.size": 10}):
        canvas = Canvas(
            figsize=(width, 0.9 + len(shown) * (0.75 + 0.27 * kinds)), layout="constrained"
        )
        canvas.suptitle(textwrap.fill(title, int(9 * width)), fontsize=11, fontweight="bold")
        panels = canvas.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axes, grid in zip(panels, shown, strict=True):
            _draw_grid(axes, grid)
        picture = BytesIO()
        # No software version in the file, so that equal scans give equal bytes.
        canvas.savefig(picture, format="png", dpi=150, metadata={"Software": None})
    write_atomically(path, picture.getvalue())


def _draw_grid(axes: Axes, grid: Grid) -> None:
    import numpy as np
    from matplotlib.colors import Normalize

    values = np.full((len(grid.kinds), len(grid.rows)), np.nan)
    for column, (_, cells) in enumerate(grid.rows):
        for row, cell in enumerate(cells):
            if cell is not None:
                values[row, column] = cell.value
    low, high = np.nanmin(values), np.nanmax(values)
    norm = Normalize(low, high if high > low else low + 1.0)
    colors = "cividis" if grid.measure.low_is_bad else "cividis_r"  # dark is bad, in all panels
    image = axes.imshow(values, aspect="auto", cmap=colors, norm=norm)
    axes.set_yticks(range(len(grid.kinds)), [k.removesuffix("_proj") for k in grid.kinds])
    every = max(1, len(grid.rows) // 14)
    axes.set_xticks(range(0, len(grid.rows), every), [name for name, _ in grid.rows[::every]])
    axes.set_title(f"{grid.measure.title}, {grid.measure.unit}", fontsize=10, loc="left")
    axes.set_xlabel("decoder layer")
    axes.figure.colorbar(image, ax=axes, pad=0.01)
    if len(grid.rows) > 12:
        return
    for column, (_, cells) in enumerate(grid.rows):
        for row, cell in enumerate(cells):
            if cell is not None:
                color = "white" if cell.badness > 0.5 else "black"
                axes.text(column, row, cell.text, ha="center", va="center", color=color, fontsize=9)


# The page -----------------------------------------------------------------------------------------


def write_scan_page(
    scan: Scan,
    path: Path,
    *,
    model: str,
    source: str,
    guidance: Guidance,
    statements: Sequence[str],
    files: Mapping[str, str],
) -> None:
    """Write the HTML page.

    Args:
        scan: what was measured.
        path: the file; replaced whole.
        model, source: which model, and which texts, in words.
        guidance: scores and multipliers.
        statements: sentences that the reader must not miss.
        files: what else was written: name -> what it is.
    """
    environment = page_environment()
    environment.filters["percent"] = verdict.percent
    page = environment.get_template(TEMPLATE).render(
        version=__version__,
        scan=scan,
        model=model,
        source=source,
        headline=headline(scan),
        facts=_facts(scan, model),
        statements=statements,
        grids=grids(scan),
        worst=worst_linears(scan),
        channels=outlier_channels(scan),
        depth=depth_figure(scan),
        guidance=guidance,
        multipliers=multiplier_table(guidance),
        misleading=sum(bool(s.input and s.input.relative_error_misleading) for s in scan.linears),
        files=files,
    )
    write_atomically(path, page.encode())


def headline(scan: Scan) -> str:
    """The scan in one sentence."""
    name = scan.linears[0].mode
    if scan.loss is None:
        return f"{name}: what 4 bits do to each of {len(scan.linears)} linears"
    clean, quantized = scan.loss.clean, scan.loss.quantized
    verb = "raises" if quantized > clean else "changes"
    return (
        f"{name} {verb} the loss from {clean:.3f} to {quantized:.3f} nats a token "
        f"({quantized - clean:+.3f})"
    )


def _facts(scan: Scan, model: str) -> list[tuple[str, str]]:
    recipe = scan.recipe
    profiles = {recipe["weight_profile"], recipe["activation_profile"]}
    return [
        ("model", model),
        ("mode", f"{scan.linears[0].mode} ({recipe['injection_point']})"),
        ("profile", " / ".join(sorted(profiles))),
        ("texts", f"{scan.texts} ({scan.tokens:,} tokens, {scan.scored_tokens:,} scored)"),
    ]


@dataclass(frozen=True)
class WorstLinear:
    """A row of the table of the worst."""

    linear: LinearScan
    loss: LossContribution | None

    @property
    def badness(self) -> float:
        """Loss that the linear adds alone; without a loss, what its result lacks in dB."""
        return self.loss.one_at_a_time.mean if self.loss else -self.linear.output.sqnr_db["p50"]


def worst_linears(scan: Scan) -> list[WorstLinear]:
    """The linears that cost the loss most; without a loss, those with the largest output error."""
    losses = scan.loss.linears if scan.loss else {}
    rows = [WorstLinear(linear, losses.get(linear.path)) for linear in scan.linears]
    return sorted(rows, key=lambda row: -row.badness)[:_WORST_SHOWN]


def outlier_channels(scan: Scan) -> list[dict[str, Any]]:
    """Input channels that are outliers, by how many linears read them: channel, largest ratio,
    linears. A channel of the hidden size is the same channel in q, k, v, gate and up."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for linear in scan.linears:
        for outlier in linear.input.outlier_channels if linear.input else []:
            key = (outlier.channel, _width_class(linear))
            row = found.setdefault(
                key, {"channel": outlier.channel, "ratio": 0.0, "linears": [], "layers": set()}
            )
            row["ratio"] = max(row["ratio"], outlier.ratio)
            row["linears"].append(linear.path)
            row["layers"].add(linear.layer)
    rows = sorted(found.values(), key=lambda row: (-len(row["linears"]), -row["ratio"]))
    for row in rows:
        row["kinds"] = sorted({path.rpartition(".")[2] for path in row["linears"]})
        row["layers"] = sorted(i for i in row["layers"] if i is not None)
    return rows[:_CHANNELS_SHOWN]


def _width_class(linear: LinearScan) -> int:
    """Inputs of o_proj and down_proj are spaces of their own."""
    return {"o_proj": 1, "down_proj": 2}.get(linear.kind, 0)


def depth_figure(scan: Scan) -> Figure:
    """Measured errors by depth, and the plan's predictions as steps."""
    layers = list(scan.accumulated)
    rows = errors_by_layer(scan.linears, scan.accumulated)
    plan = [predicted_group(position, len(layers)) for position in range(len(layers))]
    with drawing(2) as (axes, finish):
        for key, color, label in (
            ("weight", "base", "weights"),
            ("activation", "quant", "activations"),
        ):
            measured = [100 * rows[layer][key] for layer in layers]
            if any(measured):
                axes[0].plot(layers, measured, color=COLORS[color], marker="o", ms=3, label=label)
            predicted = [100 * getattr(group, key) for group in plan]
            axes[0].step(
                layers,
                predicted,
                where="mid",
                color=COLORS[color],
                lw=1.2,
                ls=(0, (1.5, 1.5)),
                label=f"plan: {label}",
            )
        accumulated = [100 * scan.accumulated[layer].relative_error for layer in layers]
        axes[1].plot(layers, accumulated, color=COLORS["served"], marker="o", ms=3)
        axes[1].step(
            layers,
            [100 * group.total for group in plan],
            where="mid",
            color=COLORS["served"],
            lw=1.2,
            ls=(0, (1.5, 1.5)),
        )
        axes[0].set_ylabel("mean |e|/|x|, %")
        axes[1].set_ylabel("hidden state, %")
        axes[1].set_xlabel("decoder layer")
        for ax in axes:
            ax.set_ylim(bottom=0)
        return finish(
            "depth",
            "Error by depth, beside the plan's prediction",
            "Above: mean relative error of elements, the plan's unit, which each layer makes by "
            "itself. Below: relative error of the hidden state behind each layer with everything "
            "quantised, median token. Dotted: the experiment plan, section 3.1, by relative depth. "
            + scan.growth.statement,
            step_axis=False,
            integer_axis=True,
        )


def multiplier_table(guidance: Guidance) -> list[dict[str, Any]]:
    """Score and multiplier of each strategy, by layer; zones in their late phase."""
    tables = {
        name: LayerMultipliers(section, guidance.scores)
        for name, section in guidance.sections.items()
    }
    rows = []
    for layer in sorted(guidance.scores):
        last = {name: table.multiplier(layer, 1, 2) for name, table in tables.items()}
        rows.append({"layer": layer, "score": guidance.scores[layer], "multipliers": last})
    return rows
