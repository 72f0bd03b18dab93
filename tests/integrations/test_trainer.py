"""transformers' Trainer with the callback trains the same numbers as a loop of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from npu_qat.config import NoiseConfig, Recipe
from npu_qat.deploy import read_adapter
from npu_qat.integrations import QATCallback
from npu_qat.layers import AuditError, QuantizedModel, load_lora, prepare_model
from npu_qat.noise import AQN, NoiseError
from tests.integrations.setting import (
    LORA,
    NOISE,
    Rows,
    adapters,
    arguments,
    equal,
    prepared,
)
from tests.training.launching import launch
from tests.training.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("no_process_group")

LR, STEPS, BATCH = 1e-2, 4, 4
ROLLOUT_NOISE = NOISE.model_copy(update={"apply_during": "rollout"})
# What both sides use where the Trainer's default is another optimizer or schedule.
PLAIN = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "learning_rate": LR}


class Recorded(Rows):
    """Rows that remember in which order they were read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        return super().__getitem__(index)


def train(
    folder: Path,
    noise: NoiseConfig | None = NOISE,
    *,
    rows: Rows | None = None,
    made: tuple[QuantizedModel, Any] | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    trainer: type[Trainer] = Trainer,
    resume: str | None = None,
    **changes: Any,
) -> Trainer:
    """Four steps with the callback; returns the trainer."""
    handle, model = made or prepared()
    trained = trainer(
        model,
        arguments(folder, **changes),
        train_dataset=rows or Rows(),
        eval_dataset=Rows(4, seed=9),
        callbacks=[QATCallback(handle, noise), *callbacks],
    )
    trained.train(resume_from_checkpoint=resume)
    return trained


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def audit(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "audit.json").read_text())
    return found


def batches(rows: Rows, order: list[int]) -> list[dict[str, torch.Tensor]]:
    """The trainer's batches, from the order in which it read the rows."""
    groups = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return [
        {key: torch.stack([rows[i][key] for i in group]) for key in rows[0]} for group in groups
    ]


# --- the same numbers as without a trainer ---------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_equal_those_of_a_plain_loop_bit_for_bit(tmp_path: Path, accumulation: int) -> None:
    rows = Recorded()
    trainer = train(tmp_path, rows=rows, gradient_accumulation_steps=accumulation, **PLAIN)
    order = rows.read[: STEPS * accumulation * BATCH]

    handle, model = prepared()
    aqn = AQN(model, NOISE, total_steps=STEPS, seed=trainer.args.seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0
    )
    micro = batches(rows, order)
    found = []
    model.train()
    for step in range(STEPS):
        of_step = micro[step * accumulation : (step + 1) * accumulation]
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in of_step)
        total = torch.tensor(0.0)
        with handle.phase("training"), aqn.applied(step, "training"):
            for batch in of_step:
                loss = model(**batch, num_items_in_batch=tokens).loss
                loss.backward()
                total += loss.detach()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total.item())
    assert losses(trainer) == found
    assert equal(adapters(trainer.model), adapters(model))


def test_a_step_equals_that_of_the_package_s_own_engine(tmp_path: Path) -> None:
    """Both in fp32; the two loss functions add up the tokens in another order."""
    rows = Recorded()
    trainer = train(tmp_path, rows=rows, made=prepared(dtype=torch.float32), **PLAIN)
    order = torch.tensor(rows.read[: STEPS * BATCH]).view(STEPS, BATCH)
    given, result = tmp_path / "rows.pt", tmp_path / "result.pt"
    torch.save({"steps": rows.ids[order], "seed": trainer.args.seed, "lr": LR}, given)
    launch(
        "python", 1, [str(Path(__file__).with_name("engine_worker.py")), str(given), str(result)]
    )
    own = torch.load(result)
    assert losses(trainer) == pytest.approx(own["losses"], rel=1e-6)
    theirs, ours = adapters(trainer.model), own["adapters"]
    assert theirs.keys() == ours.keys()
    assert max((theirs[n] - ours[n]).abs().max().item() for n in ours) < 1e-4


