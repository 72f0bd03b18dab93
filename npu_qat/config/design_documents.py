"""The design documents' own blocks, read as they stand and translated into this program's keys.

The experiment plan and log describe runs by two blocks of an earlier program, at the top of a
file or under ``trainer:``::

    hw_error_injection:                noise_injection:
      enabled: true                      enabled: true
      error_type: mxfp4                  sigma_start: 0.05
      injection_point: both              sigma_end: 0.0005
      exclude_modules: [lm_head]         layer_sigma_config: {...}

Every key is either translated or refused with the reason and with what to write instead; none is
passed over, because in the earlier program several of these keys were read by nobody and the
experiments that relied on them measured something else. Where a key is understood but means less
here than it did there, the translation leaves a note.

The translation has two strengths. What a block *states* (``injection_point: both``) is binding: a
different value for the same key under ``quant:`` in the same file is an error. What it only
*implies* (``error_type: mxfp4`` means the earlier code's own MXFP4 numbers) can be refined under
``quant:`` or ``noise:``, for instance ``quant: {weight_profile: ascend950}``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from npu_qat.config.yaml_text import corrected_multipliers

Path = tuple[str, ...]

HARDWARE = "hw_error_injection"
NOISE = "noise_injection"
BLOCKS = (HARDWARE, NOISE)

# Module names of the architectures that the documents use, to tell a name from a fragment.
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MODULES = (*_LINEARS, "self_attn", "mlp", "lm_head", "embed_tokens")
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm")
_LORA_PARTS = ("lora_a", "lora_b", "lora_")

_NOT_A_FORMAT = (
    "it is a model of random hardware errors, not a number format, and this program trains for "
    "the numbers that the NPU computes. Use error_type: mxfp4 (or nvfp4), and for exploration "
    "noise the noise_injection block; or set enabled: false"
)
_REFUSED_ERROR_TYPES = {
    "relative_gaussian": _NOT_A_FORMAT,
    "absolute_gaussian": _NOT_A_FORMAT,
    "gaussian": _NOT_A_FORMAT,
    "systematic_bias": _NOT_A_FORMAT,
    "deadzone": "it zeroes small values of a whole decoder layer, which no NPU operator does; "
    "MXFP4 has its dead zone in its numbers already. Use error_type: mxfp4",
    "fp8": "there is no FP8 profile here. Use error_type: mxfp4 or nvfp4",
}
_REFUSED_NOISE_KEYS = {
    "steps_per_epoch": "it is computed from the training data; remove it",
    "total_steps": "it is computed from train.steps or train.epochs; remove it",
    "current_step": "the training loop counts steps; remove it",
    "sigma_trend": "it is computed from sigma_start, sigma_end and num_stages; give those",
    "epoch_ranges": "it is computed from sigma_start, sigma_end and train.epochs; give those",
    "is_validation": "noise is never on in evaluation; remove it",
}


@dataclass
class Translation:
    """What the blocks of one document became.

    ``stated`` and ``implied`` map our key paths to (value, path of the key that said so);
    ``problems`` pairs the path of a key with what is wrong about it.
    """

    stated: dict[Path, tuple[Any, Path]] = field(default_factory=dict)
    implied: dict[Path, tuple[Any, Path]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[tuple[Path, str]] = field(default_factory=list)


def split_blocks(data: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Path, Any]]:
    """Separate the documents' blocks from the rest of a file.

    Returns:
        The rest, and the blocks by the path at which they stand: ``("hw_error_injection",)``,
        ``("trainer", "hw_error_injection")`` or ``("trainer.hw_error_injection",)``.
    """
    rest = dict(data)
    blocks: dict[Path, Any] = {}
    for name in BLOCKS:
        for key in (name, f"trainer.{name}"):
            if key in rest:
                blocks[(key,)] = rest.pop(key)
        trainer = rest.get("trainer")
        if isinstance(trainer, Mapping) and name in trainer:
            blocks[("trainer", name)] = trainer[name]
            rest["trainer"] = {k: v for k, v in trainer.items() if k != name}
    if rest.get("trainer") == {}:
        del rest["trainer"]
    return rest, blocks


def translate(blocks: Mapping[Path, Any]) -> Translation:
    """Translate the blocks that :func:`split_blocks` found."""
    result = Translation()
    seen: dict[str, Path] = {}
    for path, block in blocks.items():
        name = path[-1].removeprefix("trainer.")
        if name in seen:
            result.problems.append((path, f"is given twice, also as {'.'.join(seen[name])}"))
            continue
        seen[name] = path
        if not isinstance(block, Mapping):
            result.problems.append((path, "expected a block of keys such as enabled: true"))
            continue
        reader = _Reader(path, block, result)
        (_hardware if name == HARDWARE else _noise)(reader)
        reader.refuse_unread()
    return result


class _Reader:
    """Takes keys out of a block one by one, checks their types, and files what they become."""

    def __init__(self, path: Path, block: Mapping[Any, Any], result: Translation) -> None:
        self.path = path
        self.block = {str(key): value for key, value in block.items()}
        self.result = result
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        return key in self.block

    def take(self, key: str, kind: str, default: Any = None) -> Any:
        """The value of ``key`` if it has the type ``kind``, else a problem and the default."""
        self._read.add(key)
        if key not in self.block:
            return default
        value = self.block[key]
        if value is None and kind.endswith("?"):
            return default
        if not _KINDS[kind.removesuffix("?")](value):
            self.problem(key, f"expected {_KIND_NAMES[kind.removesuffix('?')]}, got {value!r}")
            return default
        return value

    def inner(self, key: str) -> _Reader | None:
        """A reader of the block under ``key``."""
        value = self.take(key, "block?")
        return None if value is None else _Reader((*self.path, key), value, self.result)

    def state(self, target: str, value: Any, key: str) -> None:
        self.result.stated[tuple(target.split("."))] = (value, (*self.path, key))

    def imply(self, target: str, value: Any, key: str) -> None:
        self.result.implied[tuple(target.split("."))] = (value, (*self.path, key))

    def problem(self, key: str, text: str) -> None:
        path = (*self.path, key) if key else self.path
        self.result.problems.append((path, text))

    def note(self, key: str, text: str) -> None:
        self.result.notes.append(f"{'.'.join((*self.path, key))}: {text}")

    def copy(self, keys: Mapping[str, tuple[str, str]]) -> None:
        """State each ``key -> (kind, our key)`` that the block has."""
        for key, (kind, target) in keys.items():
            value = self.take(key, kind)
            if value is not None:
                self.state(target, value, key)

    def switched_on(self) -> bool:
        """The value of ``enabled``, which the earlier program took as false if it was missing."""
        if not self.has("enabled"):
            self._read.add("enabled")
            self.problem(
                "",
                "needs enabled: true or enabled: false (the earlier program took a "
                "missing enabled as false)",
            )
            return False
        return bool(self.take("enabled", "bool", False))

    def refuse_unread(self) -> None:
        """Every key that was not taken is unknown."""
        for key in self.block:
            if key in self._read:
                continue
            close = difflib.get_close_matches(key, self._read, n=1, cutoff=0.6)
            hint = (
                f"did you mean {close[0]}?"
                if close
                else (f"known keys: {', '.join(sorted(self._read))}")
            )
            self.problem(key, f"unknown key; {hint}")


# ---------------------------------------------------------------- hw_error_injection


def _hardware(r: _Reader) -> None:
    enabled = r.switched_on()
    error_type = r.take("error_type", "text?")
    point = r.take("injection_point", "text?")
    targets = r.take("target_modules", "names?")
    excluded = r.take("exclude_modules", "names?")
    layers = r.take("target_layers", "layers?")
    during = r.take("apply_during", "text?")
    use_ste = r.take("use_ste", "bool?")
    flags = {
        key: r.take(key, "bool?", False)
        for key in ("mxfp4_stochastic_rounding", "nvfp4_stochastic_rounding", "mxfp4_block_2d")
    }
    for key in ("error_scale", "deadzone_threshold"):
        if r.take(key, "number?") is not None and enabled:
            r.note(key, "has no effect: it belonged to the noise types")
    if r.take("seed", "whole?") is not None and enabled:
        r.note("seed", "has no effect: the rounding draws no random numbers. Seeds: run.seed")
    if not enabled:
        r.state("quant.injection_point", "none", "enabled")
        return
    _error_type(r, error_type)
    _injection_point(r, point)
    _target_modules(r, targets)
    if excluded is not None:
        paths = _paths(r, "exclude_modules", excluded, _MODULES, _linear_special)
        r.state("quant.exclude", paths, "exclude_modules")
    if layers is not None:
        r.state("quant.target_layers", layers, "target_layers")
    if during is not None:
        r.state("quant.apply_during", during, "apply_during")
    if use_ste is not None:
        r.state("quant.use_ste", use_ste, "use_ste")
    for key, on in flags.items():
        if on:
            what = "two-dimensional blocks" if key.endswith("2d") else "stochastic rounding"
            r.problem(
                key,
                f"no numerics profile has {what}, because no operator that serves the model "
                f"does; set {key}: false",
            )


def _error_type(r: _Reader, error_type: str | None) -> None:
    if error_type is None:
        r.problem(
            "",
            "needs error_type: mxfp4 or nvfp4 (the earlier program's default, "
            "relative_gaussian, is not supported: " + _NOT_A_FORMAT + ")",
        )
    elif error_type == "mxfp4":
        r.imply("quant.weight_profile", "fork-mxfp4", "error_type")
        r.imply("quant.activation_profile", "fork-mxfp4", "error_type")
    elif error_type == "nvfp4":
        # The last state of the earlier code (experiments E13f and later).
        r.imply("quant.weight_profile", "fork-nvfp4-column", "error_type")
        r.imply("quant.block_axis", "column", "error_type")
        r.imply("quant.activation_profile", "fork-nvfp4-row", "error_type")
        r.note(
            "error_type",
            "nvfp4 reproduces the earlier code from E13f on: weight blocks along 'out', which no "
            "hardware computes. Before E13f: quant: {weight_profile: fork-nvfp4-row, "
            "block_axis: row}. For deployment: weight_profile and activation_profile nvfp4",
        )
    elif error_type in _REFUSED_ERROR_TYPES:
        r.problem(
            "error_type", f"{error_type} is not supported: {_REFUSED_ERROR_TYPES[error_type]}"
        )
    else:
        r.problem("error_type", f"unknown type {error_type!r}; use mxfp4 or nvfp4")


def _injection_point(r: _Reader, point: str | None) -> None:
    points = ("input", "output", "weight", "both", "weight_output")
    if point is None:
        r.problem(
            "",
            "needs injection_point, one of "
            + ", ".join(points)
            + " (the earlier program took input, which is W16A4)",
        )
        return
    if point not in points:
        r.problem("injection_point", f"unknown point {point!r}; use one of {', '.join(points)}")
        return
    r.state("quant.injection_point", point, "injection_point")
    if point == "both":
        r.note(
            "injection_point",
            "both is weight + input, as in the experiment log; the plan's "
            "weight + output is weight_output",
        )
    if point in ("input", "both"):
        r.imply("quant.lora_input", "quantised", "injection_point")
        r.note(
            "injection_point",
            "the earlier program quantised the input of the LoRA wrapper, "
            "so lora_input is quantised; quant.lora_input: full is what serving does",
        )
    if point in ("output", "weight_output"):
        r.imply("quant.lora_output", "quantised", "injection_point")
        r.note(
            "injection_point",
            "the earlier program quantised the output of the LoRA wrapper, so lora_output is "
            "quantised; quant.lora_output: full leaves the adapter's part in 16 bits",
        )


def _target_modules(r: _Reader, targets: list[str] | None) -> None:
    names = [name.lower() for name in targets or ["linear"]]
    if names == ["linear"]:
        return
    if set(names) <= set(_LINEARS):
        rest = ", ".join(["lm_head", *(name for name in _LINEARS if name not in names)])
        r.problem(
            "target_modules",
            "say what stays in 16 bits instead: "
            f"target_modules: [linear] and quant: {{exclude: [{rest}]}}",
        )
    else:
        r.problem(
            "target_modules",
            f"{targets!r}: only linears carry 4-bit numbers here; use target_modules: [linear]",
        )


def _linear_special(r: _Reader, name: str) -> bool:
    """Names of the earlier program's lists that need no exclusion here."""
    if name == "embed_tokens":
        return True  # an embedding is no linear
    if name in _LORA_PARTS:
        return True  # LoRA is never quantised
    if name == "base_layer":
        r.note(
            "exclude_modules",
            "base_layer kept the hooks off the inner linear, not the "
            "quantisation: the wrapper around it was hooked. The linears are quantised",
        )
        return True
    return False


