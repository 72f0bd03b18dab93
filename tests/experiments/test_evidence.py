"""The checks of a whole run fail when the run did not do what its configuration says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from npu_qat.config import RunConfig
from npu_qat.experiments.evidence import run_checks
from npu_qat.layers.audit import AuditError, raise_failed

STEPS = 6
NOISE = {"enabled": True, "num_stages": 3}


def record(step: int, **changes: Any) -> dict[str, Any]:
    found = {"step": step, "phase": "rollout", "sigma": 0.01, "norms_changed": 5}
    return found | {"norms_expected": 5, "inert": False} | changes


def learner(
    sections: dict[str, Any] | None = None,
    noise: list[dict[str, Any]] | None = None,
    gradients: dict[str, float] | None = None,
    updates: int = 4,
) -> Any:
    """What the checks look at; noise is due in steps 3 to 6 (counted from 1)."""
    config = RunConfig.model_validate({"noise": NOISE, **(sections or {})})
    kinds = ("q_proj", "down_proj")
    default = {f"layers.0.{kind}.lora_B.default.weight": 0.5 for kind in kinds}
    return SimpleNamespace(
        config=config,
        aqn=SimpleNamespace(schedule=object(), due=lambda step: step >= 2),
        steps=STEPS,
        noise_records=[record(s) for s in range(3, STEPS + 1)] if noise is None else noise,
        engine=SimpleNamespace(first_gradients=default if gradients is None else gradients),
        updates=updates,
        quantized=object(),
        teacher=None,
        sampler=SimpleNamespace(in_modules=True),
        steps_made=STEPS,
    )


def failed(made: Any) -> list[str]:
    return [check.name for check in run_checks(made) if not check.ok]


def test_a_run_that_did_everything_passes() -> None:
    assert failed(learner()) == []
    raise_failed(run_checks(learner()))


@pytest.mark.parametrize(
    "noise",
    [
        [],
        [record(s, sigma=0.0, norms_changed=0, norms_expected=0) for s in range(3, 7)],
        [record(s) for s in range(3, 6)],
        [record(s, norms_changed=4) for s in range(3, 7)],
        [record(s) for s in range(2, 7)],
        [record(s, phase="training") for s in range(3, 7)],
    ],
    ids=["no record", "all clean", "one step short", "one norm short", "too early", "other phase"],
)
def test_noise_that_did_not_follow_the_schedule_fails(noise: list[dict[str, Any]]) -> None:
    assert failed(learner(noise=noise)) == ["noise reaches the norms in rollout"]


def test_an_inert_stage_is_no_failure() -> None:
    noise = [record(s) for s in range(3, 6)] + [record(6, norms_changed=0, inert=True)]
    assert failed(learner(noise=noise)) == []


def test_fine_tuning_is_checked_in_training() -> None:
    sections = {"train": {"method": "sft"}, "noise": {**NOISE, "apply_during": "training"}}
    assert failed(learner(sections)) == ["noise reaches the norms in training"]
    noise = [record(s, phase="training") for s in range(3, 7)]
    assert failed(learner(sections, noise)) == []


@pytest.mark.parametrize(
    ("gradients", "updates"),
    [({}, 0), ({}, 3), ({"layers.0.q_proj.lora_B.default.weight": 0.0}, 3)],
    ids=["no update", "no gradient", "one is zero"],
)
def test_an_arm_that_learnt_nothing_fails(gradients: dict[str, float], updates: int) -> None:
    made = learner(gradients=gradients, updates=updates)
    with pytest.raises(AuditError, match="adapters receive a gradient"):
        raise_failed(run_checks(made))


def test_without_the_estimator_the_zeros_are_expected_and_the_leak_is_told() -> None:
    sections = {"quant": {"use_ste": False, "lora_input": "quantised"}}
    zero = {"layers.0.q_proj.lora_B.w": 0.0, "layers.0.down_proj.lora_B.w": 0.25}
    made = learner(sections, gradients=zero)
    assert failed(made) == []
    assert "leak up to 0.25" in run_checks(made)[-1].measured
    leaking = zero | {"layers.0.q_proj.lora_B.w": 1e-9}
    assert len(failed(learner(sections, gradients=leaking))) == 1


def test_without_the_estimator_behind_the_wrapper_nothing_may_learn() -> None:
    quant = {"use_ste": False, "injection_point": "weight_output", "lora_output": "quantised"}
    assert failed(learner({"quant": quant}, gradients={})) == []
    leaking = {"layers.0.o_proj.lora_B.w": 1e-9}
    assert len(failed(learner({"quant": quant}, gradients=leaking))) == 1
    assert len(failed(learner({"quant": quant}, gradients={}, updates=0))) == 1


def test_multipliers_that_do_not_reach_their_layer_fail_the_audit() -> None:
    found = SimpleNamespace(
        first_step=2, expected={"0": 1.0, "1": 2.0}, measured={"0": 1.0, "1": 1.0}, off=["1"]
    )
    made = learner({"noise": {**NOISE, "layers": {"layer_multipliers": {1: 2.0}}}})
    made.aqn.check_multipliers = lambda: [found]
    assert failed(made) == ["noise multipliers by layer from step 3 on"]
    found.off = []
    assert failed(made) == []
    assert "1: 2" in next(c for c in run_checks(made) if "multipliers" in c.name).expected
