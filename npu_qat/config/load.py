"""From preset, file and ``--set`` to one checked :class:`RunConfig`.

Layers, each over the one before it: the schema's defaults, a preset, a YAML file, overrides. A
section of a later layer is merged key by key; a value, a list or a free mapping (such as
``layer_multipliers``) replaces the earlier one whole. Every value remembers where it came from, so
that an error can say ``run.yaml:12`` or ``--set train.lr=fast``.

Types are checked strictly: ``"8"`` is no number and ``1`` is no boolean, since a value of the
wrong type is more often a mistake than a shorthand. All problems are reported at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from npu_qat.config import design_documents
from npu_qat.config.errors import ConfigError
from npu_qat.config.explain import explain
from npu_qat.config.fields import Key, is_optional_section, known_keys
from npu_qat.config.overrides import Override, parse_overrides
from npu_qat.config.schema import RunConfig
from npu_qat.config.yaml_text import Document, Path, parse_yaml

PRESET_FOLDER = FilePath(__file__).parent / "presets"


@dataclass(frozen=True)
class Loaded:
    """A configuration, a short name for its run, and what the translation of old keys had to say.

    ``name`` is the file's stem, else the preset's name, else ``default``.
    """

    config: RunConfig
    name: str
    notes: tuple[str, ...] = ()


def load_config(
    source: str | FilePath | None = None,
    *,
    preset: str | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """The configuration of a run: defaults < ``preset`` < file ``source`` < ``overrides``.

    Args:
        source: a YAML file.
        preset: a name out of :func:`preset_names`.
        overrides: texts such as ``"train.lr=1e-5"``.

    Raises:
        ConfigError: with every problem found in any of them.
    """
    return load_run(source, preset=preset, overrides=parse_overrides(overrides)).config


def load_run(
    source: str | FilePath | None = None,
    *,
    preset: str | None = None,
    overrides: Sequence[Override] = (),
) -> Loaded:
    """Like :func:`load_config`, with the run's name and the notes of the translation."""
    tree = _Tree()
    name = "default"
    if preset is not None:
        name = preset_path(preset).stem
        for document in _preset_layers(name):
            tree.add(document, ())
        tree.notes += _namesakes(name)
    if source is not None:
        file = FilePath(source)
        tree.add(_read(file, str(source)), overrides)
        name = file.stem
    elif any(_is_design_key(o.path) for o in overrides):
        tree.add(Document("--set", {}), overrides)
    for override in overrides:
        if not _is_design_key(override.path):
            tree.set(override)
    return Loaded(tree.validated(), name, tuple(tree.notes))


def preset_names() -> tuple[str, ...]:
    """Names of the shipped presets, ``demo`` first."""
    names = sorted(file.stem for file in PRESET_FOLDER.glob("*.yaml"))
    return tuple(sorted(names, key=lambda name: name != "demo"))


def preset_path(name: str) -> FilePath:
    """The file of preset ``name``, which may be the bare id of a run, such as ``E6a``.

    Raises :class:`ConfigError` if there is none, or if several runs have this id.
    """
    names = preset_names()
    if name in names:
        return PRESET_FOLDER / f"{name}.yaml"
    wanted = name.lower()
    runs = [n for n in names if f"log-{wanted}" == n or f"plan-{wanted}" == n]
    if len(wanted.split("-")) == 1:
        runs = [n for n in names if _run_id(n) == wanted]
    if not runs:  # the log's own "E13a-nvfp4"
        runs = [n for n in names if wanted.removeprefix("log-") == _logged_id(n)]
    if len(runs) == 1:
        return PRESET_FOLDER / f"{runs[0]}.yaml"
    if runs:
        listed = "".join(f"\n  {run}: {preset_summary(run)}" for run in runs)
        raise ConfigError(
            [f"the id {name!r} names {len(runs)} different runs; choose one:{listed}"]
        )
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError([f"there is no preset {name!r}; {hint}Presets: {', '.join(names)}"])


