"""From docstrings that are written for readers of source to the Markdown of the API reference.

The source uses a little reStructuredText, which is quiet to read and which Markdown shows as it
stands: ``::`` before an example, roles (``:func:``), and simple tables, whose columns stand under
rows of ``=``. This extension of Griffe, the reader behind mkdocstrings, rewrites them.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([^`]+)`")
RULE = re.compile(r"^ *=+(?: +=+)+ *$")


class Markdown(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """``text`` without roles and double colons, its simple tables as Markdown's."""
    text = ROLE.sub(r"`\1`", text)
    text = re.sub(r"::(?=\n\s*\n)", ":", text)
    lines, out = text.split("\n"), []
    while lines:
        rules = [i for i, line in enumerate(lines) if RULE.match(line)]
        if not rules or rules[0] > 0:
            out.append(lines.pop(0))
        else:  # three rules: above the head, under it, under the last row
            last = rules[2]
            out += table(lines[: last + 1])
            del lines[: last + 1]
    return "\n".join(out)


def table(lines: list[str]) -> list[str]:
    """A simple table, from its first rule to its last, as lines of Markdown.

    A row whose first column is blank goes on with the row above.
    """
    starts = [found.start() for found in re.finditer(r"=+", lines[0])]
    bounds = list(zip(starts, [*starts[1:], None], strict=True))
    rows: list[list[str]] = []
    for line in lines:
        if RULE.match(line):
            continue
        cells = [line[start:end].strip() for start, end in bounds]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
    written = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return ["", written[0], "|" + "---|" * len(bounds), *written[1:], ""]
