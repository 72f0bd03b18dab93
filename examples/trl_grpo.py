"""Quantization-aware reinforcement learning with TRL's GRPOTrainer, DAPO's loss, and AQN.

    python examples/trl_grpo.py [OUTPUT]

Noise is on the norms while the trainer generates, and at no other time. Rollouts come from the
quantised modules themselves (``use_vllm=False``); the callback refuses anything else.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import npu_qat
from npu_qat.assets import demo_model_path
from npu_qat.config import LoraSection, NoiseConfig, TaskConfig
from npu_qat.tasks import load_task
from npu_qat.tasks.rewards import accuracy_reward

output = sys.argv[1] if len(sys.argv) > 1 else "runs/trl-grpo"

path = demo_model_path()
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
task = load_task(TaskConfig(levels=(1,), train_size=32, test_size=8))
problems = {problem.id: problem for problem in task.train}
data = Dataset.from_list([{"prompt": task.messages(p), "id": p.id} for p in task.train])


def reward(completions: list[Any], id: list[str], **kwargs: Any) -> list[float]:
    """1 for the right number behind ``####``, and a little less for every character."""
    texts = [completion[0]["content"] for completion in completions]
    return [
        accuracy_reward(text, problems[key]) - len(text) / 1000
        for text, key in zip(texts, id, strict=True)
    ]


handle = npu_qat.prepare_model(model, npu_qat.Recipe())
model = npu_qat.add_lora(model, LoraSection(r=16, alpha=32), seed=0)

noise = NoiseConfig(enabled=True, num_stages=2, apply_during="rollout")
trainer = GRPOTrainer(
    model,
    reward,
    args=GRPOConfig(
        output,
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=48,
        epsilon_high=0.28,
        learning_rate=1e-4,
        bf16=False,  # no autocast: the model is in bf16 already
        report_to="none",
    ),
    train_dataset=data,
    processing_class=AutoTokenizer.from_pretrained(path),
    callbacks=[npu_qat.QATCallback(handle, noise)],
)
trainer.train()
trainer.save_model()
print(f"adapter and audit: {output}")
