"""Whether gradients reach the adapters as the recipe says: a check for the audit.

With the straight-through estimator every adapter gets a gradient in the first update. Without it
rounding passes none on, and an adapter whose output meets a quantiser before it reaches the loss
stays as it is: the failure that ``use_ste: false`` is kept to reproduce.
"""

from __future__ import annotations

from collections.abc import Mapping

from npu_qat.config import Recipe
from npu_qat.layers.audit import Check

# Adapters whose output meets a quantiser before it reaches the loss; behind o and down the residual
# stream carries some gradient past it.
BEHIND_A_QUANTISER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def gradient_check(recipe: Recipe | None, largest: Mapping[str, float], updates: int) -> Check:
    """Whether the first update reached the adapters, by the gradient of their B matrices.

    A is not looked at: its gradient is zero while B is.

    Args:
        recipe: of the quantised model, or None for a 16-bit one.
        largest: parameter -> largest |gradient| in the first update that had any.
        updates: optimiser updates of the run.
    """
    first = {n: g for n, g in largest.items() if "lora_B" in n}
    zero = [name for name, value in first.items() if value == 0.0]
    unhelped = recipe is not None and not recipe.use_ste
    if recipe is not None and unhelped and recipe.lora_output == "quantised":
        # Every adapter's output meets a quantiser: nothing leaks, nothing learns. What is kept are
        # the gradients of the first update that has any; here none may have.
        return Check(
            "without the straight-through estimator no adapter gets a gradient",
            "no gradient in any of at least one update",
            f"{len(largest)} parameters with one in {updates} updates",
            not largest and updates > 0,
        )
    blocked = recipe is not None and unhelped and _quantizes_activations(recipe)
    if recipe is not None and blocked and _lora_is_behind(recipe):
        # The failure that use_ste: false reproduces, of every layer but what o and down leak.
        expected = [n for n in first if any(f".{kind}." in n for kind in BEHIND_A_QUANTISER)]
        leaked = [n for n in expected if first[n] > 0.0]
        beside = max((g for n, g in first.items() if n not in expected), default=0.0)
        return Check(
            "without the straight-through estimator q, k, v, gate and up get no gradient",
            f"{len(expected)} adapters exactly zero",
            f"{len(expected) - len(leaked)} are"
            + (f", not {leaked[0]}" if leaked else "")
            + f"; o and down leak up to {beside:.2g} past it",
            bool(expected) and not leaked,
        )
    return Check(
        "adapters receive a gradient in the first update",
        "all, and at least one update" if not blocked else "at least one update",
        f"{len(first) - len(zero)} of {len(first)} adapters, {updates} updates"
        + (f", exactly zero: {zero[0]}" if zero else "")
        + ("" if first else "; all rewards of every group equal, or nothing trained"),
        bool(first) and updates > 0 and (blocked or not zero),
    )


def _quantizes_activations(recipe: Recipe) -> bool:
    return recipe.quantizes_input or recipe.quantizes_output


def _lora_is_behind(recipe: Recipe) -> bool:
    return recipe.lora_input == "quantised" or recipe.quantizes_output
