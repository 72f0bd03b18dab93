"""Every page of a folder of results, made from the result files: reports, and the page of answers.

``docs/results/<matrix>/cells`` holds the result files of a shipped matrix. ``write_pages`` writes a
report beside each, and ``answers.md``, which puts the design documents' five questions to all of
them. A test makes them anew and compares, so that a page can say only what a file holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npu_qat.experiments.matrix import load_matrix, matrix_path, shipped_matrices
from npu_qat.experiments.matrix_analysis import (
    GAIN_VERDICTS,
    ONE_SEED,
    ONE_SEED_ALONE,
    TOO_FEW,
    TOPICS,
    VERDICTS,
    Analysis,
    Answer,
    analyse,
)
from npu_qat.experiments.matrix_report import Table, answer_table, block_lines, report_files

CELLS = "cells"
ANSWERS = "answers.md"

# What the documents expected or concluded, and where.
_ASKED = {
    "viable": "The documents: W4A4 without STE stays at its start (7 to 10 %), with STE it "
    "reaches 70.9 % (NVFP4, E13g) and 71.4 % (MXFP4, E13h); both very likely evaluated in BF16, "
    "one seed.",
    "aqn": "The documents: noise gained 1.6 points in W4A16 (E6b over E6a, step 20) and lost 4 to "
    "5 in W4A4 (E13j and E13k against E13h, step 29, on other data); one seed each.",
    "guided": "The documents: E12, 72.5 %, was read as a gain of 5 points by guidance; its noise "
    "was zero. Later runs with multipliers did not forward them.",
    "gap": "The documents: BF16 LoRA 71.3 % at step 20 (E7a), MXFP4 W4A4 71.4 % at step 29 (E13h).",
    "difference": "The experiment plan's key question; none of the documents' runs could answer "
    "it. A difference of differences: what guided noise gains in W4A4, minus what it gains in "
    "W4A16.",
    "levers": "Each in MXFP4 W4A4 LoRA where nothing else is said. The aim was MXFP4 W4A4 within 1 "
    "point of accuracy, or 3 % of perplexity, of BF16 LoRA, and at NVFP4's level or better.",
}


def pages(folder: Path) -> dict[Path, str]:
    """Path -> content of every page below ``folder``."""
    found: dict[Path, str] = {}
    analyses = []
    for name in shipped_matrices():
        results = folder / name / CELLS
        if not results.is_dir():
            continue
        matrix = load_matrix(matrix_path(name))
        analyses.append(analyse(matrix, results))
        for file, text in report_files(matrix, results).items():
            found[folder / name / file] = text
    found[folder / ANSWERS] = answers_page(analyses)
    return found


def write_pages(folder: Path) -> list[Path]:
    """Write every page; returns their paths."""
    made = pages(folder)
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return list(made)


def stale_pages(folder: Path) -> list[Path]:
    """Pages that are missing or differ from what the result files give."""
    return [
        path
        for path, text in pages(folder).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def answers_page(analyses: list[Analysis]) -> str:
    """The five questions, and the levers, answered from all results that ask any of them."""
    analyses = [a for a in analyses if {c.answers for c in a.matrix.contrasts} & set(_ASKED)]
    lines = [
        "# The design documents' questions, answered from runs",
        "",
        "Written by `npu-qat experiment pages docs/results` from result files; do not edit. Each "
        "difference is made seed by seed, its 95 % interval is over seeds, and p-values are "
        'corrected by Holm\'s method within a table. "No effect found" means a corrected p of 0.05 '
        "or more: the interval says how large an effect may have been missed. Two models are "
        "neither many nor large; what holds here need not hold for a model of billions of "
        "parameters.",
        "",
    ]
    for found in analyses:
        # The first paragraph says what was run on what; the report's page has the rest.
        about = next(iter(found.matrix.about.splitlines()), "")
        lines += [f"- **[{found.matrix.title}]({found.matrix.name}/report.md).** {about}"]
    lines += ["", *_in_short(analyses)] if analyses else ["No results yet.", ""]
    for topic in _ASKED:
        lines += [f"## {_heading(topic)}", "", _ASKED[topic], ""]
        for found in analyses:
            chosen = [a for a in found.answers if a.contrast.answers == topic]
            title = f"**{found.matrix.title}** ({found.scale.unit})"
            if not chosen:
                lines += [f"{title}: this matrix does not ask it.", ""]
                continue
            lines += [f"{title}. {_in_words(chosen, found)}", ""]
            lines += [*block_lines(answer_table(chosen, found.scale)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _heading(topic: str) -> str:
    number = list(_ASKED).index(topic) + 1
    return TOPICS[topic] if topic == "levers" else f"{number}. {TOPICS[topic]}"


def _in_short(analyses: list[Analysis]) -> list[str]:
    """The headlines of all matrices, a table for each question; p-values are further down."""
    lines: list[str] = []
    for topic in _ASKED:
        head: list[str] = []
        body = []
        for found in analyses:
            asked = [a for a in found.answers if a.contrast.answers == topic]
            table = answer_table([a for a in asked if a.contrast.headline], found.scale)
            head = ["benchmark", *_without_p(table.head)]
            body += [[found.matrix.name, *_without_p(row)] for row in table.body]
        if body:
            lines += [f"**{_heading(topic)}**", "", *block_lines(Table(head, body, left=2)), ""]
    units = ", ".join(
        f"{a.matrix.name} in {a.scale.unit}{'' if a.scale.better(1.0) else ' (less is better)'}"
        for a in analyses
    )
    return ["## In short", "", f"Differences: {units}.", "", *lines] if lines else []


def _without_p(row: Sequence[str]) -> list[str]:
    return [*row[:-3], row[-1]]


def _in_words(answers: list[Answer], found: Analysis) -> str:
    """How many of the questions came out how."""
    words = [answer.words(found.scale) for answer in answers]
    kinds = (
        *VERDICTS,
        *GAIN_VERDICTS,
        "no effect found",
        TOO_FEW,
        ONE_SEED,
        ONE_SEED_ALONE,
        "not yet measured",
    )
    counts = [f"{kind}: {words.count(kind)}" for kind in kinds if kind in words]
    return f"Of {len(words)} questions: {', '.join(counts)}."
