"""Steps, stopping, resuming, bad numbers: what surrounds both methods."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_qat.config import RunConfig, TrainConfig
from npu_qat.training import dapo as dapo_module
from npu_qat.training.engine import TrainingError
from npu_qat.training.loop import Interrupted, Learner, learning_rate, total_steps
from tests.training.learning import adapters, make_learner, run_config

pytestmark = pytest.mark.usefixtures("one_process")

TIMINGS = {"time", "seconds", "rollout_seconds", "update_seconds", "tokens_per_second"}


def reward_by_length(text: str, problem: object) -> float:
    """A reward that a random model gets about half of the time."""
    return float(len(text) % 2)


@pytest.fixture(autouse=True)
def learnable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dapo_module, "accuracy_reward", reward_by_length)


def metrics(learner: Learner) -> list[dict[str, Any]]:
    """The metrics without what a clock decides."""
    text = (learner.rundir.path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def samples(learner: Learner) -> list[dict[str, Any]]:
    text = (learner.rundir.path / "samples.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def assert_same_state(a: Learner, b: Learner) -> None:
    first, second = a.engine.state(), b.engine.state()
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert a.updates == b.updates
    assert a.method.state() == b.method.state()


# --- numbers --------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_stays() -> None:
    train = TrainConfig(lr=1e-5, warmup_steps=10)
    rates = [learning_rate(train, step, 29) for step in range(29)]
    assert rates[:10] == pytest.approx([1e-6 * (i + 1) for i in range(10)])
    assert set(rates[9:]) == {1e-5}


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(TrainConfig(lr=2e-5, warmup_steps=0), 0, 5) == 2e-5


def test_the_cosine_starts_after_the_warm_up_and_falls_towards_zero() -> None:
    train = TrainConfig(lr=1.0, warmup_steps=2, lr_schedule="cosine")
    rates = [learning_rate(train, step, 12) for step in range(12)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[7] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] > 0
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.9)))


def test_a_warm_up_longer_than_the_run_is_a_ramp() -> None:
    train = TrainConfig(lr=1.0, warmup_steps=10, lr_schedule="cosine")
    assert [learning_rate(train, step, 3) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("sections", "problems", "steps"),
    [
        ({}, 7473, 29),  # the plan: 256 prompts a step
        ({"train": {"epochs": 2}}, 7473, 58),
        ({"train": {"steps": 7}}, 7473, 7),
        ({"train": {"method": "sft"}, "sft": {"batch_size": 64}}, 7473, 116),
        (
            {
                "dapo": {
                    "dynamic_sampling": False,
                    "prompts_per_rollout": 128,
                    "generation_prompts": 128,
                }
            },
            7473,
            58,
        ),
        ({"train": {"epochs": 3}}, 100, 1),
    ],
)
def test_total_steps(sections: dict[str, Any], problems: int, steps: int) -> None:
    assert total_steps(RunConfig.model_validate(sections), problems) == steps


def test_fewer_problems_than_a_step_needs_is_an_error() -> None:
    with pytest.raises(ValueError, match="255 training problems are fewer than one step's 256"):
        total_steps(RunConfig(), 255)


# --- problems -------------------------------------------------------------------------------


def test_every_problem_comes_once_an_epoch_in_a_new_order(tmp_path: Path) -> None:
    learner = make_learner(tmp_path)
    size = len(learner.task.train)
    epochs = [[p.id for p in learner.training_problems(e * size, size)] for e in range(3)]
    for order in epochs:
        assert len(set(order)) == size
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [p.id for p in learner.task.train]


def test_problems_depend_on_the_position_alone(tmp_path: Path) -> None:
    """Whatever was asked for before: peeks ahead, jumps back, runs over epoch ends."""
    wanted = [p.id for p in make_learner(tmp_path / "a").training_problems(0, 200)]
    learner = make_learner(tmp_path / "b")
    for start, count in ((150, 30), (0, 7), (35, 10), (120, 5), (39, 90), (80, 1), (0, 200)):
        found = [p.id for p in learner.training_problems(start, count)]
        assert found == wanted[start : start + count]


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    first = make_learner(tmp_path / "a").training_problems(0, 20)
    second = make_learner(tmp_path / "b", run_config(run={"seed": 1})).training_problems(0, 20)
    assert [p.id for p in first] != [p.id for p in second]


@pytest.mark.parametrize("method", ["sft", "dapo"])
def test_an_epoch_of_steps_trains_on_every_problem_once(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(
        tmp_path,
        run_config(
            train={"method": method, "steps": 10 if method == "dapo" else 5},
            rollout={"max_new_tokens": 2, "num_generations": 2},
            dapo={"overlong_buffer": 2},
        ),
    )
    trained: Counter[str] = Counter()
    encode = learner.encode

    def watch(problem: Any) -> list[int]:
        trained[problem.id] += 1
        return encode(problem)

    monkeypatch.setattr(learner, "encode", watch)
    learner.run(resume=False)
    assert len(trained) == len(learner.task.train) == 40
    assert set(trained.values()) == {1}


def test_a_prompt_that_is_too_long_is_named(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, run_config(rollout={"max_prompt_tokens": 5}))
    problem = learner.task.train[0]
    with pytest.raises(ValueError, match=rf"{problem.id} has a prompt of \d+ tokens, above"):
        learner.encode(problem)


# --- supervised -----------------------------------------------------------------------------


def test_supervised_loss_is_the_mean_over_the_answers_tokens(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, run_config(train={"method": "sft", "micro_batch_size": 3}))
    problems = learner.training_problems(0, 8)
    total, count = 0.0, 0
    for problem in problems:
        prompt = learner.encode(problem)
        answer = learner.encode_answer(problem.solution)
        assert answer[-1] == learner.tokenizer.eos_token_id
        assert learner.decode(answer) == problem.solution
        with torch.no_grad():
            logits = learner.engine.model(input_ids=torch.tensor([prompt + answer])).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        total -= float(logp.gather(-1, torch.tensor(answer)[:, None]).sum())
        count += len(answer)
    found = learner.method.step(0)
    assert found["loss"] == pytest.approx(total / count, rel=1e-4)
    assert learner.updates == 1 and learner.method.cursor == 8


def test_supervised_training_learns(tmp_path: Path) -> None:
    config = run_config(
        train={"method": "sft", "steps": 15, "lr": 0.02}, task={"train_size": 8, "levels": [1]}
    )
    learner = make_learner(tmp_path, config)
    learner.run(resume=False)
    losses = [line["loss"] for line in metrics(learner)]
    assert losses[-1] < losses[0] - 0.5


def test_an_example_that_is_too_long_is_named(tmp_path: Path) -> None:
    config = run_config(train={"method": "sft"}, sft={"max_tokens": 20})
    with pytest.raises(ValueError, match=r"has \d+ tokens with its solution, above sft.max_tokens"):
        make_learner(tmp_path, config).method.step(0)


# --- bad numbers ----------------------------------------------------------------------------


def poison(learner: Learner, name: str) -> None:
    with torch.no_grad():
        learner.engine.model.get_parameter(name).flatten()[3] = float("nan")


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        (
            "base_model.model.model.layers.1.self_attn.v_proj.lora_A.default.weight",
            "layers.1.self_attn.v_proj.lora_A.default",
        ),
        (
            "base_model.model.model.layers.0.post_attention_layernorm.weight",
            "layers.0.post_attention_layernorm",
        ),
        (
            "base_model.model.model.layers.1.mlp.down_proj.base_layer.weight_image",
            "layers.1.mlp.down_proj.base_layer",
        ),
    ],
)
def test_a_nan_loss_names_the_step_and_the_first_bad_module(
    parameter: str, module: str, tmp_path: Path
) -> None:
    learner = make_learner(tmp_path, run_config(train={"method": "sft", "steps": 5}))
    learner.method.step(0)
    poison(learner, parameter)
    before = adapters(learner)
    with pytest.raises(TrainingError, match=rf"step 2: the loss is nan; .*is \S*{module}\. No"):
        learner.method.step(1)
    after = adapters(learner)
    assert all(torch.equal(before[k], after[k]) or "v_proj" in k for k in before)


def test_a_bad_gradient_stops_without_an_update(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, run_config(train={"method": "sft"}))
    layer = learner.engine.model.base_model.model.model.layers[0].mlp
    layer.register_full_backward_hook(
        lambda module, grads, outputs: tuple(g * float("inf") for g in grads)
    )
    before = learner.engine.state()
    with pytest.raises(TrainingError, match=r"step 1: the gradient of \S+lora_\S+ is NaN or Inf"):
        learner.method.step(0)
    after = learner.engine.state()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_gap_between_rollout_and_training_stops(tmp_path: Path) -> None:
    """Quantisers in one of the two phases: two different models."""
    config = run_config(quant={"apply_during": "training"}, dapo={"updates_per_rollout": 1})
    learner = make_learner(tmp_path, config)
    with pytest.raises(TrainingError, match=r"step 1: with noise off, .*differ by .*apply_during"):
        learner.run(resume=False)


def test_the_same_modules_in_both_phases_have_no_gap(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, live=True)
    learner.run(resume=False)
    for line in metrics(learner):
        assert line["logp_gap_off_max"] < 1e-3


# --- noise ----------------------------------------------------------------------------------

NOISE = {
    "enabled": True,
    "sigma_start": 0.2,
    "sigma_end": 0.1,
    "num_stages": 3,
    "zero_first_stage": True,
}


@pytest.mark.parametrize("apply_during", ["rollout", "training", "both"])
def test_noise_is_in_its_phases_is_recorded_and_does_not_gate(
    apply_during: str, tmp_path: Path
) -> None:
    config = run_config(noise={**NOISE, "apply_during": apply_during})
    learner = make_learner(tmp_path, config, live=True)
    norms = learner.engine.model.state_dict()
    clean = {n: t.clone() for n, t in norms.items() if n.endswith("norm.weight")}
    learner.run(resume=False)
    for name, tensor in clean.items():
        assert torch.equal(learner.engine.model.state_dict()[name], tensor)
    first, *noisy = metrics(learner)
    assert first["sigma"] == 0.0 and first["norms_changed"] == 0
    assert first["logp_gap_off_max"] < 1e-3 and "logp_gap_on_mean" not in first
    for line in noisy:
        assert line["norms_changed"] == 5
        assert line["sigma_realized"] == pytest.approx(line["sigma"], rel=0.3)
        assert line["logp_gap_off_max"] < 1e-3, "the gate measures without noise"
        # The same noise in both phases is the same model again.
        assert (line["logp_gap_on_mean"] > 1e-2) == (apply_during != "both")
    phases = Counter(r["phase"] for r in learner.noise_records if r["norms_changed"])
    wanted = {"both": {"rollout", "training"}}.get(apply_during, {apply_during})
    assert set(phases) == wanted


def test_dropout_is_no_gap(tmp_path: Path) -> None:
    """pi_old is what the sampler could have seen: the model without dropout."""
    for updates in (1, 2):
        config = run_config(
            lora={"dropout": 0.5, "r": 4, "alpha": 64},
            dapo={"updates_per_rollout": updates},
            train={"steps": 1},
        )
        learner = make_learner(tmp_path / str(updates), config, live=True)
        learner.run(resume=False)
        assert learner.engine.model.training
        for line in metrics(learner):
            assert line["logp_gap_off_max"] < 1e-3


# --- dynamic sampling -----------------------------------------------------------------------


def dynamic(**dapo: Any) -> RunConfig:
    return run_config(
        dapo={
            "dynamic_sampling": True,
            "prompts_per_rollout": 4,
            "generation_prompts": 3,
            "max_generation_tries": 5,
            **dapo,
        }
    )


def by_problem(outcomes: dict[int, list[float]]) -> Callable[..., float]:
    """Reward of the n-th problem seen: constant or mixed, completion by completion."""
    seen: dict[str, int] = {}
    counts: Counter[str] = Counter()

    def reward(text: str, problem: Any) -> float:
        index = seen.setdefault(problem.id, len(seen))
        counts[problem.id] += 1
        return outcomes.get(index, [0.0])[(counts[problem.id] - 1) % len(outcomes.get(index, [0]))]

    return reward


def test_groups_that_teach_nothing_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed, right, wrong = [1.0, 0.0, 0.0, 1.0], [1.0] * 4, [0.0] * 4
    outcomes = dict(enumerate([right, mixed, wrong, mixed, wrong, mixed, mixed, right, mixed]))
    monkeypatch.setattr(dapo_module, "accuracy_reward", by_problem(outcomes))
    learner = make_learner(tmp_path, dynamic(updates_per_rollout=2))
    groups, found = learner.method._collect(0)
    assert [g.index for g in groups] == [1, 3, 5, 6]
    assert all(g.informative for g in groups)
    assert (found["generation_tries"], found["groups_seen"]) == (3, 9)
    assert (found["groups_kept"], found["groups_informative"]) == (4, 5)
    # What is reported is what was sampled, not what was kept.
    assert found["accuracy_train"] == pytest.approx((2 * 4 + 5 * 2) / 36)
    assert learner.method.cursor == 9


def test_the_filter_looks_at_the_accuracy_not_at_the_shaped_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties for length differ inside a group whose answers are all wrong."""
    monkeypatch.setattr(dapo_module, "accuracy_reward", lambda text, problem: 0.0)
    learner = make_learner(tmp_path, dynamic(max_generation_tries=2, overlong_buffer=10))
    groups, found = learner.method._collect(0)
    assert groups == [] and found["groups_seen"] == 6
    assert found["reward_mean"] < 0.0


