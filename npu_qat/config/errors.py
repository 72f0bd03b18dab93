"""The one error that a wrong configuration raises, with every problem in it.

A person who has mistyped three keys wants to hear of three keys, not of one a time. So loading
collects what it finds, and each problem is one line that says where it stands, what was found,
what is expected and what to write instead.
"""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot be used. ``problems`` holds one readable line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        return f"the configuration has {len(self.problems)} problems:\n{lines}"
