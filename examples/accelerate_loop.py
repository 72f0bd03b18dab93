"""Quantization-aware LoRA training with Accelerate, on one process or several.

    python examples/accelerate_loop.py [OUTPUT]
    torchrun --nproc_per_node 2 examples/accelerate_loop.py [OUTPUT]

Load the model in the dtype that computes and leave ``mixed_precision`` off: the adapters keep fp32
master weights anyway. Prepare the model first, then hand it to Accelerate.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import npu_qat
from npu_qat.assets import demo_model_path
from npu_qat.config import LoraSection, NoiseConfig, TaskConfig
from npu_qat.tasks import Problem, load_task

STEPS = 4
output = sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate-loop"

# On a machine with CPUs only, Accelerate joins the processes of torchrun if it is told so.
accelerator = Accelerator(cpu=not torch.accelerator.is_available())
path = demo_model_path()
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(path)

handle = npu_qat.prepare_model(model, npu_qat.Recipe())
model = npu_qat.add_lora(model, LoraSection(r=16, alpha=32), seed=0)

# Noise before accelerator.prepare: it holds the norms' weights as buffers.
settings = NoiseConfig(enabled=True, num_stages=2, apply_during="training")
noise = npu_qat.AQN(model, settings, total_steps=STEPS, seed=0)
task = load_task(TaskConfig(levels=(1,), train_size=64, test_size=4))


def collate(problems: list[Problem]) -> dict[str, torch.Tensor]:
    """Chats as one padded batch; padding gives no loss."""
    texts = [
        tokenizer.apply_chat_template(
            [*task.messages(p), {"role": "assistant", "content": p.solution}], tokenize=False
        )
        for p in problems
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
loader = DataLoader(list(task.train), batch_size=4, shuffle=True, collate_fn=collate)
model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)

for step, batch in zip(range(STEPS), loader, strict=False):
    with handle.phase("training"), noise.applied(step, "training"):
        loss = model(**batch).loss
        accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step + 1}: loss {loss.item():.4f}")

trained = accelerator.unwrap_model(model)
handle.audit.verify(trained)
if accelerator.is_main_process:
    trained.save_pretrained(output)
    print(f"adapter: {output}")
accelerator.end_training()
