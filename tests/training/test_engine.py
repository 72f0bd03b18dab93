"""The engine: launch, gradients, bad gradients, state, and what may be configured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from npu_qat.config import DeepSpeedSection, TrainConfig
from npu_qat.training import engine as module
from npu_qat.training.engine import (
    Engine,
    TrainingError,
    _is_launched,
    launch_environment,
    shut_down,
    world,
)
from tests.training.launching import RENDEZVOUS, environment
from tests.training.learning import adapters, make_learner, run_config

pytestmark = pytest.mark.usefixtures("one_process")


class Small(nn.Module):
    """A frozen linear, two trained vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).bfloat16().requires_grad_(False)
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.b = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a * x).sum() + self.b.sum()


def small(**train: object) -> Engine:
    settings = {"lr": 0.1, "weight_decay": 0.0, "max_grad_norm": 1e9} | train
    return Engine(Small(), TrainConfig(**settings), DeepSpeedSection())


def update(engine: Engine, *rows: list[float]) -> float:
    """One update whose loss is the sum over ``rows`` of ``a . row + b``."""
    for i, row in enumerate(rows):
        last = i == len(rows) - 1
        engine.backward(engine.ds(torch.tensor(row)), last=last)
        if not last:
            engine.between_micro_batches()
    return engine.step()


def test_one_process_needs_no_launcher() -> None:
    assert world() == (0, 1)
    launch_environment(torch.device("cpu"))  # a second call is harmless


def test_programs_started_from_here_are_not_taken_for_ranks() -> None:
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ)


