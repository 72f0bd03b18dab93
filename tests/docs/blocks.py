"""The fenced blocks of the manual, and what they are checked for.

A reader types what a page shows, so a page is a program: its `bash` and `python` blocks are run in
their order, in an empty folder of their own, with `npu-qat` on the path and without a network. What
cannot run there says why in a comment on the line before the fence, where a writer sees it:

    <!-- not run: needs an NPU -->      only parsed: shell syntax, options, presets, keys
    <!-- slow: trains -->               run by `pytest -m slow`, with all other blocks of the page

A line `<!-- blocks: slow -->` makes every block of a page slow. `<!-- blocks: copy -->` does that
and runs them in a copy of the repository, in which `diff` blocks change the file of their title:
what a recipe changes is the copy. A reason that names `runs/mine` gets a finished run there.

A block with a `title="x"` is written to the file `x` in that folder and not run. A line
`print(...)  # -> 3` promises its output. `text` blocks are output.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"<!-- (not run|slow): (.+?) -->\s*\n\s*\Z")
PROMISE = re.compile(r"^print\(.*\)  # -> (.*)$", re.MULTILINE)
OPERATORS = "|&;<>()"


@dataclass(frozen=True)
class Block:
    """One fenced block. `not_run` and `slow` hold the reason, or None."""

    page: str
    line: int
    language: str
    title: str | None
    code: str
    not_run: str | None
    slow: str | None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def needs_a_run(self) -> bool:
        return self.slow is not None and "runs/mine" in self.slow

    def commands(self) -> list[list[str]]:
        """The words of each simple command of a bash block, without its redirections."""
        return list(_commands(self.code))


def pages() -> list[str]:
    """Pages whose blocks are tested; docs/results is written by programs."""
    found = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "docs").rglob("*.md"))]
    manual = [page for page in found if not page.startswith("docs/results/")]
    return ["README.md", "CONTRIBUTING.md", *manual]


def needs_a_copy(page: str) -> bool:
    """Whether the page's blocks change the repository."""
    return "<!-- blocks: copy -->\n" in (ROOT / page).read_text(encoding="utf-8")


def changed(text: str, diff: str) -> str:
    """``text`` changed by a diff without headers.

    Raises ``ValueError`` if the lines that the diff shows as they were are not there, or not once.
    """
    lines = diff.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    if text.count(before) != 1:
        raise ValueError(f"found {text.count(before)} times, not once:\n{before}")
    return text.replace(before, after)


def blocks(page: str) -> list[Block]:
    """The blocks of a page (a path in the repository), in order."""
    return parse((ROOT / page).read_text(encoding="utf-8"), page)


def parse(text: str, page: str) -> list[Block]:
    slow_page = re.search(r"^<!-- blocks: (slow|copy) -->$", text, re.MULTILINE)
    found = []
    for fence in FENCE.finditer(text):
        mark = MARK.search(text, 0, fence.start())
        kind, reason = mark.groups() if mark else (None, None)
        title = re.search(r'title="([^"]+)"', fence["info"])
        indent = len(fence["indent"])
        code = "".join(line[indent:] or "\n" for line in fence["code"].splitlines(keepends=True))
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, fence.start()) + 1,
                language=fence["language"],
                title=title[1] if title else None,
                code=code,
                not_run=reason if kind == "not run" else None,
                slow=reason if kind == "slow" else ("the page" if slow_page else None),
            )
        )
    return found


def program_calls(block: Block) -> Iterator[list[str]]:
    """The arguments of each call of npu-qat in a bash block, behind launchers too."""
    for words in block.commands():
        for at, word in enumerate(words):
            behind_module = word == "npu_qat" and words[at - 1] in ("-m", "--module")
            if word == "npu-qat" or word.endswith("/npu-qat") or behind_module:
                yield words[at + 1 :]
                break


def _commands(code: str) -> Iterator[list[str]]:
    pending = ""
    for line in code.replace("\\\n", " ").splitlines():
        pending += line
        try:
            words = _words(pending)
        except ValueError:  # a quotation that goes on in the next line
            pending += "\n"
            continue
        pending = ""
        yield from _simple_commands(words)


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=OPERATORS)
    lexer.whitespace_split = True
    return list(lexer)


def _simple_commands(words: list[str]) -> Iterator[list[str]]:
    """The commands between the operators of a line, without redirections."""
    command: list[str] = []
    redirected = False
    for word in [*words, ";"]:
        if set(word) <= set(OPERATORS):
            redirected = word[0] in "<>" or word == "&>"
            if not redirected and command:
                yield command
                command = []
        elif redirected:
            redirected = False
        else:
            command.append(word)
