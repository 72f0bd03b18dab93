"""Quantization-aware LoRA training in a PyTorch loop of one's own.

    python examples/plain_loop.py [OUTPUT]

The two lines are ``prepare_model`` and ``add_lora``. Noise (AQN) is optional. Phases matter if the
recipe quantises in some of them only, and for the audit, which counts by phase.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import npu_qat
from npu_qat.assets import demo_model_path
from npu_qat.config import LoraSection, NoiseConfig, TaskConfig
from npu_qat.tasks import load_task

STEPS = 4
output = sys.argv[1] if len(sys.argv) > 1 else "runs/plain-loop"

path = demo_model_path()  # or a folder, or a name on the hub
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(path)

handle = npu_qat.prepare_model(model, npu_qat.Recipe())
model = npu_qat.add_lora(model, LoraSection(r=16, alpha=32), seed=0)

settings = NoiseConfig(enabled=True, num_stages=2, apply_during="training")
noise = npu_qat.AQN(model, settings, total_steps=STEPS, seed=0)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
task = load_task(TaskConfig(levels=(1,), train_size=4 * STEPS, test_size=4))

model.train()
for step in range(STEPS):
    problems = task.train[4 * step : 4 * step + 4]
    texts = [
        tokenizer.apply_chat_template(
            [*task.messages(p), {"role": "assistant", "content": p.solution}], tokenize=False
        )
        for p in problems
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    # The backward pass belongs inside: gradient checkpointing recomputes the forward pass in it.
    with handle.phase("training"), noise.applied(step, "training") as record:
        loss = model(**batch, labels=labels).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}, sigma {record.sigma_realized:.4f}")

handle.audit.verify(model)  # raises if a layer did not do what the recipe says
model.save_pretrained(output)  # a PEFT adapter; npu-qat evaluate and export read it
print(f"adapter: {output}")