def test_a_single_process_chooses_no_port() -> None:
    """Of forty that start at once, two would now and then find the same one free."""
    code = """
import torch
from torch.distributed import rendezvous
rendezvous.TCPStore = None
from npu_qat.training.engine import launch_environment, world
launch_environment(torch.device("cpu"))
torch.distributed.barrier()
assert world() == (0, 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_half_a_launchers_variables_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    assert not _is_launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not _is_launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"MASTER_ADDR and MASTER_PORT are not set.*torchrun"):
        _is_launched()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"RANK": "1"}, "RANK is '1', but WORLD_SIZE and"),
        ({"RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', but"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK is 'x'"),
        ({"RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is '1'"),
        ({"RANK": "0", "WORLD_SIZE": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "SIZE is '0'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "PORT is 'x'"),
    ],
)
def test_one_of_several_never_takes_itself_for_the_only_one(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], told: str
) -> None:
    """Each would train all of it and write into the same folder, or wait for nobody."""
    for name in RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{told}.*torchrun"):
        _is_launched()


def test_a_process_may_carry_out_several_runs() -> None:
    for _ in range(2):
        shut_down()
        launch_environment(torch.device("cpu"))
        update(small(), [1.0, 2.0, 3.0])


def test_micro_batches_add_up() -> None:
    engine = small(lr=0.0001)
    norm = update(engine, [1.0, 0.0, 2.0], [0.0, 2.0, 0.0], [3.0, 0.0, 0.0])
    # a: (4, 2, 2); b: 3
    assert norm == pytest.approx((16 + 4 + 4 + 9) ** 0.5)
    assert update(engine, [1.0, 0.0, 0.0]) == pytest.approx(2**0.5), "gradients were not cleared"


def test_the_update_is_adamw() -> None:
    engine = small(weight_decay=0.1, beta1=0.8, beta2=0.95, max_grad_norm=1.5)
    reference = Small()
    optimizer = torch.optim.AdamW(
        [reference.a, reference.b], lr=0.1, weight_decay=0.1, betas=(0.8, 0.95)
    )
    for lr, rows in ((0.1, [[1.0, 0.0, 2.0], [0.0, 2.0, 1.0]]), (0.03, [[-1.0, 0.5, 0.0]])):
        engine.set_lr(lr)
        optimizer.param_groups[0]["lr"] = lr
        norm = update(engine, *rows)
        optimizer.zero_grad()
        sum(reference(torch.tensor(row)) for row in rows).backward()
        wanted = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.5)
        optimizer.step()
        assert norm == pytest.approx(float(wanted), rel=1e-6)
    for name, parameter in engine.trainable.items():
        torch.testing.assert_close(
            parameter.detach(), getattr(reference, name).detach(), rtol=1e-5, atol=1e-6
        )


def test_frozen_parameters_and_dtypes_are_left_alone() -> None:
    engine = small()
    before = engine.model.frozen.weight.clone()
    update(engine, [1.0, 1.0, 1.0])
    assert torch.equal(engine.model.frozen.weight, before)
    assert engine.model.frozen.weight.dtype == torch.bfloat16
    assert {p.dtype for p in engine.trainable.values()} == {torch.float32}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_stops_and_updates_nothing(bad: float) -> None:
    engine = small()
    update(engine, [1.0, 1.0, 1.0])
    before = {n: p.detach().clone() for n, p in engine.trainable.items()}
    state = engine.state()
    with pytest.raises(TrainingError, match=r"gradient of a is NaN or Inf; no update was made"):
        update(engine, [1.0, 1.0, 1.0], [1.0, bad, 1.0], [1.0, 1.0, 1.0])
    for name, parameter in engine.trainable.items():
        assert torch.equal(parameter, before[name])
    after = engine.state()
    assert all(torch.equal(after[k], state[k]) for k in state)


def test_a_norm_that_overflows_is_a_bad_gradient_too() -> None:
    """Each element is finite, the norm is not: clipping by it would zero the whole update."""
    engine = small(max_grad_norm=1.0)
    before = engine.trainable["a"].detach().clone()
    with pytest.raises(TrainingError, match="norm of the gradient is inf"):
        update(engine, [3e38, 3e38, 3e38])
    assert torch.equal(engine.trainable["a"], before)


def test_the_first_updates_gradients_are_kept_as_evidence() -> None:
    engine = small()
    update(engine, [1.0, -5.0, 2.0], [0.0, 1.0, 0.0])
    assert engine.first_gradients == {"a": 5.0, "b": 1.0}
    update(engine, [9.0, 9.0, 9.0])
    assert engine.first_gradients == {"a": 5.0, "b": 1.0}


def test_a_loss_scale_changes_nothing_but_the_range_of_gradients() -> None:
    """In fp16 small gradients vanish on their way; the power of two is taken away at the end."""
    plain, scaled = small(max_grad_norm=1.0), small(max_grad_norm=1.0, loss_scale=1024.0)
    for row in ([1.0, -5.0, 2.0], [0.5, 0.25, 1.0]):
        assert update(scaled, row) == update(plain, row)
    assert scaled.first_gradients == plain.first_gradients
    a, b = plain.state(), scaled.state()
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(
        TrainingError, match=r"gradient of a is .*lower .*train.loss_scale \(1024\)"
    ):
        update(scaled, [1e38, 0.0, 0.0])


def test_an_update_without_any_gradient_is_no_evidence() -> None:
    """All rewards of its groups were equal. Were it taken, the audit would fail at the end."""
    engine = small(weight_decay=0.0)
    engine.backward(engine.ds(torch.tensor([1.0, 1.0, 1.0])) * 0.0, last=True)
    engine.step()
    assert engine.first_gradients == {}
    update(engine, [1.0, -5.0, 2.0])
    assert engine.first_gradients == {"a": 5.0, "b": 1.0}


def test_the_state_makes_a_round_trip_and_training_goes_on_the_same() -> None:
    first, second = small(), small()
    rows = [[1.0, 0.0, 2.0], [0.5, -2.0, 1.0], [2.0, 2.0, 2.0]]
    for row in rows[:2]:
        update(first, row)
    state = first.state()
    assert set(state) == {f"{n}{k}" for n in "ab" for k in ("", "/exp_avg", "/exp_avg_sq")}
    second.load_state(state, 2)
    update(first, rows[2])
    update(second, rows[2])
    a, b = first.state(), second.state()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(state["a"], a["a"]), "the state is a copy"


def test_a_fresh_engine_has_a_state_of_zeros() -> None:
    state = small().state()
    assert state["a/exp_avg"].tolist() == [0.0, 0.0, 0.0]


def test_the_state_of_another_model_is_refused() -> None:
    state = small().state()
    del state["b"]
    state["c"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"does not fit this model: 2 differing entries.* is b"):
        small().load_state(state, 1)


def test_a_state_of_another_shape_is_refused() -> None:
    """Adapters of another rank have the same names, and rank 1 would be broadcast to all."""
    state = small().state()
    state["a"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"does not fit this model: a has the shape \(1,\)"):
        small().load_state(state, 1)


def test_generation_sees_the_module_in_evaluation_mode_and_puts_it_back() -> None:
    engine = small()
    engine.model.train()
    with engine.for_generation() as model:
        assert model is engine.model and not model.training
    assert engine.model.training
    with pytest.raises(KeyError), engine.for_generation():
        raise KeyError
    assert engine.model.training


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_generation_sees_a_model_without_hooks_and_training_gets_them_back(stage: int) -> None:
    """A model with hooks is decoded without CUDA graphs, several times slower."""
    engine = Engine(Small(), TrainConfig(), DeepSpeedSection(zero_stage=stage))

    def hooks() -> int:
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules()
        )

    before = hooks()
    assert before >= 2
    with engine.for_generation():
        assert hooks() == 0
    # At stage 3 the hook that resets DeepSpeed's trace stays off: the trace was invalidated.
    assert hooks() == (before if stage < 3 else before - 1)


# --- configuration --------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(module._RESERVED))
def test_keys_that_the_program_decides_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"deepspeed.overrides: '{key}' is decided"):
        Engine(Small(), TrainConfig(), DeepSpeedSection(overrides={key: {}}))


def test_the_stage_is_set_in_one_place() -> None:
    overrides = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match=r"deepspeed.zero_stage, not by overrides"):
        Engine(Small(), TrainConfig(), DeepSpeedSection(zero_stage=1, overrides=overrides))


def test_other_keys_reach_deepspeed() -> None:
    section = DeepSpeedSection(
        zero_stage=2, overrides={"zero_optimization": {"reduce_bucket_size": 12345}}
    )
    engine = Engine(Small(), TrainConfig(), section)
    assert engine.ds.zero_reduce_bucket_size() == 12345
    assert section.overrides == {"zero_optimization": {"reduce_bucket_size": 12345}}


def test_a_model_without_trained_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="add adapters first"):
        Engine(Small().requires_grad_(False), TrainConfig(), DeepSpeedSection())


# --- stages, on one process -----------------------------------------------------------------


def test_every_stage_trains_checkpoints_and_generates_alike(tmp_path: Path) -> None:
    found = []
    for stage in range(4):
        config = run_config(deepspeed={"zero_stage": stage}, train={"steps": 2})
        learner = make_learner(tmp_path / str(stage), config, live=True)
        learner.run(resume=False)
        assert learner.updates > 0
        with learner.engine.gathered():
            found.append((learner.engine.state(), adapters(learner)))
    plain, plain_final = found[0]
    for state, final in found[1:]:
        assert state.keys() == plain.keys()
        for key in plain:
            torch.testing.assert_close(state[key], plain[key], rtol=1e-4, atol=1e-6)
        for name in plain_final:
            torch.testing.assert_close(final[name], plain_final[name], rtol=1e-4, atol=1e-6)
