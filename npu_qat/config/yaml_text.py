"""YAML as people write it: ``1e-5`` is a number, ``no`` is a word, a key given twice is an error.

PyYAML implements YAML 1.1, in which ``1e-5`` is a string (a float needs a dot there), ``no`` and
``off`` are booleans, ``010`` is eight and the second of two equal keys wins without a word. In a
training configuration each of these silently changes an experiment. This module keeps PyYAML's
parser and replaces what it does with scalars by the YAML 1.2 core schema (YAML 1.2.2,
section 10.3), in which only ``true`` and ``false`` are booleans.

Parsing also remembers the line of every key, so that later errors can name it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from npu_qat.config.errors import ConfigError

# Scalars of the YAML 1.2 core schema: tag, pattern, possible first characters.
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_TAG = "tag:yaml.org,2002:"
CORE_RESOLVERS = (
    (f"{_TAG}bool", _BOOL, list("tTfF")),
    (f"{_TAG}null", _NULL, ["~", "n", "N", ""]),
    (f"{_TAG}int", _INT, list("-+0123456789")),
    (f"{_TAG}float", _FLOAT, list("-+.0123456789")),
    (f"{_TAG}merge", re.compile("<<"), ["<"]),
)

# The experiment plan writes layer multipliers as runs such as ``6: 1.0, 7: 1.0,``.
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PAIR = re.compile(rf"(\d+)\s*:\s*({_NUMBER})")
_RUN = re.compile(
    rf"^(?P<indent>\s*)(?:(?P<key>[A-Za-z_]\w*)\s*:\s*)?"
    rf"(?P<pairs>\d+\s*:\s*{_NUMBER}(?:\s*,\s*\d+\s*:\s*{_NUMBER})*)(?P<end>\s*,)?\s*(?:#.*)?$"
)
_KEY_ALONE = re.compile(r"^(?P<indent>\s*)(?P<key>[A-Za-z_]\w*)\s*:\s*(?:#.*)?$")
_PAIRS_A_LINE = 6

Path = tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """Parsed YAML: plain Python data, and the line (from 1) on which each key stands."""

    name: str
    data: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """``file:line`` of ``path`` or of the nearest key above it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name


def parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML document.

    Args:
        text: the document; empty text gives ``None`` as data.
        name: how errors call it, normally the file's path.

    Raises:
        ConfigError: invalid YAML, a key given twice, a key that is no text or whole number, or a
            tag that asks for a Python object.
    """
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_syntax_problem(error, text, name)]) from None
    except yaml.YAMLError as error:  # characters that no YAML may contain
        raise ConfigError([f"{name}: not valid YAML: {error}"]) from None
    builder = _Builder(name)
    data = None if node is None else builder.build(node, (), ())
    if builder.problems:
        raise ConfigError(builder.problems)
    return Document(name, data, builder.lines)


def parse_scalar(text: str, name: str) -> Any:
    """The value of ``text`` as YAML reads it: ``1e-5`` is a float, ``[1, 2]`` a list, "" None."""
    try:
        return parse_yaml(text, name).data
    except ConfigError as error:  # one line has no line numbers
        problems = [p.replace(f"{name}:1: ", f"{name}: ", 1) for p in error.problems]
    raise ConfigError(problems)


def corrected_multipliers(text: str) -> str | None:
    """The valid form of a run of layer multipliers such as ``6: 1.0, 7: 1.0``, if it is one."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        match = _RUN.match(line)
        if match is None or not _is_comma_run(match):
            continue
        key, indent = match["key"], match["indent"]
        if key is None and number > 0:
            above = _KEY_ALONE.match(lines[number - 1])
            if above is not None:
                key, indent = above["key"], above["indent"]
        pairs = _PAIR.findall(match["pairs"])
        for following in lines[number + 1 :]:
            more = _RUN.match(following)
            if more is None or more["key"] is not None:
                break
            pairs += _PAIR.findall(more["pairs"])
        return _flow_mapping(key or "layer_multipliers", pairs, indent)
    return None


def _is_comma_run(match: re.Match[str]) -> bool:
    """One pair alone on its line is good YAML; a comma, or a pair right behind a key, is not."""
    return "," in match["pairs"] or match["end"] is not None or match["key"] is not None


def _flow_mapping(key: str, pairs: list[tuple[str, str]], indent: str) -> str:
    rows = [
        ", ".join(f"{layer}: {value}" for layer, value in pairs[start : start + _PAIRS_A_LINE])
        for start in range(0, len(pairs), _PAIRS_A_LINE)
    ]
    if len(rows) == 1:
        return f"{indent}{key}: {{{rows[0]}}}"
    inside = ",\n".join(f"{indent}  {row}" for row in rows)
    return f"{indent}{key}: {{\n{inside}\n{indent}}}"


def _syntax_problem(error: yaml.MarkedYAMLError, text: str, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark else 0
    place = f"{name}:{line + 1}"
    corrected = corrected_multipliers(text)
    if corrected is not None:
        return (
            f"{place}: not valid YAML: several 'layer: multiplier' pairs with commas need braces "
            f"around them. Write\n{corrected}"
        )
    reason = "; ".join(part for part in (error.context, error.problem) if part)
    shown = "".join(text.splitlines()[line : line + 1]).strip()
    hint = f" in '{shown}'" if shown else ""
    return f"{place}: not valid YAML{hint}: {reason}"


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's parser with the scalars of the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  PyYAML's own name


for _tag, _pattern, _first in CORE_RESOLVERS:
    _CoreLoader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})$"), _first)


class _Builder:
    """Turns YAML nodes into Python data and notes the line of every key."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Path, int] = {}
        self.problems: list[str] = []

    def build(self, node: yaml.Node, path: Path, above: tuple[int, ...]) -> Any:
        if id(node) in above:
            self._problem(node, f"{'.'.join(path)} contains itself")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, (*above, id(node)))
        if isinstance(node, yaml.SequenceNode):
            within = (*above, id(node))
            return [self.build(item, (*path, str(i)), within) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path, above: tuple[int, ...]) -> Any:
        result: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                values = self.build(value_node, path, above)
                for layer in reversed(values if isinstance(values, list) else [values]):
                    merged.update(layer if isinstance(layer, dict) else {})
                continue
            key = self._key(key_node)
            if key is None:
                continue
            line = key_node.start_mark.line + 1
            here = (*path, str(key))
            if str(key) in seen:
                first = seen[str(key)]
                self._problem(
                    key_node, f"{'.'.join(here)} is given twice (first on line {first}); keep one"
                )
                continue
            seen[str(key)] = self.lines[here] = line
            result[key] = self.build(value_node, here, above)
        return {**merged, **result}

    def _key(self, node: yaml.Node) -> str | int | None:
        key = self._scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
            return key
        self._problem(node, "a key must be a name or a whole number; put other keys in quotes")
        return None

    def _scalar(self, node: yaml.Node) -> Any:
        text, tag = node.value, node.tag.removeprefix(_TAG)
        if tag == "str":
            return text
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() == "true"
        try:
            if tag == "int":
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            if tag == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:  # an explicit tag on something else: !!int abc
            self._problem(node, f"{text!r} is no {tag}")
            return None
        self._problem(node, f"the tag {node.tag} is not supported; write plain values")
        return None

    def _problem(self, node: yaml.Node, text: str) -> None:
        self.problems.append(f"{self.name}:{node.start_mark.line + 1}: {text}")
