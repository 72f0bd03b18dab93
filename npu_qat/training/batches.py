"""Sequences, micro-batches and the log-probabilities of their completions.

An update is a list of sequences that is the same on every rank. Each rank takes every W-th one and
cuts its share into micro-batches; ranks that run out repeat a sequence with weight zero, because
the partitioned engine needs every rank to make the same number of passes. Since the loss is
normalised by the update's global token count, the gradient is the same for any number of ranks and
any micro-batch size.

Rows are padded on the right only. A left-padded row has query positions that may attend to nothing,
and some fused attention kernels return NaN gradients for those (seen on CUDA in bf16, where the
forward pass is fine).

Shapes: B rows, S tokens of prompt and completion (padded), T completion tokens (padded),
P positions from ``Batch.first`` on, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# Log-probabilities that are made at a time: 128 MiB in fp32.
CHUNK_ELEMENTS = 2**25
Compare = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Sample:
    """A prompt, a completion, and what the loss needs to know of its tokens.

    Attributes:
        prompt: token ids.
        completion: token ids.
        weight: 1.0 if the completion's tokens count in the loss, else 0.0.
        advantage: of the completion (DAPO).
        rollout_logp: log-probability of each token when it was sampled (DAPO).
        old_logp: the trainer's log-probabilities before the first update of the rollout, if the
            rollout has several updates (DAPO).
    """

    prompt: list[int]
    completion: list[int]
    weight: float = 1.0
    advantage: float = 0.0
    rollout_logp: list[float] | None = None
    old_logp: list[float] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that count in the loss."""
        return len(self.completion) if self.weight else 0


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device.

    Attributes:
        input_ids, attention_mask, position_ids: [B, S].
        first: the first position of S that is a completion token in some row.
        index: [B, T], position of each completion token, counted from ``first``.
        completion: [B, T], its token.
        mask: [B, T], 1.0 where the token counts in the loss.
        advantage: [B, 1].
        rollout_logp, old_logp: [B, T], see ``Sample``.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    first: int
    index: torch.Tensor
    completion: torch.Tensor
    mask: torch.Tensor
    advantage: torch.Tensor
    rollout_logp: torch.Tensor | None
    old_logp: torch.Tensor | None


def data_digest(problems: Sequence[Any]) -> str:
    """Which problems a step read, in which order: the first 12 digits of a SHA-256 of their ids.

    Two runs with equal digests in every step learnt from the same prompts in the same order.
    """
    names = "\n".join(str(problem.id) for problem in problems)
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def micro_batches(
    samples: Sequence[Sample], size: int, rank: int, world_size: int
) -> list[list[Sample]]:
    """This rank's share of ``samples`` in micro-batches; as many as on any other rank."""
    most = -(-len(samples) // world_size)
    mine = sorted(samples[rank::world_size], key=lambda s: len(s.prompt) + len(s.completion))
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    filler = Sample(samples[0].prompt, samples[0].completion[:1], weight=0.0)
    if samples[0].rollout_logp is not None:
        filler = Sample(filler.prompt, filler.completion, 0.0, 0.0, [0.0], [0.0])
    return batches + [[filler]] * (-(-most // size) - len(batches))


def collate(samples: Sequence[Sample], pad_id: int, device: torch.device) -> Batch:
    """Pad ``samples`` into one batch on ``device``."""
    first = min(len(s.prompt) for s in samples)
    t = max(len(s.completion) for s in samples)
    rows = [s.prompt + s.completion for s in samples]
    input_ids = _padded(rows, max(map(len, rows)), device, pad_id)
    attention_mask = _padded([[1] * len(row) for row in rows], input_ids.shape[1], device, 0)
    start = torch.tensor([len(s.prompt) for s in samples], device=device)[:, None]
    index = start - first + torch.arange(t, device=device)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=torch.arange(input_ids.shape[1], device=device).expand_as(input_ids),
        first=first,
        # Padding points anywhere inside; the mask is zero there.
        index=index.clamp(max=input_ids.shape[1] - first - 1),
        completion=_padded([s.completion for s in samples], t, device, pad_id),
        mask=_padded([[s.weight] * len(s.completion) for s in samples], t, device, 0.0),
        advantage=torch.tensor([s.advantage for s in samples], device=device)[:, None],
        rollout_logp=_padded_or_none([s.rollout_logp for s in samples], t, device),
        old_logp=_padded_or_none([s.old_logp for s in samples], t, device),
    )


def _padded(
    rows: Sequence[Sequence[float]], length: int, device: torch.device, value: float
) -> torch.Tensor:
    """``rows`` as [B, length], filled with ``value`` on the right."""
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], device=device)


def _padded_or_none(
    rows: Sequence[list[float] | None], length: int, device: torch.device
) -> torch.Tensor | None:
    given = [row for row in rows if row is not None]
    return _padded(given, length, device, 0.0) if len(given) == len(rows) else None


def completion_logp(model: Any, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """fp32 [B, T]: log-probability of each completion token given all before it.

    ``temperature`` divides the logits, as in sampling, so that both speak of one distribution.
    """
    return completion_terms(model, batch, temperature)[0]


def completion_terms(
    model: Any, batch: Batch, temperature: float = 1.0, compare: Compare | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of the completion's tokens, and what ``compare`` says at each.

    With a vocabulary of tens of thousands, fp32 log-probabilities of every position are the largest
    tensors of a step by far, and the backward pass wants several of them. So only the model's
    16-bit logits are kept: a few rows at a time become fp32, and again in the backward pass. No row
    depends on another, so the numbers are the same.

    Args:
        model: a causal language model, or the engine around it.
        batch: what it reads.
        temperature: divides its logits.
        compare: from the fp32 log-probabilities [b, P, V] of rows ``rows`` to fp32 [b, P].

    Returns:
        fp32 [B, T] log-probabilities, and fp32 [B, T] of ``compare`` or None.
    """
    logits = position_logits(model, batch)
    following = batch.input_ids[:, batch.first :, None]

    def terms(some: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        rows = slice(start, start + some.shape[0])
        logp = log_probabilities(some, temperature)
        taken = logp.gather(-1, following[rows])[..., 0]
        return (taken,) if compare is None else (taken, compare(logp, rows))

    count = max(1, CHUNK_ELEMENTS // logits[0].numel())
    parts: list[tuple[torch.Tensor, ...]] = []
    for i, some in enumerate(logits.split(count)):
        if count >= logits.shape[0] or not torch.is_grad_enabled():
            parts.append(terms(some, i * count))
        else:
            parts.append(
                checkpoint(terms, some, i * count, use_reentrant=False, preserve_rng_state=False)
            )
    whole = [of_completion(torch.cat(part), batch) for part in zip(*parts, strict=True)]
    return whole[0], whole[1] if compare is not None else None


def position_logits(model: Any, batch: Batch) -> torch.Tensor:
    """[B, P, V] in the model's dtype: logits that predict positions ``batch.first`` and later."""
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        # Logits of the last prompt token predict the first completion token.
        logits_to_keep=batch.input_ids.shape[1] - batch.first + 1,
    ).logits[:, :-1]
    return logits


def log_probabilities(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """fp32 log-probabilities of ``logits / temperature`` along the last axis."""
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def of_completion(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """From values at positions ``batch.first`` and later [B, P] the completion's, [B, T]."""
    return values.gather(-1, batch.index)