def test_the_callback_alone_changes_no_number(tmp_path: Path) -> None:
    with_it = train(tmp_path / "with", None)
    _, model = prepared()
    without = Trainer(model, arguments(tmp_path / "without"), train_dataset=Rows())
    without.train()
    assert losses(with_it) == losses(without)
    assert equal(adapters(with_it.model), adapters(model))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("storage", ["image", "packed"])
def test_gradient_checkpointing_changes_no_number(
    tmp_path: Path, reentrant: bool, storage: str
) -> None:
    recipe = Recipe(base_storage=storage)
    plain = train(tmp_path / "plain", made=prepared(recipe))
    recomputed = train(
        tmp_path / "recomputed",
        made=prepared(recipe),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert losses(plain) == losses(recomputed)
    assert equal(adapters(plain.model), adapters(recomputed.model))


def test_autocast_to_the_model_s_own_dtype_changes_no_number(tmp_path: Path) -> None:
    plain, mixed = train(tmp_path / "plain"), train(tmp_path / "mixed", bf16=True)
    assert losses(plain) == losses(mixed)
    assert equal(adapters(plain.model), adapters(mixed.model))


# --- when noise is on ------------------------------------------------------------------------


class NormSpy:
    """What the last norm of a model held in each forward pass."""

    def __init__(self, handle: QuantizedModel) -> None:
        self.norm = handle.model.get_submodule("model.norm")
        self.clean = self.norm.weight.detach().float().clone()
        self.seen: list[tuple[str, bool]] = []
        self.values: list[torch.Tensor] = []
        self.norm.register_forward_pre_hook(
            lambda module, args: self.note(handle._state.phase, module.weight.detach())
        )

    def note(self, phase: str, weight: torch.Tensor) -> None:
        self.seen.append((phase, torch.equal(weight.float(), self.clean)))
        self.values.append(weight.float().clone())


def test_noise_is_on_in_training_and_off_in_evaluation(tmp_path: Path) -> None:
    made = prepared()
    spy = NormSpy(made[0])
    trainer = train(
        tmp_path, made=made, eval_strategy="steps", eval_steps=2, eval_on_start=True, max_steps=4
    )
    assert {clean for phase, clean in spy.seen if phase == "training"} == {False}
    assert {clean for phase, clean in spy.seen if phase == "evaluation"} == {True}
    assert len(spy.seen) == 4 + 3  # training steps; start, step 2, step 4
    assert torch.equal(spy.norm.weight.float(), spy.clean)

    handle, model = prepared()
    aqn = AQN(model, NOISE, total_steps=4, seed=trainer.args.seed)
    with aqn.applied(0, "training"):
        expected = handle.model.get_submodule("model.norm").weight.clone()
    training = [
        v for v, (phase, _) in zip(spy.values, spy.seen, strict=True) if phase != "evaluation"
    ]
    assert torch.equal(training[0], expected)


class Sampling(Trainer):
    """A trainer that samples from the model in each step, as trainers for RL do."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            prompts = inputs["input_ids"][:, :4]
            model.generate(prompts, max_new_tokens=2, pad_token_id=0, do_sample=False)
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("during", "noisy"),
    [("rollout", {"rollout"}), ("training", {"training"}), ("both", {"rollout", "training"})],
)
def test_noise_is_on_in_the_phases_that_were_asked_for(
    tmp_path: Path, during: str, noisy: set[str]
) -> None:
    made = prepared()
    spy = NormSpy(made[0])
    noise = NOISE.model_copy(update={"apply_during": during})
    trainer = train(tmp_path, noise, made=made, trainer=Sampling, eval_strategy="epoch")
    phases = {phase for phase, _ in spy.seen}
    assert phases == {"training", "rollout", "evaluation"}
    for phase in phases:
        assert {clean for p, clean in spy.seen if p == phase} == {phase not in noisy}, phase
    found = audit(tmp_path)
    assert found["verdict"] == "pass"
    assert found["evidence"]["rollout_steps"] == [1, 2, 3, 4]
    assert {row["phase"] for row in found["noise"]["steps"] if row["sigma"] > 0} == noisy
    # Afterwards the model's own method is back, and a call of it is an evaluation.
    assert "generate" not in made[0].model.__dict__
    spy.seen.clear()
    trainer.model.generate(torch.tensor([[5, 6]]), max_new_tokens=1, pad_token_id=0)
    assert set(spy.seen) == {("evaluation", True)}


def test_a_recipe_for_rollouts_leaves_training_in_16_bits(tmp_path: Path) -> None:
    made = prepared(Recipe(apply_during="rollout"))
    train(tmp_path, None, made=made, trainer=Sampling)
    calls = [layer.calls for layer in made[0].layers.values()]
    assert all(c.quantized["rollout"] == c.total["rollout"] > 0 for c in calls)
    assert all(c.quantized["training"] == 0 < c.total["training"] for c in calls)


def test_log_lines_and_the_callbacks_that_follow_show_the_noise(tmp_path: Path) -> None:
    seen = []

    class Follower(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(dict(kwargs["logs"]))

    trainer = train(tmp_path, callbacks=(Follower(),), eval_strategy="steps", eval_steps=2)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["noise/sigma"] for line in lines] == [0.05, 0.05, 0.01, 0.01]
    assert all(line["noise/norms_changed"] == 5 for line in lines)
    assert all(abs(x["noise/sigma_realized"] / x["noise/sigma"] - 1) < 0.2 for x in lines)
    assert [x["noise/sigma"] for x in seen if "loss" in x] == [0.05, 0.05, 0.01, 0.01]
    assert not any("noise/sigma" in x for x in seen if "eval_loss" in x)


# --- saving and resuming ---------------------------------------------------------------------


def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_base(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    trainer.save_model(str(tmp_path / "adapter"))
    base = tiny_model(dtype=torch.bfloat16)
    prepare_model(base, Recipe())
    fresh = load_lora(base, str(tmp_path / "adapter")).eval()
    ids = Rows().ids[:3]
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, trainer.model.eval()(ids).logits)
    assert set(read_adapter(tmp_path / "adapter").scaling.values()) == {LORA.alpha / LORA.r}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_continues_digit_for_digit(tmp_path: Path, accumulation: int) -> None:
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": accumulation,
    }
    whole = train(tmp_path / "whole", **settings)
    train(tmp_path / "parts", callbacks=(StopAt(2),), **settings)
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    resumed = train(tmp_path / "parts", resume=str(checkpoint), **settings)

    def numbers(trainer: Trainer) -> list[dict[str, float]]:
        names = ("step", "loss", "grad_norm", "learning_rate", "noise/sigma_realized")
        return [{k: x[k] for k in names} for x in trainer.state.log_history if "loss" in x]

    assert len(numbers(whole)) == 4
    assert numbers(whole) == numbers(resumed)
    assert equal(adapters(whole.model), adapters(resumed.model))
    found = audit(tmp_path / "parts")
    assert (found["evidence"]["first_step"], found["evidence"]["updates"]) == (0, 4)
    assert [row["step"] for row in found["noise"]["steps"]] == [1, 2, 3, 4]
    assert found["noise"]["steps"] == audit(tmp_path / "whole")["noise"]["steps"]


def test_without_earlier_evidence_a_resumed_audit_says_where_it_begins(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, callbacks=(StopAt(2),), **settings)
    (tmp_path / "audit.json").unlink()
    train(tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)
    found = audit(tmp_path)
    assert found["verdict"] == "pass"
    assert (found["evidence"]["first_step"], found["evidence"]["last_step"]) == (2, 4)


class StopAt(TrainerCallback):
    """Ends training after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_run_that_stops_early_is_judged_by_the_steps_it_made(tmp_path: Path) -> None:
    train(tmp_path, callbacks=(StopAt(3),))
    found = audit(tmp_path)
    assert (found["verdict"], found["evidence"]["last_step"]) == ("pass", 3)


# --- what must fail --------------------------------------------------------------------------


def test_a_layer_that_is_bypassed_fails_the_first_step(tmp_path: Path) -> None:
    handle, model = prepared()
    layer = next(iter(handle.layers.values()))
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)  # 16-bit inputs, not counted
    with pytest.raises(AuditError, match=r"q_proj in training: 0 of 0 calls"):
        train(tmp_path, made=(handle, model))
    assert audit(tmp_path)["verdict"] == "fail"
    assert audit(tmp_path)["evidence"]["last_step"] == 1