def test_without_an_informative_group_there_is_no_update_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dapo_module, "accuracy_reward", lambda text, problem: 1.0)
    learner = make_learner(tmp_path, dynamic(max_generation_tries=2))
    before = learner.engine.state()
    learner.run(resume=False)
    after = learner.engine.state()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [line["groups_kept"] for line in metrics(learner)] == [0, 0, 0]
    assert "step 1: no update, since all of 6 groups" in learner.said[0]


def test_a_rollout_that_is_not_full_trains_on_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = [1.0, 0.0, 0.0, 1.0]
    monkeypatch.setattr(dapo_module, "accuracy_reward", by_problem({2: mixed}))
    learner = make_learner(tmp_path, dynamic(max_generation_tries=2, updates_per_rollout=4))
    found = learner.method.step(0)
    assert (found["groups_kept"], found["updates"]) == (1, 1)


def test_without_dynamic_sampling_every_group_trains_in_one_try(tmp_path: Path) -> None:
    learner = make_learner(tmp_path)
    groups, found = learner.method._collect(0)
    assert len(groups) == 4 and found["generation_tries"] == 1


# --- stopping and resuming ------------------------------------------------------------------


class StopAfter:
    """True from the n-th question on, until it is reset."""

    def __init__(self, questions: float) -> None:
        self.questions, self.count = questions, 0

    def __call__(self) -> bool:
        self.count += 1
        return self.count > self.questions


