"""The configuration's keys as data: paths, types in words, defaults, and the nearest known key.

Everything that talks *about* the configuration (error messages, ``config show --describe``, the
reference page) walks the schema through this module, so that none of them keeps a list of its own.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic.fields import FieldInfo

from npu_qat.config.schema import RunConfig, Section

# What other programs call the same thing. Looked up by the last part of an unknown key.
_SYNONYMS = {
    "learning_rate": "train.lr",
    "lr_warmup_steps": "train.warmup_steps",
    "total_steps": "train.steps",
    "max_steps": "train.steps",
    "total_training_steps": "train.steps",
    "total_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "grad_clip": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "per_device_train_batch_size": "train.micro_batch_size",
    "ppo_micro_batch_size_per_gpu": "train.micro_batch_size",
    "save_steps": "train.checkpoint_every",
    "save_freq": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "train_batch_size": "dapo.prompts_per_rollout",
    "gen_batch_size": "dapo.generation_prompts",
    "filter_groups": "dapo.dynamic_sampling",
    "max_num_gen_batches": "dapo.max_generation_tries",
    "clip_ratio_low": "dapo.clip_low",
    "epsilon": "dapo.clip_low",
    "clip_ratio_high": "dapo.clip_high",
    "epsilon_high": "dapo.clip_high",
    "mask_truncated_completions": "dapo.overlong_filter",
    "overlong_buffer_len": "dapo.overlong_buffer",
    "penalty_factor": "dapo.overlong_factor",
    "overlong_penalty_factor": "dapo.overlong_factor",
    "n_resp_per_prompt": "rollout.num_generations",
    "group_size": "rollout.num_generations",
    "max_prompt_length": "rollout.max_prompt_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "max_completion_length": "rollout.max_new_tokens",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "model_path": "model.path",
    "model_name_or_path": "model.path",
    "enable_gradient_checkpointing": "model.gradient_checkpointing",
    "attn_implementation": "model.attention",
    "exclude_modules": "quant.exclude",
    "layer_multipliers": "noise.layers.layer_multipliers",
    "layer_sigma_config": "noise.layers",
    "test_freq": "evaluation.every",
    "eval_steps": "evaluation.every",
    "hw_error": "quant",
    "aqn": "noise",
    "quantization": "quant",
}

Path = tuple[str, ...]


@dataclass(frozen=True)
class Key:
    """One key of the configuration: a value, or a section of further keys.

    ``kind`` is its type in words; ``item_kind`` is that of the items of a list or mapping.
    """

    path: Path
    kind: str
    item_kind: str | None
    default: Any
    required: bool
    description: str
    section: type[Section] | None

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


def walk(section: type[Section] = RunConfig, prefix: Path = ()) -> Iterator[Key]:
    """Every key, sections before what is in them, in the order of the schema."""
    for name, info in section.model_fields.items():
        inner = section_of(info.annotation)
        annotation = _with_constraints(info)
        yield Key(
            path=(*prefix, name),
            kind="section" if inner else type_in_words(annotation),
            item_kind=None if inner else _item_in_words(annotation),
            default=None if info.is_required() else info.get_default(call_default_factory=True),
            required=info.is_required(),
            description=info.description or _first_paragraph(inner),
            section=inner,
        )
        if inner:
            yield from walk(inner, (*prefix, name))


@cache
def known_keys() -> dict[Path, Key]:
    """All keys by path."""
    return {key.path: key for key in walk()}


def key_above(path: Path) -> Key | None:
    """The known key at ``path`` or, inside a list or mapping, the one that holds it."""
    for length in range(len(path), 0, -1):
        if path[:length] in known_keys():
            return known_keys()[path[:length]]
    return None


def section_of(annotation: Any) -> type[Section] | None:
    """The section class behind ``Section`` or ``Section | None``."""
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def is_optional_section(key: Key) -> bool:
    """Whether ``null`` is a value of this section, not an empty section."""
    return key.section is not None and not key.required and key.default is None


def suggestion(path: Path) -> str:
    """What to say about the unknown key ``path``: the nearest known one, or what there is."""
    nearest = nearest_key(path)
    if nearest is not None:
        return f"did you mean {nearest}?"
    parent = known_keys().get(path[:-1])
    options = [".".join(p) for p in known_keys() if p[:-1] == path[:-1]]
    if parent is not None and parent.section is not None:
        return f"known keys of {parent.dotted}: {', '.join(o.split('.')[-1] for o in options)}"
    return f"known sections: {', '.join(p[0] for p in known_keys() if len(p) == 1)}"


def nearest_key(path: Path) -> str | None:
    """The known key that ``path`` most likely meant, as a dotted name."""
    keys = known_keys()
    last = path[-1]
    if last in _SYNONYMS:
        return _SYNONYMS[last]
    siblings = [p[-1] for p in keys if p[:-1] == path[:-1]]
    longer = [name for name in siblings if len(last) > 2 and name.startswith(last)]
    close = longer or difflib.get_close_matches(last, siblings, n=1, cutoff=0.75)
    if close:
        return ".".join((*path[:-1], close[0]))
    elsewhere = [".".join(p) for p in keys if p[-1] == last]
    if elsewhere:
        return elsewhere[0]
    dotted = [".".join(p) for p in keys]
    close = difflib.get_close_matches(".".join(path), dotted, n=1, cutoff=0.75)
    if close:
        return close[0]
    by_name = {p[-1]: ".".join(p) for p in reversed(keys)}
    close = difflib.get_close_matches(last, by_name, n=1, cutoff=0.8)
    return by_name[close[0]] if close else None


def type_in_words(annotation: Any) -> str:
    """``whole number > 0`` for ``Annotated[int, Gt(0)]``, and so on."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _bounded(type_in_words(arguments[0]), " and ".join(_bounds(arguments[1:])))
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_in_words(a) for a in arguments)
    if origin is tuple:
        return f"list of {_in_brackets(type_in_words(arguments[0]))}"
    if origin is dict:
        if arguments[1] is Any:
            return "mapping"
        return f"mapping of {type_in_words(arguments[0])} to {type_in_words(arguments[1])}"
    simple = {
        int: "whole number",
        float: "number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return simple[annotation]


def _bounded(words: str, bounds: str) -> str:
    """``number > 1 or null`` for the words ``number or null`` and the bounds ``> 1``."""
    if not bounds:
        return words
    return " or ".join(w if w == "null" else f"{w} {bounds}" for w in words.split(" or "))


def _item_in_words(annotation: Any) -> str | None:
    """Type of the items of a list or mapping, also inside ``... or null``."""
    for option in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(option) in (tuple, dict):
            item = typing.get_args(option)[1 if typing.get_origin(option) is dict else 0]
            return None if item is Any else type_in_words(item)
    return None


def _in_brackets(text: str) -> str:
    return f"({text})" if " " in text else text


def _with_constraints(info: FieldInfo) -> Any:
    """The annotation with the bounds that pydantic has moved beside it."""
    if not info.metadata:
        return info.annotation
    return Annotated[(info.annotation, *info.metadata)]


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(tuple(item.metadata))
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            bound = getattr(item, attribute, None)
            if bound is not None:
                yield f"{sign} {bound:g}"


def _first_paragraph(section: type[Section] | None) -> str:
    text = (section.__doc__ or "") if section else ""
    return " ".join(text.split("\n\n")[0].split())
