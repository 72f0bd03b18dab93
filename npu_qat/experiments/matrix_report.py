"""Pages of an analysed matrix: Markdown, HTML, JSON and the plots that they show.

One list of sections (texts, tables, pictures) is written as Markdown and as one HTML file without
outside parts; the JSON file has the same numbers for programs.
"""

from __future__ import annotations

import html as html_module
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from npu_qat.experiments.matrix import Matrix
from npu_qat.experiments.matrix_analysis import (
    TOPICS,
    Analysis,
    Answer,
    Result,
    Row,
    Scale,
    analyse,
    cell_name,
    device_of,
)
from npu_qat.experiments.matrix_plots import Dot, curve_plot, dot_plot


def write_report(matrix: Matrix, results: Path, output: Path) -> list[Path]:
    """Write ``report.md``, ``report.html``, ``report.json`` and two plots into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in report_files(matrix, results, output).items():
        path = output / name
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def report_files(matrix: Matrix, results: Path, output: Path | None = None) -> dict[str, str]:
    """File name -> content of a report for the folder ``output`` (default: above ``results``)."""
    found = analyse(matrix, results)
    found.cells = Path(os.path.relpath(results, output or results.parent)).as_posix()
    plots = {"rows.svg": _dot_plot(found), "curves.svg": _curves(found)}
    return {
        "report.md": markdown(found),
        "report.json": json.dumps(as_json(found), indent=1, ensure_ascii=False) + "\n",
        "report.html": as_html(found, plots),
        **plots,
    }


def as_json(found: Analysis) -> Result:
    """The analysis as plain data."""
    scale = found.scale
    return {
        "matrix": found.matrix.name,
        "title": found.matrix.title,
        "metric": scale.metric,
        "made_by": _made_by(found),
        "rows": [
            {
                "row": row.name,
                "model": row.model,
                "title": row.title,
                **_estimate_json(row, scale),
                "values": {str(s): _round(scale.shown(v)) for s, v in sorted(row.values.items())},
                "noise": row.results[0].get("noise") if row.results else None,
            }
            for row in found.rows
        ],
        "answers": [
            {
                "question": a.contrast.question,
                "topic": a.contrast.answers,
                "model": a.model,
                "arms": a.contrast.arms,
                "seeds": a.seeds,
                "unit": "share" if scale.is_accuracy else "log perplexity",
                "estimate": _round(a.estimate),
                "low": _round(a.low),
                "high": _round(a.high),
                "p": _round(a.p),
                "p_holm": _round(a.p_holm),
                "words": a.words(scale),
            }
            for a in found.answers
        ],
        "checks": [vars(check) for check in found.checks],
        "failures": [
            {"cell": cell_name(f), "type": f["error"]["type"], "text": f["error"]["text"]}
            for f in found.failures
        ],
        "missing": found.missing,
        "stale": found.stale,
    }


def _estimate_json(row: Row, scale: Scale) -> Result:
    found = row.estimate(scale)
    if found is None:
        return {"mean": None}
    mean, low, high, over = found
    shown = [_round(scale.shown(v)) for v in (mean, low, high)]
    return {"mean": shown[0], "low": shown[1], "high": shown[2], "interval_over": over}


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _made_by(found: Analysis) -> Result:
    """On what the results depend, each with the number of cells."""

    def count(get: Callable[[Result], Any]) -> dict[str, int]:
        return dict(sorted(Counter(str(get(r)) for r in found.results).items()))

    def versions(result: Result) -> str:
        v = result["environment"]["versions"]
        return ", ".join(f"{n} {v[n]}" for n in ("python", "torch", "transformers") if n in v)

    return {
        "code": count(lambda r: r["code"]),
        "commit": count(lambda r: found.commits.get(r["code"], r["environment"].get("git_commit"))),
        "device": count(device_of),
        "backend": count(lambda r: r["environment"]["backend"]),
        "versions": count(versions),
        "first": min((r["finished"] for r in found.results), default=None),
        "last": max((r["finished"] for r in found.results), default=None),
        "seconds": round(sum(r["seconds"] for r in found.results)),
    }


def markdown(found: Analysis) -> str:
    """The report as Markdown."""
    lines = [f"# {found.matrix.title}", ""]
    lines += [
        f"Written by `npu-qat experiment pages` from the result files in [{found.cells}]"
        f"({found.cells}); do not edit. `npu-qat experiment run {found.matrix.name}` makes such "
        "files.",
        "",
    ]
    for title, blocks in _sections(found):
        lines += [f"## {title}", ""] if title else []
        for block in blocks:
            lines += [*block_lines(block), ""]
    return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True)
class Table:
    """A table of texts; the columns after the first ``left`` are right-aligned."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Picture:
    """One of the plots, with what it shows in words."""

    file: str
    alt: str


