"""Quantization-aware supervised fine-tuning with TRL's SFTTrainer.

    python examples/trl_sft.py [OUTPUT]

TRL makes the adapters from a ``peft_config``; ``npu_qat.add_lora`` works as well.
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import npu_qat
from npu_qat.assets import demo_model_path
from npu_qat.config import TaskConfig
from npu_qat.tasks import load_task

output = sys.argv[1] if len(sys.argv) > 1 else "runs/trl-sft"

path = demo_model_path()
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
task = load_task(TaskConfig(levels=(1,), train_size=32, test_size=8))
data = Dataset.from_list(
    [
        {
            "prompt": task.messages(problem),
            "completion": [{"role": "assistant", "content": problem.solution}],
        }
        for problem in task.train
    ]
)

handle = npu_qat.prepare_model(model, npu_qat.Recipe())
trainer = SFTTrainer(
    model,
    # bf16 asks for autocast, which a model in bf16 does not need (and TRL only allows on a GPU).
    args=SFTConfig(
        output, max_steps=4, per_device_train_batch_size=4, bf16=False, report_to="none"
    ),
    train_dataset=data,
    processing_class=AutoTokenizer.from_pretrained(path),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    callbacks=[npu_qat.QATCallback(handle)],
)
trainer.train()
trainer.save_model()
print(f"adapter and audit: {output}")