@pytest.mark.parametrize("method", ["dapo", "sft"])
def test_a_resumed_run_gives_the_same_numbers(method: str, tmp_path: Path) -> None:
    config = run_config(
        train={"method": method, "steps": 5, "checkpoint_every": 2, "keep_checkpoints": 2},
        noise={
            **NOISE,
            "num_stages": 5,
            "apply_during": "rollout" if method == "dapo" else "training",
        },
        lora={"r": 4, "alpha": 8, "dropout": 0.1},  # its random numbers resume, too
    )
    whole = make_learner(tmp_path / "whole", config)
    whole.run(resume=False)

    first = make_learner(tmp_path / "parts", config)

    def die(done: int, found: dict[str, Any]) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(resume=False, after_step=die)
    assert len(metrics(first)) == 3
    second = make_learner(tmp_path / "parts", config)
    second.run(resume=True)
    assert "going on after step 2 of 5" in second.said[0]
    assert metrics(second) == metrics(whole)
    assert_same_state(second, whole)
    if method == "dapo":
        assert samples(second) == samples(whole)
    # The evidence of the whole run, not of its last part.
    assert second.noise_records == whole.noise_records
    assert second.engine.first_gradients == whole.engine.first_gradients != {}
    third = make_learner(tmp_path / "parts", config)
    third.run(resume=True)  # finished: nothing to do
    assert metrics(third) == metrics(whole)
    assert_same_state(third, whole)


