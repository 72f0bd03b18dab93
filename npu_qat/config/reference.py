"""The reference part of ``docs/configuration.md``, written from the schema.

A table kept by hand would soon describe an earlier program. ``python -m npu_qat.config.reference
docs/configuration.md`` rewrites what stands between the page's two marks, and a test fails while
the page and the schema differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from npu_qat.config.dump import value_text
from npu_qat.config.fields import Key, known_keys

BEGIN = "<!-- reference: begin (python -m npu_qat.config.reference docs/configuration.md) -->"
END = "<!-- reference: end -->"


def render_reference() -> str:
    """Markdown: one table a section, in the order of the schema."""
    lines: list[str] = []
    for section in known_keys().values():
        if section.section is not None:
            lines += [*_section(section), ""]
    return "\n".join(lines).rstrip() + "\n"


def with_reference(page: str) -> str:
    """``page`` with a fresh reference between the marks. Raises ``ValueError`` without them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs exactly one line '{BEGIN}' and one '{END}'")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render_reference()}\n{END}{after}"


def _section(section: Key) -> Iterator[str]:
    yield f"### `{section.dotted}`"
    yield ""
    yield section.description.replace("``", "`")
    yield ""
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for key in known_keys().values():
        if key.path[:-1] == section.path:
            yield _row(key)


def _row(key: Key) -> str:
    default = "needed"
    if key.section is not None and key.default is not None:
        default = "see below"
    elif not key.required:
        default = f"`{value_text(key.default)}`"
    meaning = key.description.replace("``", "`").replace("*", r"\*")
    cells = (f"`{key.path[-1]}`", key.kind, default, meaning)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def main() -> None:
    """Rewrite the reference of the page named on the command line."""
    page = Path(sys.argv[1])
    page.write_text(with_reference(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
