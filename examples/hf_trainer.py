"""Quantization-aware LoRA training with transformers' Trainer.

    python examples/hf_trainer.py [OUTPUT]

The callback brings the phases, the noise and the audit: OUTPUT/audit.json.
"""

from __future__ import annotations

import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import npu_qat
from npu_qat.assets import demo_model_path
from npu_qat.config import LoraSection, NoiseConfig, TaskConfig
from npu_qat.tasks import load_task

output = sys.argv[1] if len(sys.argv) > 1 else "runs/hf-trainer"

path = demo_model_path()
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(path)
task = load_task(TaskConfig(levels=(1,), train_size=32, test_size=8))
rows = [
    tokenizer.apply_chat_template(
        [*task.messages(p), {"role": "assistant", "content": p.solution}],
        return_dict=True,
    )
    for p in task.train
]

handle = npu_qat.prepare_model(model, npu_qat.Recipe())
model = npu_qat.add_lora(model, LoraSection(r=16, alpha=32), seed=0)

noise = NoiseConfig(enabled=True, num_stages=2, apply_during="training")
trainer = Trainer(
    model,
    TrainingArguments(output, max_steps=4, per_device_train_batch_size=4, report_to="none"),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[npu_qat.QATCallback(handle, noise)],
)
trainer.train()
trainer.save_model()
print(f"adapter and audit: {output}")