def test_a_stop_at_any_moment_is_a_checkpoint_that_resumes_to_the_same_numbers(
    tmp_path: Path,
) -> None:
    """In a rollout, in the measurement of the gap, between steps."""
    config = run_config(noise={**NOISE, "zero_first_stage": False})
    asked = StopAfter(math.inf)
    whole = make_learner(tmp_path / "whole", config, should_stop=asked)
    whole.run(resume=False)
    step = (asked.count - 1) // 3
    assert step > 10, "it should be asked for every token"
    # The first question, the last of a rollout, those about the gap, the one after the step.
    for questions in (0, 1, step - 3, step - 2, step - 1, 2 * step + 1):
        folder = tmp_path / str(questions)
        first = make_learner(folder, config, should_stop=StopAfter(questions))
        with pytest.raises(Interrupted, match=r"stopped after step \d of 3"):
            first.run(resume=False)
        second = make_learner(folder, config)
        second.run(resume=True)
        assert metrics(second) == metrics(whole)
        assert samples(second) == samples(whole)
        assert_same_state(second, whole)


def test_a_second_stop_right_after_a_resume_loses_nothing(tmp_path: Path) -> None:
    config = run_config(train={"keep_checkpoints": 1})
    whole = make_learner(tmp_path / "whole", config)
    whole.run(resume=False)
    for questions in (17, 0, 0, 3):
        learner = make_learner(tmp_path / "parts", config, should_stop=StopAfter(questions))
        with pytest.raises(Interrupted):
            learner.run(resume=True)
        assert len(list(learner.checkpoints.glob("step-*"))) == 1
    last = make_learner(tmp_path / "parts", config)
    last.run(resume=True)
    assert metrics(last) == metrics(whole)
    assert_same_state(last, whole)


