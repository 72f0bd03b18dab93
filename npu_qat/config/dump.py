"""A configuration as YAML that loads back to the same configuration.

Written with PyYAML, but strings are quoted if *either* YAML 1.1 or the YAML 1.2 rules of
:mod:`npu_qat.config.yaml_text` would read them as something else (``'no'``, ``'12e4567'``), so that
``config.yaml`` of a run means the same to this program and to every other.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from npu_qat.config.fields import Key, walk
from npu_qat.config.schema import RunConfig, Section
from npu_qat.config.yaml_text import CORE_RESOLVERS

_WIDTH = 96


def to_plain(config: Section) -> dict[str, Any]:
    """The configuration as dicts, lists and scalars, every key included, in schema order."""
    plain: dict[str, Any] = _lists(config.model_dump(mode="python"))
    return plain


def dump_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML; ``load_config`` reads it back unchanged."""
    return "\n".join(_lines(to_plain(config), comments=False)) + "\n"


def describe_yaml(config: RunConfig) -> str:
    """Like :func:`dump_yaml`, with what each key means above it. Also loads back."""
    return "\n".join(_lines(to_plain(config), comments=True)) + "\n"


def value_text(value: Any) -> str:
    """One value on one line, as YAML."""
    return " ".join(_key_and_value("value", _lists(value))).removeprefix("value:").strip()


def _lines(values: Mapping[str, Any], comments: bool) -> Iterator[str]:
    """Sections as blocks, and inside them one key a line."""
    for key in walk():
        value, present = _lookup(values, key.path)
        if not present:
            continue  # inside an optional section that is not there
        name, indent = key.path[-1], "  " * (len(key.path) - 1)
        if comments:
            if not indent and key.path[0] != next(iter(values)):
                yield ""
            yield from (f"{indent}# {line}" for line in _comment(key, len(indent)))
        if key.section is not None and isinstance(value, dict):
            yield f"{indent}{name}:"
        else:
            yield from (indent + line for line in _key_and_value(name, value))


def _comment(key: Key, indent: int) -> Iterator[str]:
    text = key.description if key.section else f"{key.description} ({key.kind})"
    yield from textwrap.wrap(text, _WIDTH - indent - 2)


def _lookup(values: Mapping[str, Any], path: tuple[str, ...]) -> tuple[Any, bool]:
    here: Any = values
    for part in path:
        if not isinstance(here, Mapping) or part not in here:
            return None, False
        here = here[part]
    return here, True


def _lists(value: Any) -> Any:
    """Tuples as lists, because YAML has no tuples."""
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_lists(item) for item in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or the YAML 1.2 core schema would misread."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own name
        first: list(resolvers)
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Equal values are written out, not as anchors."""
        return True


for _tag, _pattern, _first in CORE_RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})$"), _first)


def _key_and_value(name: str, value: Any) -> list[str]:
    """``name: value``; lists and mappings in brackets, over several lines if they are long."""
    text: str = yaml.dump(
        {name: value},
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=False if not isinstance(value, (dict, list)) else None,
        width=_WIDTH,
        allow_unicode=True,
    )
    return text.splitlines()