# ---------------------------------------------------------------- noise_injection


def _noise(r: _Reader) -> None:
    enabled = r.switched_on()
    r.state("noise.enabled", enabled, "enabled")
    layer_types = r.take("layer_types", "names?")
    targets = r.take("target_modules", "names?")
    excluded = r.take("exclude_patterns", "names?")
    if enabled and not r.has("sigma_end"):
        r.imply("noise.sigma_end", 0.001, "enabled")  # the earlier code's default
    r.copy(
        {
            "sigma_start": ("number?", "noise.sigma_start"),
            "sigma_end": ("number?", "noise.sigma_end"),
            "num_stages": ("whole?", "noise.num_stages"),
            "epoch_aware": ("bool?", "noise.epoch_aware"),
            "stages_per_epoch": ("whole?", "noise.stages_per_epoch"),
        }
    )
    if [name.lower() for name in layer_types or ["rmsnorm"]] != ["rmsnorm"]:
        r.problem(
            "layer_types",
            f"{layer_types!r}: noise goes on RMSNorm weights only; on linear "
            "weights it collapsed training in the earlier experiments (1A, 1C). Use "
            "layer_types: [rmsnorm]",
        )
    if targets:
        paths = _paths(r, "target_modules", targets, _NORMS, lambda _r, _name: False)
        r.state("noise.target_modules", paths, "target_modules")
    if excluded is not None:
        paths = _paths(r, "exclude_patterns", excluded, _NORMS, _norm_special)
        r.state("noise.exclude", paths, "exclude_patterns")
    for key, reason in _REFUSED_NOISE_KEYS.items():
        if r.has(key):
            r.take(key, "any")
            r.problem(key, reason)
    layers = r.inner("layer_sigma_config")
    if layers is not None:
        _layer_sigma(layers)
        layers.refuse_unread()