def preset_summary(name: str) -> str:
    """The first sentence of a preset's header."""
    lines = preset_path(name).read_text(encoding="utf-8").splitlines()
    return lines[0].lstrip("# ").strip()


def _run_id(preset: str) -> str:
    """The documents' id of a run: ``e13a`` of ``plan-e13a`` and of ``log-e13a-mxfp4``."""
    parts = preset.split("-")
    return parts[1] if parts[0] in ("plan", "log") else preset


def _logged_id(preset: str) -> str:
    """The id in a preset's header: ``e13a-nvfp4`` of ``log-e13a``."""
    return preset_summary(preset).partition(":")[0].split()[-1].lower()


def _preset_layers(name: str) -> list[Document]:
    """The preset and what it ``extends``, the furthest first.

    Only presets have this key: a run's file goes over a preset by ``--preset``.
    """
    layers: list[Document] = []
    following: str | None = name
    while following is not None:
        document = _read(PRESET_FOLDER / f"{following}.yaml", f"preset {following}")
        data = dict(document.data)
        following = data.pop("extends", None)
        layers.insert(0, Document(document.name, data, document.lines))
    return layers


def _namesakes(preset: str) -> list[str]:
    """A note if ``preset`` is a bare id that other runs have, too."""
    others = [n for n in preset_names() if n != preset and _run_id(n) == preset]
    if not others:
        return []
    return [f"preset {preset} is {preset_summary(preset)} Also with this id: {', '.join(others)}"]


class _Tree:
    """The layers merged so far, where each value came from, and what is wrong with them."""

    def __init__(self) -> None:
        self.data: dict[Any, Any] = {}
        self.origins: dict[Path, str] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []

    def add(self, document: Document, overrides: Sequence[Override]) -> None:
        """Merge one file, its design-document blocks (changed by ``overrides``) included."""
        data = {} if document.data is None else document.data
        if not isinstance(data, Mapping):
            self.problems.append(
                f"{document.name}: expected sections such as 'train:', got {_kind(data)}"
            )
            return
        rest, blocks = design_documents.split_blocks(data)
        origins = {path: document.place(path) for path in document.lines}
        _apply_to_blocks(blocks, overrides, origins)
        translation = design_documents.translate(blocks)
        for path, text in translation.problems:
            place = _nearest(origins, path, document.name)
            self.problems.append(f"{place}: {'.'.join(path)}: {text}")
        self.notes += translation.notes
        for path, (value, said_by) in translation.implied.items():
            self._put(path, value, _nearest(origins, said_by, document.name))
        self._merge(rest, (), origins, document.name)
        for path, (value, said_by) in translation.stated.items():
            self._state(path, value, said_by, rest, origins, document.name)

    def set(self, override: Override) -> None:
        """Apply one ``--set``."""
        key = known_keys().get(override.path)
        if key is not None and key.section is not None and not _fits_section(key, override.value):
            inner = ", ".join(f"{key.dotted}.{name}" for name in key.section.model_fields)
            self.problems.append(f"{override.origin}: {key.dotted} is a section; set {inner}")
        elif key is not None and key.section is not None and override.value is not None:
            origins = {override.path: override.origin}
            self._merge(override.value, override.path, origins, override.origin)
        else:
            self._put(override.path, override.value, override.origin)

    def validated(self) -> RunConfig:
        """The configuration, or every problem in one :class:`ConfigError`."""
        config = None
        try:
            config = RunConfig.model_validate_json(json.dumps(self.data), strict=True)
        except ValidationError as error:
            self.problems += explain(error, self.data, self._origin)
        if self.problems or config is None:
            raise ConfigError(self.problems)
        return config

    def _origin(self, path: Path) -> str:
        """Where ``path`` came from; for a section, its part that came last."""
        below = [origin for p, origin in self.origins.items() if p[: len(path)] == path]
        return _nearest(self.origins, path, below[-1] if path and below else "")

    def _merge(
        self, layer: Mapping[Any, Any], path: Path, origins: dict[Path, str], name: str
    ) -> None:
        for raw, value in layer.items():
            here = (*path, str(raw))
            key = known_keys().get(here)
            is_section = key is not None and key.section is not None
            if is_section and value is None and key is not None and not is_optional_section(key):
                continue  # a section whose keys are all commented out
            if is_section and isinstance(value, Mapping):
                self.origins[here] = _nearest(origins, here, name)
                self._merge(value, here, origins, name)
            else:
                self._put(here, value, _nearest(origins, here, name))
                for below, origin in origins.items():
                    if below[: len(here)] == here:
                        self.origins[below] = origin

    def _put(self, path: Path, value: Any, origin: str) -> None:
        target = self.data
        for length, part in enumerate(path[:-1], start=1):
            below = target.get(part)
            if below is None:
                below = target[part] = {}
            if not isinstance(below, dict):
                dotted = ".".join(path[:length])
                self.problems.append(
                    f"{origin}: {dotted} is {_kind(below)}, so it has no key {path[length]!r}"
                )
                return
            target = below
        for known in [p for p in self.origins if p[: len(path)] == path]:
            del self.origins[known]
        target[path[-1]] = _with_text_keys(value)
        self.origins[path] = origin

    def _state(
        self,
        path: Path,
        value: Any,
        said_by: Path,
        rest: Mapping[Any, Any],
        origins: dict[Path, str],
        name: str,
    ) -> None:
        """File what a design-document block states, unless the file also says otherwise."""
        said = rest
        for part in path:
            said = said.get(part, {}) if isinstance(said, Mapping) else {}
        if said not in ({}, value):
            self.problems.append(
                f"{_nearest(origins, path, name)}: {'.'.join(path)} is {_shown(said)} here, but "
                f"{'.'.join(said_by)} means {_shown(value)}; keep one of the two"
            )
            return
        self._put(path, value, _nearest(origins, said_by, name))


