"""The published scan (SRDD), as it was: errors of hidden states, by decoder layer, by thresholds.

The earlier program quantised the *output of each decoder layer*, the residual stream, on a few
prompts and compared, pooled over all elements of a prompt and averaged over prompts::

    sqnr_db          = 10 log10( mean(x^2) / mean((x - xq)^2) )
    deadzone_ratio   = mean( |x| > 1e-10 and |xq| < 1e-10 )
    saturation_ratio = mean( |xq| >= 0.99 max|xq| )
    relative_error   = mean( |x - xq| / (|x| + 1e-10) )

A layer is flagged if any of them passes its threshold, and the share of flagged layers chooses a
strategy. It is kept so that its numbers can be compared, and because the plan asks for it. What is
wrong with it as a guide:

* W4A4 never quantises the residual stream. The default scan measures what it does quantise.
* One massive-activation token decides ``sqnr_db`` of a prompt.
* The thresholds flag everything: on Gaussian numbers MXFP4 leaves 18.9 dB and has a relative error
  of 20 %. A scan that flags all layers, or none, says so in ``statement``.

The plan's own command has ``--injection_point both``, which the published program did not know (nor
``nvfp4``). Here the injection point says which tensors are measured: the residual stream for those
that quantise activations, and for those that quantise weights also the weights of the layer's
linears, by the same formulas. Flags come from the residual stream where it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from npu_qat.config import Recipe
from npu_qat.config.paths import layer_index
from npu_qat.layers import plan_linears
from npu_qat.numerics import fake_quant, get_profile
from npu_qat.sensitivity.texts import Text, check_texts
from npu_qat.sensitivity.twins import decoder_layers, unchanged, watch_outputs

PROFILES = {"mxfp4": "fork-mxfp4", "nvfp4": "fork-nvfp4-row"}
"""The documents' names -> the earlier program's own numbers."""

METRICS = (
    "sqnr_db",
    "deadzone_ratio",
    "saturation_ratio",
    "relative_error",
    "mean_abs_error",
    "max_abs_error",
    "output_norm",
)
PROMPTS = 8
"""The published scan read eight fixed prompts."""

_TINY = 1e-10
_GAUSSIAN_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Thresholds:
    """A layer is flagged below ``sqnr_db`` dB, or above one of the other three (shares)."""

    sqnr_db: float = 20.0
    deadzone: float = 0.05
    saturation: float = 0.01
    relative_error: float = 0.10

    def issues(self, metrics: dict[str, float]) -> list[str]:
        """What is wrong with a layer of these metrics; empty if it is healthy."""
        found = []
        if metrics["sqnr_db"] < self.sqnr_db:
            found.append(f"SQNR {metrics['sqnr_db']:.1f} dB is below {self.sqnr_db:g} dB")
        for key, name, limit in (
            ("deadzone_ratio", "dead zone", self.deadzone),
            ("saturation_ratio", "saturation", self.saturation),
            ("relative_error", "relative error", self.relative_error),
        ):
            if metrics[key] > limit:
                found.append(f"{name} {metrics[key]:.1%} is above {100 * limit:g}%")
        return found


def published_scan(
    model: nn.Module,
    texts: Sequence[Text],
    recipe: Recipe,
    *,
    model_path: str,
    quant_type: str,
    thresholds: Thresholds | None = None,
    timestamp: str = "",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The published metrics of ``model``, in the published JSON schema, plus ``statement``.

    Args:
        model: a Hugging Face decoder; not changed.
        texts: prompts; their completions are read, too.
        recipe: its profiles and injection point, see the module docstring.
        model_path, quant_type, timestamp: go into the result as they are.
        thresholds: default, the published ones.

    Raises:
        ValueError: no texts, one that is longer than the model's context, a recipe that quantises
            nothing or rotates, a profile that needs a calibrated tensor scale for activations (the
            published program had none), or NaN or Inf in a weight or a hidden state.
    """
    check_texts(texts, model)
    _check_recipe(recipe)
    limits = thresholds or Thresholds()
    layers = decoder_layers(model, [p.path for p in plan_linears(model, recipe) if p.quantized])
    activations = recipe.quantizes_input or recipe.quantizes_output
    with unchanged(model):
        stream = _stream_metrics(model, layers, texts, recipe, progress) if activations else {}
        weights = _weight_metrics(model, layers, recipe) if recipe.quantizes_weight else {}
    flagged_by = stream if activations else weights
    rows: list[dict[str, Any]] = []
    for index, metrics in flagged_by.items():
        issues = limits.issues(metrics)
        row = {"layer_id": index, **metrics, "is_problematic": bool(issues), "issues": issues}
        if activations and recipe.quantizes_weight:
            row["weights"] = weights[index]
        rows.append(row)
    flagged = [row["layer_id"] for row in rows if row["is_problematic"]]
    measured = "the residual stream" if activations else "weights"
    profile = recipe.activation_profile if activations else recipe.weight_profile
    return {
        "config": {
            "model_path": model_path,
            "quant_type": quant_type,
            "injection_point": recipe.injection_point,
            "profile": profile,
            "num_layers": len(rows),
            "thresholds": {field.name: getattr(limits, field.name) for field in fields(limits)},
        },
        "report": {
            "summary": {
                "total_layers": len(rows),
                "problematic_layers": len(flagged),
                "healthy_layers": len(rows) - len(flagged),
                "problematic_layer_ids": flagged,
            },
            "statistics": {
                key: _statistics([m[key] for m in flagged_by.values()]) for key in METRICS
            },
            "per_layer": rows,
        },
        "recommendations": _recommend(rows),
        "statement": _statement(len(flagged), len(rows), measured, profile, limits),
        "timestamp": timestamp,
    }


