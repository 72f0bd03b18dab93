"""Checks of a whole run that no single layer can make: noise, gradients, distillation.

What is expected comes from the configuration and the schedule, never from the records that are
being checked: noise that was never asked for leaves no record that could look wrong.
"""

from __future__ import annotations

from typing import Any

from npu_qat.layers.audit import Check
from npu_qat.training.loop import Learner

# Adapters whose output meets a quantiser before it reaches the loss; behind o and down the residual
# stream carries some gradient past it.
BEHIND_A_QUANTISER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def run_checks(learner: Learner) -> list[Check]:
    """The checks of a finished arm."""
    return [
        *_noise_checks(learner),
        *_multiplier_checks(learner),
        _gradient_check(learner),
        *_distillation_checks(learner),
        *_engine_checks(learner),
    ]


def _noise_checks(learner: Learner) -> list[Check]:
    """One check a phase that has noise in every step: each scheduled block changed every norm."""
    aqn, config = learner.aqn, learner.config
    if not config.noise.enabled or aqn is None or aqn.schedule is None:
        return []
    wanted = config.noise.apply_during
    phases = ["rollout"] if config.train.method == "dapo" and wanted != "training" else []
    # A rollout without a single informative group has no update, so training noise is not due in
    # every step of DAPO; what there was is checked when it is drawn.
    phases += ["training"] if config.train.method == "sft" and wanted != "rollout" else []
    due = {s + 1 for s in range(learner.steps) if aqn.due(s)}
    return [_noise_check(learner.noise_records, phase, due) for phase in phases]


def _noise_check(records: list[dict[str, Any]], phase: str, due: set[int]) -> Check:
    of_phase = {r["step"]: r for r in records if r["phase"] == phase}
    reached = {
        step
        for step, r in of_phase.items()
        if r["sigma"] > 0 and (r["inert"] or r["norms_changed"] == r["norms_expected"] > 0)
    }
    missing = sorted(due - reached)
    stray = sorted(reached - due)
    detail = f", not in step {missing[0]}" if missing else f", also in {stray[0]}" if stray else ""
    return Check(
        f"noise reaches the norms in {phase}",
        f"{len(due)} steps, by the schedule",
        f"{len(reached)} steps{detail}",
        not missing and not stray,
    )


def _multiplier_checks(learner: Learner) -> list[Check]:
    """Whether each decoder layer gets its multiple of the noise, if there are multipliers."""
    aqn, config = learner.aqn, learner.config
    if not (config.noise.enabled and config.noise.layers.enabled) or aqn is None:
        return []
    checks = []
    for found in aqn.check_multipliers():
        off = found.off
        shown = {name: f"{value:.3g}" for name, value in found.expected.items()}
        measured = {name: f"{value:.3g}" for name, value in found.measured.items()}
        checks.append(
            Check(
                f"noise multipliers by layer from step {found.first_step + 1} on",
                ", ".join(f"{name}: {value}" for name, value in shown.items()),
                ", ".join(f"{name}: {value}" for name, value in measured.items())
                + (f"; off: {', '.join(off)}" if off else ""),
                not off,
            )
        )
    return checks


def _distillation_checks(learner: Learner) -> list[Check]:
    """Whether the divergence from the teacher was in the loss, if the arm has a teacher."""
    if learner.teacher is None:
        return []
    # A DAPO step without informative groups has no update, so only one step is asked for there.
    wanted = learner.steps if learner.config.train.method == "sft" else 1
    return [
        Check(
            "the loss holds the divergence from the teacher",
            f"{wanted} steps or more",
            f"{learner.distilled_steps} steps",
            learner.distilled_steps >= wanted,
        )
    ]


def _engine_checks(learner: Learner) -> list[Check]:
    """Whether an engine that sampled the rollouts was compared with the modules before."""
    if learner.sampler.in_modules or not learner.steps_made:
        return []
    proof = learner.sampler_proof
    limit = learner.config.dapo.logp_gap_limit
    measured = ", ".join(f"{name} {value:.4f}" for name, value in proof.items())
    gap = proof.get("engine_gap_mean")
    return [
        Check(
            f"rollouts by {learner.sampler.name} compute the trained model",
            f"engine_gap_mean at most {limit:g}, noise off",
            measured or "not compared",
            gap is not None and gap <= limit,
        )
    ]


def _gradient_check(learner: Learner) -> Check:
    """Whether the first update reached the adapters, by the gradient of their B matrices.

    A is not looked at: its gradient is zero while B is.
    """
    recipe = learner.config.quant
    first = {n: g for n, g in learner.engine.first_gradients.items() if "lora_B" in n}
    zero = [name for name, largest in first.items() if largest == 0.0]
    unhelped = learner.quantized is not None and not recipe.use_ste
    if unhelped and recipe.lora_output == "quantised":
        # Every adapter's output meets a quantiser: nothing leaks, nothing learns. The engine keeps
        # the gradients of the first update that has any; here none may have.
        reached = learner.engine.first_gradients
        return Check(
            "without the straight-through estimator no adapter gets a gradient",
            "no gradient in any of at least one update",
            f"{len(reached)} parameters with one in {learner.updates} updates",
            not reached and learner.updates > 0,
        )
    blocked = unhelped and (recipe.quantizes_input or recipe.quantizes_output)
    if blocked and (recipe.lora_input == "quantised" or recipe.quantizes_output):
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
        f"{len(first) - len(zero)} of {len(first)} adapters, {learner.updates} updates"
        + (f", exactly zero: {zero[0]}" if zero else ""),
        bool(first) and learner.updates > 0 and (blocked or not zero),
    )