def _read(file: FilePath, name: str) -> Document:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{name}: cannot be read: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{name}: is not text in UTF-8"]) from None
    return parse_yaml(text, name)


def _is_design_key(path: Path) -> bool:
    short = path[1:] if path[0] == "trainer" else path
    return bool(short) and short[0] in design_documents.BLOCKS


def _apply_to_blocks(
    blocks: dict[Path, Any], overrides: Sequence[Override], origins: dict[Path, str]
) -> None:
    """Apply overrides such as ``trainer.noise_injection.enabled=true`` to the blocks they name."""
    for override in overrides:
        if not _is_design_key(override.path):
            continue
        start = 1 if override.path[0] == "trainer" else 0
        block_name, inside = override.path[start], override.path[start + 1 :]
        home = next(
            (p for p in blocks if p[-1].removeprefix("trainer.") == block_name),
            override.path[: start + 1],
        )
        if not inside:
            blocks[home] = override.value
        else:
            blocks[home] = _with_value(blocks.get(home), inside, override.value)
        origins[(*home, *inside)] = override.origin


def _with_value(block: Any, path: Path, value: Any) -> Any:
    """A copy of ``block`` with ``value`` at ``path``."""
    copy = {str(k): v for k, v in block.items()} if isinstance(block, Mapping) else {}
    copy[path[0]] = _with_value(copy.get(path[0]), path[1:], value) if path[1:] else value
    return copy


def _with_text_keys(value: Any) -> Any:
    """``{14: 1.5}`` and ``{"14": 1.5}`` are the same mapping, whichever layer wrote it."""
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return value


def _fits_section(key: Key, value: Any) -> bool:
    return isinstance(value, Mapping) or (value is None and is_optional_section(key))


def _nearest(origins: Mapping[Path, str], path: Path, default: str) -> str:
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return default


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "a section" if isinstance(value, Mapping) else _shown(value)


def _shown(value: Any) -> str:
    return json.dumps(value)