def _norm_special(_r: _Reader, name: str) -> bool:
    return name in ("lm_head", "embed_tokens", *_LORA_PARTS)  # no norms there


def _layer_sigma(r: _Reader) -> None:
    # The plan's blocks leave ``enabled`` out and mean it.
    r.state("noise.layers.enabled", r.take("enabled", "bool?", True), "enabled")
    r.copy({"default_multiplier": ("number?", "noise.layers.default_multiplier")})
    multipliers = r.take("layer_multipliers", "any")
    if isinstance(multipliers, str):
        shown = corrected_multipliers(multipliers) or "layer_multipliers: {14: 1.5, 15: 1.5}"
        r.problem("layer_multipliers", f"expected layers and numbers in braces. Write\n{shown}")
    elif multipliers is not None:
        r.state("noise.layers.layer_multipliers", multipliers, "layer_multipliers")
    zones = r.inner("zone_schedule")
    if zones is None:
        return
    enabled = zones.take("enabled", "bool?", True)
    before = len(r.result.problems)
    values = _zone_values(zones)
    zones.refuse_unread()
    if enabled and len(r.result.problems) == before:
        r.state("noise.layers.zone_schedule", values, "zone_schedule")


def _zone_values(r: _Reader) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in ("edge_layers", "middle_layers"):
        values[key] = r.take(key, "layers")
        if not r.has(key):
            r.problem("", f"needs {key}, a list of layer indices")
    ratio = r.take("phase_boundary_ratio", "number?")
    if ratio is not None:
        values["phase_boundary_ratio"] = ratio
    for phase in ("early", "late"):
        for zone in ("edge", "middle"):
            name = f"{phase}_{zone}_multiplier"
            for key in (name, f"{phase}_{zone}_mult"):  # the E14a script's spelling
                value = r.take(key, "number?")
                if value is not None:
                    values[name] = value
    return values


