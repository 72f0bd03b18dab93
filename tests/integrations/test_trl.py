"""TRL's trainers on a prepared model: the same loss, noise while generating, refusals that say why.

The demo model, since TRL wants a tokenizer with a chat template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from npu_qat.assets import demo_model_path
from npu_qat.config import LoraSection, NoiseConfig, Recipe
from npu_qat.integrations import QATCallback
from npu_qat.layers import AuditError, QuantizedModel, add_lora, load_lora, prepare_model
from tests.integrations.setting import NOISE, adapters, arguments, equal

trl = pytest.importorskip("trl", reason="TRL is the extra 'trl'")

pytestmark = pytest.mark.usefixtures("no_process_group")

PATH = str(demo_model_path())
ROLLOUT_NOISE = NOISE.model_copy(update={"apply_during": "rollout"})
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
}


def demo(recipe: Recipe | None = None, **changes: Any) -> tuple[QuantizedModel, Any]:
    """The prepared demo model in bf16, with adapters."""
    model = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.bfloat16, **changes)
    handle = prepare_model(model, recipe or Recipe())
    return handle, add_lora(model, LoraSection(r=4, alpha=8), seed=0)


def questions(count: int = 16) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"What is {i} + 4?"}]} for i in range(count)]
    )


def length_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Differs within a group, so that there is something to learn."""
    return [float(sum(map(ord, c[0]["content"])) % 7) for c in completions]


def grpo(folder: Path, made: tuple[QuantizedModel, Any], noise: NoiseConfig, **changes: Any) -> Any:
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "num_generations": 4}
    args = trl.GRPOConfig(
        output_dir=str(folder), max_completion_length=8, **{**COMMON, **settings, **changes}
    )
    return trl.GRPOTrainer(
        made[1],
        length_reward,
        args=args,
        train_dataset=questions(),
        eval_dataset=questions(2),
        callbacks=[QATCallback(made[0], noise)],
    )


def audit(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "audit.json").read_text())
    return found


def test_sft_has_the_loss_of_the_plain_trainer_on_the_same_rows(tmp_path: Path) -> None:
    """TRL computes the loss by a head of its own, in chunks: equal up to the order of sums."""
    from datasets import Dataset

    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {i} + {j}?"}],
                "completion": [{"role": "assistant", "content": str(i + j)}],
            }
            for i in range(4)
            for j in range(4)
        ]
    )
    handle, model = demo()
    sft = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(output_dir=str(tmp_path / "sft"), max_steps=3, **COMMON),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(PATH),
        callbacks=[QATCallback(handle, NOISE)],
    )
    sft.train()
    handle, model = demo()
    plain = Trainer(
        model,
        arguments(tmp_path / "plain", bf16=True, **{**COMMON, "max_steps": 3}),
        train_dataset=sft.train_dataset,
        data_collator=sft.data_collator,
        callbacks=[QATCallback(handle, NOISE)],
    )
    plain.train()

    def losses(trainer: Trainer) -> list[float]:
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    assert len(losses(sft)) == 3
    # bf16 gradients differ in the last digit, which 4 bits magnify in the steps that follow.
    assert losses(sft)[0] == pytest.approx(losses(plain)[0], rel=1e-5)
    assert losses(sft) == pytest.approx(losses(plain), rel=1e-2)
    assert audit(tmp_path / "sft")["verdict"] == audit(tmp_path / "plain")["verdict"] == "pass"


def test_grpo_has_noise_while_it_generates_and_at_no_other_time(tmp_path: Path) -> None:
    handle, model = demo()
    norm = handle.model.get_submodule("model.norm")
    clean = norm.weight.detach().float().clone()
    seen: list[tuple[str, bool, bool]] = []
    norm.register_forward_pre_hook(
        lambda module, args: seen.append(
            (
                handle._state.phase,
                torch.is_grad_enabled(),
                torch.equal(module.weight.detach().float(), clean),
            )
        )
    )
    trainer = grpo(tmp_path, (handle, model), ROLLOUT_NOISE, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert {phase for phase, _, is_clean in seen if not is_clean} == {"rollout"}
    assert {is_clean for phase, _, is_clean in seen if phase == "rollout"} == {False}
    assert {phase for phase, grad, _ in seen if grad} == {"training"}
    assert {phase for phase, _, _ in seen} == {"rollout", "training", "evaluation"}
    found = audit(tmp_path)
    assert found["verdict"] == "pass"
    assert found["evidence"]["rollout_steps"] == [1, 2]
    assert [r["sigma"] for r in found["noise"]["steps"] if r["phase"] == "rollout"] == [0.05, 0.01]
    assert trainer.state.log_history[0]["noise/sigma"] == 0.05


def test_grpo_resumes_digit_for_digit_and_its_adapter_loads(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = grpo(tmp_path, demo(), ROLLOUT_NOISE, **saving)
    whole.train()
    resumed = grpo(tmp_path, demo(), ROLLOUT_NOISE, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    names = ("loss", "grad_norm", "reward", "entropy", "noise/sigma_realized")
    last = [{k: t.state.log_history[1][k] for k in names} for t in (whole, resumed)]
    assert last[0] == last[1]
    assert equal(adapters(whole.model), adapters(resumed.model))
    assert audit(tmp_path)["evidence"]["first_step"] == 0

    whole.save_model(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.bfloat16)
    prepare_model(base, Recipe())
    fresh = load_lora(base, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, whole.model.eval()(ids).logits)


def test_vllm_is_refused_before_an_engine_is_started(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"use_vllm: TRL merges .* rollout\.engine: vllm"):
        grpo(tmp_path, demo(), ROLLOUT_NOISE, use_vllm=True)


def test_rollouts_from_elsewhere_fail_the_first_step(tmp_path: Path) -> None:
    """A rollout function that asks another model: no rollout ever ran in the quantised layers."""
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, num_generations=4, max_completion_length=8, **COMMON
    )
    handle, model = demo()

    def elsewhere(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        count = len(prompts)
        completions = [[10 + i, 11 + i % 3] for i in range(count)]
        return {
            "prompt_ids": [[5, 6, 7]] * count,
            "completion_ids": completions,
            "logprobs": [[-1.0, -1.0]] * count,
        }

    trainer = trl.GRPOTrainer(
        model,
        length_reward,
        args=args,
        train_dataset=questions(),
        rollout_func=elsewhere,
        callbacks=[QATCallback(handle)],
    )
    with pytest.raises(AuditError, match=r"rollouts are sampled from the quantised modules"):
        trainer.train()


def test_a_head_that_trl_s_fused_loss_bypasses_is_found(tmp_path: Path) -> None:
    """With lm_head quantised TRL reads its weight and never calls it: 16-bit inputs."""
    handle, model = demo(Recipe(exclude=()), tie_word_embeddings=False)
    assert "lm_head" in handle.layers
    trainer = grpo(tmp_path, (handle, model), ROLLOUT_NOISE)
    with pytest.raises(AuditError, match=r"lm_head in training: 0 of 0 calls"):
        trainer.train()