def _check_recipe(recipe: Recipe) -> None:
    if recipe.injection_point == "none":
        raise ValueError("injection_point none measures nothing; use both, input, output or weight")
    if recipe.rotates:
        raise ValueError(
            "the published method measures hidden states, which quant.rotation does not change; "
            "use --method linears"
        )
    activations = recipe.quantizes_input or recipe.quantizes_output
    if activations and get_profile(recipe.activation_profile).tensor_scale:
        raise ValueError(
            f"the published method scales each tensor by itself, and {recipe.activation_profile!r} "
            "needs a calibrated tensor scale; use 'fork-nvfp4-row' or 'nvfp4-one-level'"
        )


def layer_metrics(x: Tensor, image: Tensor) -> dict[str, float]:
    """The published metrics of a tensor and its quantised image, pooled over all elements."""
    x, image = x.detach().double(), image.detach().double()
    error = (x - image).abs()
    signal, noise = float(x.square().mean()), float(error.square().mean())
    top = float(image.abs().max())
    return {
        "sqnr_db": 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else 100.0,
        "deadzone_ratio": float(((x.abs() > _TINY) & (image.abs() < _TINY)).double().mean()),
        "saturation_ratio": float((image.abs() >= 0.99 * top).double().mean()) if top else 0.0,
        "relative_error": float((error / (x.abs() + _TINY)).mean()),
        "mean_abs_error": float(error.mean()),
        "max_abs_error": float(error.max()),
        "output_norm": float(x.norm()),
    }


def _stream_metrics(
    model: nn.Module,
    layers: dict[int, nn.Module],
    texts: Sequence[Text],
    recipe: Recipe,
    progress: Callable[[str, int, int], None],
) -> dict[int, dict[str, float]]:
    """Metrics of the output of each decoder layer, mean over texts."""
    device = next(model.parameters()).device
    seen: dict[int, list[dict[str, float]]] = {index: [] for index in layers}

    def see(index: int, hidden: Tensor) -> None:
        _check_finite(hidden, f"the hidden state behind layer {index}")
        image = fake_quant(hidden, recipe.activation_profile)
        seen[index].append(layer_metrics(hidden, image))

    for done, text in enumerate(texts):
        with watch_outputs(layers, see):
            ids = torch.tensor([text.tokens], device=device)
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        progress("layers", done + 1, len(texts))
    return {index: _mean_metrics(rows) for index, rows in seen.items()}


def _weight_metrics(
    model: nn.Module, layers: dict[int, nn.Module], recipe: Recipe
) -> dict[int, dict[str, float]]:
    """Metrics of the weights of each layer, mean over its quantised linears."""
    axis = -1 if recipe.block_axis == "row" else 0
    rows: dict[int, list[dict[str, float]]] = {index: [] for index in layers}
    for planned in plan_linears(model, recipe):
        index = layer_index(planned.path)
        if planned.quantized and index is not None:
            weight = model.get_submodule(planned.path).weight
            assert isinstance(weight, Tensor)
            _check_finite(weight, f"{planned.path}.weight")
            rows[index].append(
                layer_metrics(weight, fake_quant(weight, recipe.weight_profile, axis))
            )
    return {index: _mean_metrics(metrics) for index, metrics in rows.items()}


def _check_finite(x: Tensor, what: str) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"{what} holds NaN or Inf: the checkpoint is damaged, or these texts overflow it"
        )


def _mean_metrics(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in METRICS}


def _statistics(values: Sequence[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return {"min": min(values), "max": max(values), "mean": mean, "std": variance**0.5}


def _recommend(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The published strategy for this share of flagged layers."""
    flagged = [row for row in rows if row["is_problematic"]]
    ids = [row["layer_id"] for row in flagged]
    share = len(flagged) / len(rows)
    aqn: list[int] = []
    precise: list[int] = []
    if not flagged:
        strategy, details = "no_action", "no layer is flagged"
    elif share < 0.10:
        strategy, details = "targeted_mitigation", "keep the flagged layers in 16 bits"
        precise = ids
    elif share <= 0.30:
        strategy, details = "mixed_approach", "16 bits below 15 dB, noise for the other flagged"
        precise = [row["layer_id"] for row in flagged if row["sqnr_db"] < 15.0]
        aqn = [i for i in ids if i not in precise]
    else:
        strategy = "reconsider_quantization"
        details = "more than 30 % of the layers are flagged"
    return {
        "strategy": strategy,
        "details": f"{details} ({len(flagged)} of {len(rows)})",
        "aqn_layers": aqn,
        "mixed_precision_layers": precise,
    }


def gaussian_metrics(profile: str) -> dict[str, float]:
    """The metrics of Gaussian numbers in ``profile``: the floor that no model can be blamed for."""
    x = torch.randn(64, _GAUSSIAN_SAMPLE // 64, generator=torch.Generator().manual_seed(0))
    return layer_metrics(x, fake_quant(x, profile))


def _statement(flagged: int, total: int, measured: str, profile: str, limits: Thresholds) -> str:
    """What the flags are worth, in words."""
    if flagged == 0:
        return (
            f"None of the {total} layers is flagged: by these thresholds there is nothing to "
            "treat, and nothing to choose layers by."
        )
    if flagged < total:
        return f"{flagged} of {total} layers are flagged, by {measured} in {profile}."
    text = (
        f"All {total} layers are flagged, so the flags choose no layer over another, and the "
        "strategy follows from the thresholds alone."
    )
    floor = limits.issues(gaussian_metrics(profile))
    if floor:
        text += f" Gaussian numbers in {profile} would be flagged, too ({'; '.join(floor)})."
    return text + " Use --method linears to see where layers differ."


__all__ = [
    "PROFILES",
    "PROMPTS",
    "Thresholds",
    "gaussian_metrics",
    "layer_metrics",
    "published_scan",
]
