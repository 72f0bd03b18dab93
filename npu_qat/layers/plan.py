"""Which linears of a model are quantised, and why the others are not.

The plan is made from module paths and shapes alone, so that it also describes a model on the meta
device. ``prepare_model`` carries out exactly this plan and the audit checks that it was carried
out; there is no second place that decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from npu_qat.config import Recipe
from npu_qat.config.paths import layer_index, match_path
from npu_qat.numerics.profiles import get_profile

# Linears under one parent that read the same tensor, in Llama-like decoders. They share one
# quantisation of it, and serving engines fuse them (one tensor scale a group).
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class PlannedLinear:
    """One linear layer and what becomes of it. Sizes in bytes."""

    path: str
    layer: int | None
    in_features: int
    out_features: int
    bias: bool
    quantized: bool
    reason: str
    mode: str
    weight_profile: str | None
    activation_profile: str | None
    block_axis: str
    storage: str
    bytes_16bit: int
    bytes_stored: int


def plan_linears(model: nn.Module, recipe: Recipe) -> list[PlannedLinear]:
    """Decide for every ``nn.Linear`` of ``model``, in module order.

    Raises:
        ValueError: an exclude pattern or a target layer matches nothing (a misspelt exclusion
            quantises what it meant to protect), nothing is left to quantise, a tied weight would
            be quantised, experts would stay in 16 bits unasked, or the result would need a tensor
            scale of its own.
    """
    output_profile = get_profile(recipe.activation_profile)
    if recipe.quantizes_output and output_profile.tensor_scale:
        raise ValueError(
            f"injection_point {recipe.injection_point!r} with {output_profile.name!r}: tensor "
            "scales are calibrated for inputs only; use 'nvfp4-one-level'"
        )
    linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantise")
    stacked = _stacked_weights(model)
    _check_patterns([*linears, *stacked], recipe)
    for path in stacked:
        if _reason_to_leave(path, recipe) is None:
            raise ValueError(
                f"{path} holds the weights of several experts in one tensor; quantisation reaches "
                "nn.Linear only, so most of the model would stay in 16 bits. If that is meant, add "
                f"{path.split('.')[-2:][0]!r} to quant.exclude"
            )
    tied = _tied_to_embeddings(model)
    plan = [_plan(path, linear, recipe) for path, linear in linears.items()]
    for planned in plan:
        if planned.quantized and planned.path in tied:
            raise ValueError(
                f"{planned.path} shares its weight with the input embeddings; quantising it would "
                f"untie them. Add {planned.path!r} to quant.exclude"
            )
    if recipe.injection_point != "none" and not any(planned.quantized for planned in plan):
        raise ValueError(
            f"injection_point {recipe.injection_point!r}, but quant.exclude and "
            "quant.target_layers leave no linear layer to quantise"
        )
    return plan


def sibling_groups(paths: Iterable[str]) -> list[tuple[str, ...]]:
    """``paths`` partitioned into groups that read the same input, in the given order."""
    groups: dict[tuple[str, object], list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        family = next((s for s in SIBLINGS if name in s), name)
        groups.setdefault((parent, family), []).append(path)
    return [tuple(group) for group in groups.values()]


def _plan(path: str, linear: nn.Linear, recipe: Recipe) -> PlannedLinear:
    reason = _reason_to_leave(path, recipe)
    quantized = reason is None
    w = recipe.weight_profile if quantized and recipe.quantizes_weight else None
    a = recipe.quantizes_input or recipe.quantizes_output
    size = linear.in_features * linear.out_features
    full = 2 * size
    stored = full
    if w is not None and recipe.base_storage == "packed":
        stored = _packed_bytes(linear, recipe)
    elif w is not None and multiplies_in_fp32(recipe):
        stored = 2 * full
    if w is not None and recipe.apply_during != "both":
        stored += full
    return PlannedLinear(
        path=path,
        layer=layer_index(path),
        in_features=linear.in_features,
        out_features=linear.out_features,
        bias=linear.bias is not None,
        quantized=quantized,
        reason=reason or "",
        mode=f"W{4 if w else 16}A{4 if quantized and recipe.quantizes_input else 16}"
        + ("O4" if quantized and recipe.quantizes_output else ""),
        weight_profile=w,
        activation_profile=recipe.activation_profile if quantized and a else None,
        block_axis=recipe.block_axis,
        storage=recipe.base_storage if w else "image",
        bytes_16bit=full,
        bytes_stored=stored,
    )


def _reason_to_leave(path: str, recipe: Recipe) -> str | None:
    if recipe.injection_point == "none":
        return "injection_point: none"
    for pattern in recipe.exclude:
        if match_path(path, pattern):
            return f"excluded by {pattern!r}"
    if recipe.target_layers is not None and layer_index(path) not in recipe.target_layers:
        return "not in target_layers"
    return None


def multiplies_in_fp32(recipe: Recipe) -> bool:
    """Whether operands, and so images of weights, are fp32: a dual-level profile has fp32 scales
    inside the sum of the matmul."""
    used = [recipe.weight_profile] if recipe.quantizes_weight else []
    used += [recipe.activation_profile] if recipe.quantizes_input else []
    return any(get_profile(name).level0_block for name in used)


def _stacked_weights(model: nn.Module) -> list[str]:
    """Paths of several matrices in one tensor, as transformers 5 fuses the experts of a mixture.
    Kernels of convolutions are none, nor is a table of positions [1, T, H]."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 2 and len(parameter) > 1
    ]


def _packed_bytes(linear: nn.Linear, recipe: Recipe) -> int:
    n, k = linear.out_features, linear.in_features
    rows, length = (n, k) if recipe.block_axis == "row" else (k, n)
    profile = get_profile(recipe.weight_profile)
    first_level = 4 * -(-length // profile.level0_block) if profile.level0_block else 0
    return rows * ((length + 1) // 2 + -(-length // profile.block_size) + first_level)


def _check_patterns(paths: list[str], recipe: Recipe) -> None:
    # The default exclusion names a module that some decoders do not have.
    for pattern in set(recipe.exclude) - {"lm_head"}:
        if not any(match_path(path, pattern) for path in paths):
            raise ValueError(
                f"quant.exclude: {pattern!r} matches no linear layer; the first are "
                f"{', '.join(paths[:4])}"
            )
    layers = {layer_index(path) for path in paths}
    missing = sorted(set(recipe.target_layers or ()) - layers)
    if missing:
        raise ValueError(f"quant.target_layers: the model has no decoder layer {missing}")


def _tied_to_embeddings(model: nn.Module) -> set[str]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        path
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and id(m.weight) in embeddings
    }