# ---------------------------------------------------------------- names and types


def _paths(
    r: _Reader,
    key: str,
    names: list[str],
    known: tuple[str, ...],
    special: Callable[[_Reader, str], bool],
) -> list[str]:
    """Substrings of the earlier program as paths that are matched segment by segment.

    A substring that is no whole name ("attn", "layers") would match nothing here, so it is a
    problem that lists the names which it stood for.
    """
    paths = []
    for name in names:
        plain = name.strip(".")
        if special(r, plain.lower()):
            continue
        if plain in ("layers", "model", "") or (plain == "norm" and "norm" in known):
            r.problem(
                key,
                f"{name!r} was a substring of "
                f"{'all norms' if plain == 'norm' else 'every name'} in the earlier program. "
                "Here names are matched whole: write the ones you mean, e.g. "
                f"{known[0]} or layers.0",
            )
            continue
        meant = [m for m in known if plain.lower() in m and plain != m]
        if meant and plain not in known:
            r.problem(
                key,
                f"{name!r} is a part of a name; the earlier program matched "
                f"substrings, here names are matched whole. Write {', '.join(meant)}",
            )
            continue
        last = plain.rsplit(".", 1)[-1]
        if last.isdigit() and 1 <= int(last) <= 9:
            r.note(
                key,
                f"{plain} is this layer only; as a substring it also took {plain}0 to "
                f"{plain}9 where they exist",
            )
        paths.append(plain)
    return paths


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "any": lambda value: True,
    "bool": lambda value: isinstance(value, bool),
    "text": lambda value: isinstance(value, str),
    "number": _is_number,
    "whole": _is_whole,
    "names": lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
    "layers": lambda value: isinstance(value, list) and all(_is_whole(v) for v in value),
    "block": lambda value: isinstance(value, Mapping),
}
_KIND_NAMES = {
    "bool": "true or false",
    "text": "text",
    "number": "a number",
    "whole": "a whole number",
    "names": "a list of names, e.g. [lm_head]",
    "layers": "a list of layer indices, e.g. [0, 27]",
    "block": "a block of keys",
}