Block = str | Table | Picture


def block_lines(block: Block) -> list[str]:
    """``block`` in Markdown."""
    if isinstance(block, Picture):
        return [f"![{block.alt}]({block.file})"]
    if isinstance(block, Table):
        marks = ["---" if i < block.left else "---:" for i in range(len(block.head))]
        rows = [block.head, marks, *block.body]
        return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return [block]


def _sections(found: Analysis) -> list[tuple[str, list[Block]]]:
    """The page's sections: title and blocks, for Markdown and HTML alike."""
    metric = "Accuracy" if found.scale.is_accuracy else "Perplexity of the answers (less is better)"
    sections: list[tuple[str, list[Block]]] = [
        ("", [*found.matrix.about.splitlines(), _made_by_words(found)]),
        (
            metric,
            [_row_note(found), _row_table(found), Picture("rows.svg", f"{metric} of each row")],
        ),
        ("Questions", [_question_note(found), *_question_tables(found)]),
        ("What makes the arms comparable", [_check_table(found)]),
    ]
    if any(r.get("curves", {}).get(found.matrix.curve) for r in found.results):
        some = "Some of the arms; the others are in the result files. "
        text = f"Mean over seeds of `{found.matrix.curve}` by step, in the numbers of the arm."
        text = some * bool(found.matrix.curve_arms) + text
        curves: list[Block] = [text, Picture("curves.svg", f"{found.matrix.curve} by step")]
        sections.append(("Learning curves", curves))
    if table := _noise_table(found):
        note = (
            "Measured from the norm weights. Realised over scheduled: standard deviation of the "
            "differences, each over its multiplier, divided by the schedule's sigma. Root mean "
            "square: over all steps and norms with noise, multipliers included."
        )
        sections.append(("Realised noise", [note, table]))
    if table := _published_table(found):
        sections.append(("Beside the documents' numbers", [table]))
    return sections


def _made_by_words(found: Analysis) -> str:
    if not found.results:
        return "No results yet."
    made = _made_by(found)

    def several(name: str) -> str:
        values: dict[str, int] = made[name]
        if len(values) == 1:
            return next(iter(values))
        return "; ".join(f"{value} ({count} cells)" for value, count in values.items())

    text = (
        f"{len(found.results)} cells, finished {made['first'][:10]}, "
        f"{made['seconds'] / 3600:.1f} process hours, on {several('device')}, backend "
        f"{several('backend')}, {several('versions')}. Code {several('code')}"
    )
    if set(made["commit"]) != {"None"}:
        text += f", commit {several('commit')}"
    text += " (`npu-qat experiment list` prints a checkout's)."
    if len(made["code"]) > 1:
        text += " **Cells were made by several versions of the code.**"
    return text


def _row_note(found: Analysis) -> str:
    n = next((e["n"] for r in found.rows for e in r.evaluations), 0)
    return (
        f"{n:,} problems a row. 95 % intervals: over seeds (Student's t) where there are several, "
        "else over problems."
    )


def _row_table(found: Analysis) -> Table:
    several = len(found.matrix.models) > 1
    body = []
    for row in found.rows:
        estimate = row.estimate(found.scale)
        flags = {"no-learning": "fails by construction"}.get(row.arm.expect, "")
        name = f"{row.title} (`{row.name}`)" if not several else f"{row.title} ({row.model})"
        if estimate is None:
            body.append([name, "not yet measured", "", "", flags])
            continue
        mean, low, high, over = estimate
        text = found.scale.text
        body.append([name, text(mean), f"{text(low)} to {text(high)}", over, flags])
    return Table(["row", "mean", "95 % interval", "interval over", ""], body)


def _question_note(found: Analysis) -> str:
    more = "" if found.scale.is_accuracy else " Negative: less perplexity, which is better."
    return (
        f"Differences in {found.scale.unit}, seed by seed, with 95 % intervals over seeds; paired "
        f"t test, p corrected by Holm's method within each table.{more}"
    )


def _question_tables(found: Analysis) -> list[Block]:
    blocks: list[Block] = []
    for topic, title in TOPICS.items():
        chosen = [a for a in found.answers if a.contrast.answers == topic]
        if chosen:
            blocks += [f"**{title}**", answer_table(chosen, found.scale)]
    return blocks


