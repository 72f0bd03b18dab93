"""Validation errors in the reader's words: where, what was found, what is expected, what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from npu_qat.config.fields import Key, key_above, suggestion
from npu_qat.config.yaml_text import Path, corrected_multipliers

_LONGEST_VALUE = 60


def explain(
    error: ValidationError, data: Mapping[Any, Any], origin: Callable[[Path], str]
) -> list[str]:
    """One line for each thing that is wrong.

    Args:
        error: from validating ``data``.
        data: what was validated.
        origin: where the value at a path came from, e.g. ``run.yaml:3``; "" if from nowhere.
    """
    problems: dict[Path, str] = {}
    for item in error.errors(include_url=False):
        path = _path_in(data, item["loc"])
        if path in problems:
            continue  # the other branch of a union
        text = _describe(item, path)
        place = origin(path)
        problems[path] = f"{place}: {text}" if place else text
    return list(problems.values())


def _describe(item: Mapping[str, Any], path: Path) -> str:
    if item["type"] == "value_error":
        # Raised by the schema's own checks; those of a whole run name their keys themselves.
        reason = str(item["ctx"]["error"])
        return f"{_dotted(path)}: {reason}" if path else reason
    if item["type"] == "extra_forbidden":
        return f"{_dotted(path)}: unknown key; {suggestion(path)}"
    key = key_above(path)
    if item["type"] == "missing":
        needed = f" ({key.kind})" if key else ""
        return f"{_dotted(path)}: is missing{needed}; it has no default"
    inside = key is not None and len(path) > len(key.path)
    expected = (key.item_kind if inside else key.kind) if key else None
    found = item["input"]
    if item["loc"][-1] == "[key]":
        return f"{_dotted(path)}: a key of {key.dotted if key else 'this'} is a whole number"
    hint = "".join(_hints(key, expected or "", found, path))
    return f"{_dotted(path)}: expected {expected or item['msg']}, got {_shown(found)}{hint}"


def _hints(key: Key | None, expected: str, found: Any, path: Path) -> Iterator[str]:
    if key is None or not isinstance(found, str):
        return
    options = re.split(", | or ", expected.removeprefix("one of "))
    close = difflib.get_close_matches(found, options, n=1, cutoff=0.5)
    if expected.startswith("one of") and close:
        yield f"; did you mean {close[0]}?"
    elif "list of" in expected and found:
        yield f"; write [{found}]"
    elif "true or false" in expected and found.lower() in ("yes", "on", "no", "off"):
        yield f"; write {'true' if found.lower() in ('yes', 'on') else 'false'}"
    elif key.path[-1] == "layer_multipliers":
        run = ", ".join(f"{layer}: {found}" for layer in path[len(key.path) :]) or found
        corrected = corrected_multipliers(f"{key.path[-1]}: {run}")
        yield f". Write\n{corrected}" if corrected else ""
    elif "number" in expected and _is_number(found):
        yield "; write it without quotes"


def _path_in(data: Mapping[Any, Any], location: tuple[int | str, ...]) -> Path:
    """The part of pydantic's location that is a path in ``data``.

    Pydantic appends names of its own, such as the branch of a union or ``[key]``.
    """
    path: list[str] = []
    here: Any = data
    for part in location:
        if isinstance(here, Mapping):
            known = {str(k): v for k, v in here.items()}
            if str(part) not in known:
                if part != location[-1]:
                    break
                path.append(str(part))  # a missing key
                break
            here = known[str(part)]
        elif isinstance(here, list) and isinstance(part, int):
            here = here[part]
        else:
            continue
        path.append(str(part))
    return tuple(path)


def _dotted(path: Path) -> str:
    return ".".join(path)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    if len(text) > _LONGEST_VALUE:
        text = text[: _LONGEST_VALUE - 3] + "..."
    if isinstance(value, str):
        return f"the text {text}"
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
