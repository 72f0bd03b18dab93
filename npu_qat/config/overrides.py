"""``--set a.b.c=value``: one key from the command line, in the words of the YAML file.

The value is read as YAML, so ``--set train.lr=1e-5`` is a number, ``--set task.levels=[1,2]`` a
list and ``--set evaluation.problems=null`` takes a default back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from npu_qat.config.errors import ConfigError
from npu_qat.config.yaml_text import Path, parse_scalar


@dataclass(frozen=True)
class Override:
    """One parsed ``--set``. ``origin`` is how error messages call it."""

    path: Path
    value: Any
    origin: str


def parse_override(text: str, origin: str | None = None) -> Override:
    """Parse ``a.b.c=value``.

    Args:
        text: the argument of ``--set``.
        origin: how errors call it; default ``--set <text>``.

    Raises:
        ConfigError: no ``=``, an empty part in the key, or a value that is not valid YAML.
    """
    origin = origin or f"--set {text}"
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError([f"{origin}: expected key=value, e.g. --set train.lr=1e-5"])
    path = tuple(part.strip() for part in key.strip().split("."))
    if not all(path):
        raise ConfigError(
            [f"{origin}: the key {key.strip()!r} has an empty part; write e.g. train.lr"]
        )
    return Override(path, parse_scalar(value.strip(), origin), origin)


def parse_overrides(texts: Iterable[str]) -> list[Override]:
    """Parse several overrides; all their problems are raised together."""
    parsed: list[Override] = []
    problems: list[str] = []
    for text in texts:
        try:
            parsed.append(parse_override(text))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return parsed