def test_what_happens_after_a_step_happens_before_its_checkpoint(tmp_path: Path) -> None:
    """Else a kill between the two would lose an evaluation for good."""
    learner = make_learner(tmp_path, run_config(train={"steps": 2, "checkpoint_every": 1}))
    seen = []

    def after(done: int, found: dict[str, Any]) -> None:
        seen.append((done, sorted(p.name for p in learner.checkpoints.glob("step-*"))))

    learner.run(resume=False, after_step=after)
    assert seen == [(1, []), (2, ["step-000001"])]


def test_a_damaged_checkpoint_costs_steps_not_numbers(tmp_path: Path) -> None:
    config = run_config(train={"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 3})
    whole = make_learner(tmp_path / "whole", config)
    whole.run(resume=False)
    first = make_learner(tmp_path / "parts", config)
    first.run(resume=False)
    newest = sorted(first.checkpoints.glob("step-*"))[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-4])
    second = make_learner(tmp_path / "parts", config)
    second.run(resume=True)
    assert "step-000004 is damaged" in second.said[0]
    assert "going on after step 3 of 4" in second.said[1]
    assert metrics(second) == metrics(whole)
    assert_same_state(second, whole)


def test_a_checkpoint_does_not_depend_on_the_stage(tmp_path: Path) -> None:
    """Written at stage 0 and read at another one, in a process that never made an update."""
    train = {"steps": 3, "checkpoint_every": 2}
    whole = make_learner(tmp_path / "0", run_config(train=train), live=True)
    whole.run(resume=False)
    wanted = whole.engine.state()
    shutil.rmtree(whole.checkpoints / "step-000003")
    for stage in (1, 2, 3):
        shutil.copytree(tmp_path / "0", tmp_path / str(stage))
        config = run_config(train=train, deepspeed={"zero_stage": stage})
        learner = make_learner(tmp_path / str(stage), config)
        learner.run(resume=True)
        assert "going on after step 2 of 3" in learner.said[0]
        found = learner.engine.state()
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-6)


def test_metrics_have_what_the_reports_read(tmp_path: Path) -> None:
    learner = make_learner(tmp_path)
    learner.run(resume=False)
    text = (tmp_path / "metrics.jsonl").read_text()
    for line in map(json.loads, text.splitlines()):
        assert line.keys() >= {
            *("arm", "step", "time", "reward_mean", "accuracy_train", "groups_kept"),
            *("groups_seen", "generation_tries", "completion_length_mean", "truncated_fraction"),
            *("loss", "grad_norm", "lr", "clip_fraction_low", "clip_fraction_high"),
            *("logp_gap_off_mean", "logp_gap_off_max", "tis_weight_mean", "sigma"),
            *("norms_changed", "sigma_realized", "rollout_seconds", "update_seconds"),
            "tokens_per_second",
        }
    assert {s["step"] for s in samples(learner)} == {1, 2, 3}
    assert samples(learner)[0].keys() == {
        *("arm", "step", "question", "completion", "reward", "strict", "target")
    }