def answer_table(answers: Sequence[Answer], scale: Scale) -> Table:
    """Questions with what the results say."""
    body = []
    for a in answers:
        if a.estimate is None:
            body.append([a.contrast.question, "", "", "", "", "", a.words(scale)])
            continue
        interval = ""
        if a.low is not None and a.high is not None:
            interval = f"{scale.difference(a.low)} to {scale.difference(a.high)}"
        p = "" if a.p is None else _p_text(a.p)
        corrected = "" if a.p_holm is None else _p_text(a.p_holm)
        estimate = scale.difference(a.estimate)
        seeds = str(len(a.seeds))
        question = a.contrast.question
        body.append([question, estimate, interval, seeds, p, corrected, a.words(scale)])
    head = ["question", "difference", "95 % interval", "seeds", "p", "p (Holm)", "answer"]
    return Table(head, body)


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _check_table(found: Analysis) -> Table:
    return Table(
        ["check", "", "detail"],
        [[c.name, "yes" if c.ok else "**no**", c.detail] for c in found.checks],
        left=3,
    )


def _noise_table(found: Analysis) -> Table | None:
    body = []
    for row in found.rows:
        noises = [r["noise"] for r in row.results if r.get("noise", {}).get("noisy_steps")]
        if not noises or "@" in row.name:
            continue
        first = noises[0]
        body.append(
            [
                row.title,
                str(first["noisy_steps"]),
                f"{first['sigma_first']:.4g} to {first['sigma_last']:.4g}",
                f"{fmean(n['realized_over_scheduled'] for n in noises):.3f}",
                f"{fmean(n['rms_realized'] for n in noises):.3g}",
                " or ".join(str(n) for n in first["norms_changed"]),
            ]
        )
    head = ["arm", "noisy steps", "sigma", "realised / scheduled", "root mean square", "norms"]
    return Table(head, body) if body else None


def _published_table(found: Analysis) -> Table | None:
    body = []
    for row in found.rows:
        estimate = row.estimate(found.scale)
        for p in row.arm.published if row.name == row.arm.name else ():
            ours = "not yet measured" if estimate is None else found.scale.text(estimate[0])
            body.append([row.title, ours, f"{p.value:g}", p.what, " ".join(p.note.split())])
    return (
        Table(["arm", "ours", "theirs", "what theirs is", "why they differ"], body, 5)
        if body
        else None
    )


def _dot_plot(found: Analysis) -> str:
    dots = []
    for row in found.rows:
        estimate = row.estimate(found.scale)
        if estimate is not None:
            mean, low, high, _ = estimate
            shown = found.scale.shown
            dots.append(Dot(row.title, shown(mean), shown(low), shown(high), hollow=row.anchor))
    unit = "accuracy, %" if found.scale.is_accuracy else "perplexity of the answers"
    return dot_plot(dots, unit)


def _curves(found: Analysis) -> str:
    series: dict[str, list[float]] = {}
    drawn = found.matrix.curve_arms
    for row in found.rows:
        if "@" in row.name or (drawn and row.arm.name not in drawn):
            continue
        runs = [r["curves"].get(found.matrix.curve) for r in row.results if "curves" in r]
        whole = [run for run in runs if run and None not in run]
        if whole:
            length = min(map(len, whole))
            series[row.title] = [fmean(run[i] for run in whole) for i in range(length)]
    return curve_plot(series, found.matrix.curve)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: 0.9rem; }
th, td { border-bottom: 1px solid #d5dae0; padding: 6px 10px 6px 0; vertical-align: top; }
th { text-align: left; color: #57606a; } .r { text-align: right; white-space: nowrap; }
svg { width: 100%; height: auto; } code { font-size: 0.85em; }
@media (prefers-color-scheme: dark) { body { color: #d7dde4; background: #14181d; }
  th, td { border-color: #333b44; } th { color: #9aa5b1; } }
"""


def as_html(found: Analysis, plots: dict[str, str]) -> str:
    """The report as one page that needs nothing else."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{_escaped(found.matrix.title)}</title>",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{_escaped(found.matrix.title)}</h1>",
    ]
    for title, blocks in _sections(found):
        parts += [f"<h2>{_escaped(title)}</h2>"] if title else []
        for block in blocks:
            if isinstance(block, Picture):
                parts.append(f"<figure>{plots[block.file]}</figure>")
            elif isinstance(block, Table):
                parts.append(_html_table(block))
            else:
                parts.append(f"<p>{_marked(block)}</p>")
    return "\n".join([*parts, "</body></html>", ""])


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        texts = [
            f"<{tag}{'' if i < table.left else ' class=r'}>{_marked(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(texts)}</tr>"

    body = "\n".join(row(cells, "td") for cells in table.body)
    return f"<table><thead>{row(table.head, 'th')}</thead><tbody>\n{body}\n</tbody></table>"


def _escaped(text: str) -> str:
    return html_module.escape(text)


def _marked(text: str) -> str:
    """Escaped, with the two Markdown marks that the texts use."""
    text = _escaped(text)
    for mark, tag in (("**", "strong"), ("`", "code")):
        pieces = text.split(mark)
        if len(pieces) % 2:
            text = "".join(
                f"<{tag}>{piece}</{tag}>" if i % 2 else piece for i, piece in enumerate(pieces)
            )
    return text
