"""What MkDocs does not do by itself for pages that are also read in the repository.

Pages link to sources and result files with relative links, which work wherever the repository is
shown as files. The site has pages only, and the project names no public address. So a link that
leaves ``docs/``, or leads to a folder, becomes its text and the path; one that leads nowhere is a
warning, which ``mkdocs build --strict`` turns into an error.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.plugins.manual")

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^( *)(```+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page's text with its links out of the site replaced by the paths that they name."""
    docs = Path(config["docs_dir"])
    return outside_links(markdown, docs / page.file.src_uri, docs, log.warning)


def outside_links(markdown: str, source: Path, docs: Path, warn: Any = log.warning) -> str:
    """``markdown`` of the file ``source`` with links to what is no page of ``docs`` as plain paths.

    ``warn`` is called with a sentence for each link that leads to nothing. Fenced blocks are left
    alone.
    """
    root = docs.parent

    def plain(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / found["target"]))
        inside = target.is_relative_to(docs)
        if inside and not target.is_dir():
            return found[0]  # MkDocs checks these
        if not target.exists():
            warn(f"{source.relative_to(root)}: the link {found['target']} leads to nothing")
            return found[0]
        path = target.relative_to(root).as_posix()
        text = found["text"].strip("`")
        return f"`{path}`" if text in (path, found["target"]) else f"{found['text']} (`{path}`)"

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(plain, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, LINK.sub(plain, markdown[end:])])
