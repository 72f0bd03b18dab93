"""Checks of a whole run that no single layer can make: noise, gradients, distillation.

What is expected comes from the configuration and the schedule, never from the records that are
being checked: noise that was never asked for leaves no record that could look wrong.
"""

from __future__ import annotations

from npu_qat.layers.audit import Check
from npu_qat.layers.gradients import gradient_check
from npu_qat.noise.evidence import multiplier_checks, noise_check
from npu_qat.training.loop import Learner


def run_checks(learner: Learner) -> list[Check]:
    """The checks of a finished arm."""
    aqn, config = learner.aqn, learner.config
    multiplied = config.noise.enabled and config.noise.layers.enabled
    return [
        *_noise_checks(learner),
        *(multiplier_checks(aqn) if aqn is not None and multiplied else []),
        gradient_check(
            config.quant if learner.quantized is not None else None,
            learner.engine.first_gradients,
            learner.updates,
        ),
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
    return [noise_check(learner.noise_records, phase, due) for phase in phases]


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
