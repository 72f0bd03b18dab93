"""Any number of ranks and any micro-batch size make the same update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from npu_qat.config import DistillSection
from npu_qat.training import batches
from npu_qat.training.batches import (
    Sample,
    collate,
    completion_logp,
    completion_terms,
    micro_batches,
)
from npu_qat.training.distill import Teacher
from tests.training.tiny import tiny_model, tiny_samples

CPU = torch.device("cpu")


def key(sample: Sample) -> tuple[object, ...]:
    return tuple(sample.prompt), tuple(sample.completion)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 3, 4, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_ranks_partition_the_samples_and_make_equally_many_passes(
    count: int, size: int, world_size: int
) -> None:
    samples = tiny_samples(count)
    shares = [micro_batches(samples, size, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert all(0 < len(batch) <= size for share in shares for batch in share)
    flat = [s for share in shares for batch in share for s in batch]
    own = [s for s in flat if any(s is t for t in samples)]
    assert sorted(map(key, own)) == sorted(map(key, samples)), "each sample once"
    fillers = [s for s in flat if not any(s is t for t in samples)]
    assert all(s.weight == 0.0 and s.tokens == 0 for s in fillers)
    assert sum(s.tokens for s in flat) == sum(s.tokens for s in samples)
    assert (len(fillers) > 0) == (
        world_size > count
        or any(len(share[-1]) == 1 and share[-1][0] in fillers for share in shares)
    )


def test_rows_of_similar_length_share_a_micro_batch() -> None:
    batches = micro_batches(tiny_samples(16), 4, 0, 1)
    lengths = [[len(s.prompt) + len(s.completion) for s in batch] for batch in batches]
    assert [n for batch in lengths for n in batch] == sorted(n for b in lengths for n in b)


def test_a_filler_of_supervised_samples_collates() -> None:
    samples = [replace(s, rollout_logp=None, old_logp=None) for s in tiny_samples(1)]
    (batch,) = micro_batches(samples, 2, 1, 2)
    assert collate(batch, 0, CPU).mask.sum() == 0


def test_padding_is_on_the_right_so_that_no_row_attends_to_nothing() -> None:
    samples = [
        Sample([5, 6, 7], [8], advantage=0.5, rollout_logp=[-1.0], old_logp=[-2.0]),
        Sample([9], [10, 11, 12], weight=0.0, rollout_logp=[-3.0] * 3, old_logp=[-4.0] * 3),
    ]
    batch = collate(samples, 0, CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    longer = collate([samples[0], Sample([9], [10, 11, 12, 13, 14])], 0, CPU)
    assert longer.input_ids.tolist() == [[5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14]]
    assert longer.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch.completion.tolist() == [[8, 0, 0], [10, 11, 12]]
    assert batch.mask.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert batch.advantage.tolist() == [[0.5], [0.0]]
    assert batch.rollout_logp is not None and batch.old_logp is not None
    assert batch.rollout_logp.tolist() == [[-1.0, 0.0, 0.0], [-3.0] * 3]
    assert batch.old_logp.tolist() == [[-2.0, 0.0, 0.0], [-4.0] * 3]


def test_log_probabilities_are_absent_unless_every_row_has_them() -> None:
    samples = [Sample([1], [2], rollout_logp=[-1.0]), Sample([1], [2])]
    batch = collate(samples, 0, CPU)
    assert batch.rollout_logp is None and batch.old_logp is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_padding_changes_no_log_probability(family: str, temperature: float) -> None:
    model, samples = tiny_model(family), tiny_samples(8)
    with torch.no_grad():
        batch = collate(samples, 0, CPU)
        together = completion_logp(model, batch, temperature)
        assert together.dtype == torch.float32
        for i, s in enumerate(samples):
            logits = model(input_ids=torch.tensor([s.prompt + s.completion])).logits[0]
            logp = (logits / temperature).log_softmax(-1)[len(s.prompt) - 1 : -1]
            alone = logp.gather(-1, torch.tensor(s.completion)[:, None])[:, 0]
            torch.testing.assert_close(
                together[i, : len(s.completion)], alone, rtol=1e-4, atol=1e-4
            )


def test_log_probabilities_of_a_bf16_model_are_normalised_in_fp32() -> None:
    model, samples = tiny_model(dtype=torch.bfloat16), tiny_samples(3)
    with torch.no_grad():
        assert completion_logp(model, collate(samples, 0, CPU)).dtype == torch.float32


@pytest.mark.parametrize("with_teacher", [False, True])
def test_rows_at_a_time_give_the_same_numbers_and_gradients(
    with_teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: no row's loss depends on another's."""
    batch = collate(tiny_samples(7), 0, CPU)
    teacher = Teacher(tiny_model(seed=3, dtype=torch.bfloat16), DistillSection(weight=0.5))

    def terms(elements: int) -> list[torch.Tensor]:
        monkeypatch.setattr(batches, "CHUNK_ELEMENTS", elements)
        model = tiny_model(dtype=torch.bfloat16)
        compare = teacher.divergence(batch) if with_teacher else None
        logp, divergence = completion_terms(model, batch, 0.7, compare)
        loss = ((logp if divergence is None else logp + divergence) * batch.mask).sum()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients
        return [logp, *([] if divergence is None else [divergence]), *gradients]

    whole, pieces = terms(2**25), terms(1)
    assert len(whole) == len(pieces)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_of_the_log_probabilities_only_16_bit_logits_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What autograd keeps that has the vocabulary's size, with a chunk of one row."""
    batch, model = collate(tiny_samples(7), 0, CPU), tiny_model(dtype=torch.bfloat16)
    monkeypatch.setattr(batches, "CHUNK_ELEMENTS", 1)
    size = model.config.vocab_size
    kept: list[torch.dtype] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 3 and tensor.shape[-1] == size:
            kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        completion_terms(model, batch)
    assert torch.float32 not in kept
