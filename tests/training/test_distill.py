"""Distillation: the divergence is the divergence, and the mixture is in the gradient."""

from __future__ import annotations

import math

import pytest
import torch

from npu_qat.config import DistillSection
from npu_qat.training.batches import Batch, collate, completion_terms
from npu_qat.training.distill import Teacher
from tests.training.tiny import tiny_model, tiny_samples

CPU = torch.device("cpu")


def logits_of(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0].double()


def divergence_of(teacher: Teacher, student: torch.nn.Module, batch: Batch) -> torch.Tensor:
    _, divergence = completion_terms(student, batch, compare=teacher.divergence(batch))
    assert divergence is not None
    return divergence


@pytest.mark.parametrize(("tau", "temperature"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.7), (2.0, 0.7)])
def test_the_divergence_is_token_by_token_and_of_unpadded_rows(
    tau: float, temperature: float
) -> None:
    """Against one sequence at a time, from the definition."""
    teacher_model, student = tiny_model(seed=1), tiny_model(seed=2)
    teacher = Teacher(teacher_model, DistillSection(weight=0.5, temperature=tau))
    samples = tiny_samples(5)
    batch = collate(samples, 0, CPU)
    with torch.no_grad():
        compare = teacher.divergence(batch, temperature)
        _, found = completion_terms(student, batch, temperature, compare)
        assert found is not None
        for row, sample in zip(found, samples, strict=True):
            tokens, start = sample.prompt + sample.completion, len(sample.prompt) - 1
            p = (logits_of(teacher_model, tokens) / tau).log_softmax(-1)[start:-1]
            q = (logits_of(student, tokens) / tau).log_softmax(-1)[start:-1]
            expected = tau**2 * (p.exp() * (p - q)).sum(-1)
            torch.testing.assert_close(
                row[: len(sample.completion)].double(), expected, rtol=1e-4, atol=1e-5
            )


def test_a_student_that_is_its_teacher_has_no_divergence() -> None:
    model = tiny_model()
    batch = collate(tiny_samples(3), 0, CPU)
    teacher = Teacher(model, DistillSection(weight=1.0))
    divergence = divergence_of(teacher, model, batch)
    assert divergence.abs().max() < 1e-5


def test_the_teacher_is_frozen_and_gets_no_gradient() -> None:
    teacher_model, student = tiny_model(seed=1), tiny_model(seed=2)
    teacher = Teacher(teacher_model, DistillSection(weight=1.0))
    batch = collate(tiny_samples(3), 0, CPU)
    divergence_of(teacher, student, batch).sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in teacher_model.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


def test_the_mixture_has_the_configured_shares() -> None:
    teacher = Teacher(tiny_model(), DistillSection(weight=0.25))
    mixed = teacher.mixed(torch.tensor([[2.0, 4.0]]), torch.tensor([[10.0, -2.0]]))
    assert mixed.tolist() == [[4.0, 2.5]]


def test_following_the_divergence_leads_to_the_teacher() -> None:
    teacher_model, student = tiny_model(seed=1), tiny_model(seed=2)
    teacher = Teacher(teacher_model, DistillSection(weight=1.0))
    batch = collate(tiny_samples(8), 0, CPU)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    values = []
    for _ in range(30):
        divergence = divergence_of(teacher, student, batch)
        loss = (divergence * batch.mask).sum() / batch.mask.sum()
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert math.isfinite(values[-1]) and values[-1] < 0.5 * values[0]
