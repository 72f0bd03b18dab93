"""Distillation: the 16-bit model shows the 4-bit one what it would have said.

A label names one token; a teacher gives a whole distribution, so every token teaches how far
rounding moved the model, also where the task's reward is zero for all (quantisation-aware
distillation; arXiv 2601.20088). The loss of a completion token is

    (1 - w) * task loss + w * tau^2 * KL(p_teacher || p_student),   p = softmax(logits / tau)

The factor tau^2 keeps the gradient's size independent of the temperature (Hinton et al., arXiv
1503.02531). The completions are the worked solutions in SFT and the student's own samples in DAPO,
so in DAPO the student is corrected where its own rounding leads it.

What is given up: a second model in 16 bits in memory, and its forward pass. A teacher that knows no
more than the start brings the student back to the start and not further.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_qat.config import DistillSection
from npu_qat.training.batches import Batch, Compare, log_probabilities, position_logits


class Teacher:
    """A frozen 16-bit model and the term that it adds to the loss.

    Args:
        model: a causal language model in 16 bits on the student's device, without noise.
        section: weight and temperature.
    """

    def __init__(self, model: Any, section: DistillSection) -> None:
        self.model = model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.weight, self.temperature = section.weight, section.temperature

    def divergence(self, batch: Batch, temperature: float = 1.0) -> Compare:
        """``tau^2 KL(teacher || student)`` at each position, for ``completion_terms``.

        The teacher reads the batch now; its logits are kept in 16 bits.

        Args:
            batch: what both models read.
            temperature: by which the student's logits are divided.
        """
        with torch.no_grad():
            logits = position_logits(self.model, batch)

        def compare(student: torch.Tensor, rows: slice) -> torch.Tensor:
            with torch.no_grad():
                teacher = log_probabilities(logits[rows], self.temperature)
            if temperature != self.temperature:
                # Log-probabilities are logits up to a constant, which the softmax takes away.
                student = torch.log_softmax(student * (temperature / self.temperature), dim=-1)
            return (teacher.exp() * (teacher - student)).sum(-1) * self.temperature**2

        return compare

    def mixed(self, task_losses: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
        """The loss of each token [B, T]: task and distillation by the configured weight."""
        return (1 - self.weight) * task_losses + self.weight * divergence