def test_a_frozen_weight_that_moves_fails_the_run(tmp_path: Path) -> None:
    handle, model = prepared()

    class Merge(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                next(iter(handle.layers.values())).weight_image.data[0, 0] += 1.0

    with pytest.raises(AuditError, match="frozen weights never change"):
        train(tmp_path, made=(handle, model), callbacks=(Merge(),))


def test_noise_for_rollouts_fails_in_a_trainer_that_has_none(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="a trainer that never generates has none"):
        train(tmp_path, ROLLOUT_NOISE)


def test_adapters_without_a_gradient_fail_the_run(tmp_path: Path) -> None:
    handle, model = prepared()
    for name, parameter in model.named_parameters():
        if "layers.1.mlp.up_proj.lora_B" in name:
            parameter.register_hook(torch.zeros_like)
    with pytest.raises(AuditError, match=r"13 of 14 adapters.*up_proj"):
        train(tmp_path, made=(handle, model))


def test_an_interrupted_step_is_refused_until_it_is_restored(tmp_path: Path) -> None:
    handle, model = prepared()
    spy = NormSpy(handle)

    class Interrupting(Trainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, *args, **kwargs)
            if model.training:
                raise KeyboardInterrupt
            return loss

    callback = QATCallback(handle, NOISE)
    trainer = Interrupting(
        model, arguments(tmp_path), train_dataset=Rows(), eval_dataset=Rows(4), callbacks=[callback]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(NoiseError, match=r"inside step 1.*restore\(\)"):
        trainer.evaluate()
    callback.restore()
    assert torch.equal(spy.norm.weight.float(), spy.clean)
    spy.seen.clear()
    trainer.evaluate()
    assert set(spy.seen) == {("evaluation", True)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_vllm": True}, "use_vllm: TRL merges.*use_vllm=False"),
        ({"use_transformers_continuous_batching": True}, "continuous_batching: .*to False"),
        ({"torch_compile": True}, "torch_compile"),
        ({"_n_gpu": 2}, "DataParallel.*torchrun"),
        ({"fsdp": ["full_shard"]}, "ZeRO-3 and FSDP"),
    ],
)
def test_settings_that_bypass_the_layers_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    handle, model = prepared()
    args = arguments(tmp_path)
    _ = args.device  # decides n_gpu
    for name, value in change.items():
        object.__setattr__(args, name, value)
    callback = QATCallback(handle)
    with pytest.raises(ValueError, match=message):
        callback.on_init_end(args, None, None)
    with pytest.raises(ValueError, match=message):
        callback.on_train_begin(args, None, None, model=model)


def test_models_that_cannot_train_as_the_recipe_says_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bf16.*prepared in torch.float32; load the model"):
        train(tmp_path, None, made=prepared(dtype=torch.float32), bf16=True)
    with pytest.raises(ValueError, match="static scales that are not set"):
        train(tmp_path, None, made=prepared(Recipe(activation_profile="nvfp4")))
    handle, model = prepared()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing .* trainable.*add_lora"):
        QATCallback(handle).on_train_begin(arguments(tmp_path), None, None, model=model)


def test_peft_s_own_layer_is_refused_where_the_recipe_needs_ours(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model(dtype=torch.bfloat16)
    handle = prepare_model(model, Recipe(lora_input="quantised"))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"lora_input and lora_output.*add_lora"):
        train(tmp_path, None, made=(handle, adapted))


def test_noise_on_a_model_without_norms_fails_at_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    handle = prepare_model(model, Recipe(exclude=()))
    with pytest.raises(NoiseError, match="no RMSNorm"):
        QATCallback(handle, NOISE)
