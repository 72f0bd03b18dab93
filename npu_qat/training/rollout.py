"""Sampling completions through the very modules that are trained.

Rows are decoded together with a KV cache; prompts are padded on the left once, finished rows leave
the batch (``decode`` has what makes a step cheap). Two properties matter more than speed here:

* **Reproducible by row.** The random numbers of a row come from its own counter-based stream, keyed
  by (seed, step, prompt, generation), and a token is drawn by inverting the cumulative
  distribution. What a row samples therefore depends on no other row, on no batch size and on no
  number of processes, up to floating-point differences of batched matmuls; a resumed run continues
  exactly.
* **Honest log-probabilities.** ``logp`` is the log-probability of each sampled token under the
  distribution it was sampled from (temperature included, before nucleus truncation), recorded at
  sampling time. The trainer compares it with its own.

Shapes: B rows, P prompt tokens (padded), T completion tokens, V vocabulary, C chunks of K tokens
of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from npu_qat.training.decode import RecordedStep, can_record, roomy_cache
from npu_qat.training.engine import TrainingError

# Rows leave the batch when at most this share of them is still running: the copy of the cache then
# costs less than the rows save. A recorded step must be recorded anew, which takes two steps' time.
COMPACT_BELOW = 0.75
COMPACT_RECORDED_BELOW = 0.5
# Tokens whose probabilities are summed up first when one is drawn.
CHUNK = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. ``temperature`` 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        tokens: token ids, the end-of-sequence token included if it was reached.
        logp: log-probability of each token when it was sampled.
        truncated: the limit came before the end-of-sequence token.
    """

    tokens: list[int]
    logp: list[float]
    truncated: bool


def row_uniforms(keys: Sequence[tuple[int, ...]], length: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), fp64 [B, length], one independent stream a key."""
    rows = [np.random.default_rng(np.random.SeedSequence(key)).random(length) for key in keys]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[list[int]],
    keys: Sequence[tuple[int, ...]],
    params: SamplingParams,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
    stop: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """Sample one completion for each prompt.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        prompts: token ids of each row.
        keys: the random stream of each row; unused when greedy.
        params: how to draw.
        eos_ids: tokens that end a completion.
        pad_id: any valid token; masked wherever it stands.
        batch_size: rows decoded together.
        stop: called once a token; may raise to abandon the rollout.

    Returns:
        The completions in the order of ``prompts``.

    Raises:
        TrainingError: the logits hold NaN or Inf.
    """
    completions: list[Completion | None] = [None] * len(prompts)
    # Rows of similar length share a batch: less padding. The order of rows does not matter.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _Batch(model, [prompts[i] for i in rows], eos_ids, pad_id, params.max_new_tokens)
        uniforms = None
        if params.temperature > 0:
            uniforms = row_uniforms([keys[i] for i in rows], params.max_new_tokens)
        for i, completion in zip(rows, batch.decode(params, uniforms, stop), strict=True):
            completions[i] = completion
    return [c for c in completions if c is not None]


class _Transfer:
    """A small tensor on its way to the host: everything that Python needs to know about a step."""

    def __init__(self, x: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if x.device.type != "cuda":
            self._host = x.cpu()
            return
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._host.copy_(x, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> torch.Tensor:
        """The tensor on the CPU, once it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class _Batch:
    """The running rows of one decode: tokens, mask, cache, and which row is where."""

    def __init__(
        self,
        model: Any,
        prompts: list[list[int]],
        eos_ids: Sequence[int],
        pad_id: int,
        max_new_tokens: int,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        width = max(map(len, prompts))
        ids = [[pad_id] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * (len(p) + max_new_tokens) for p in prompts]
        self.ids = torch.tensor(ids, device=self.device)
        self.mask = torch.tensor(mask, device=self.device)  # of the longest completion
        self.length = width
        self.position = self.mask[:, :width].cumsum(-1).sub(1).clamp(min=0)
        self.cache = roomy_cache(model.config, width + max_new_tokens)
        self.records = can_record(model, self.cache)
        self.recorded: RecordedStep | None = None
        # The random numbers [B, T] of the rows, and those of this step, at one address.
        self.uniforms = torch.empty(0)
        self.u: torch.Tensor | None = None
        self.params: SamplingParams
        self.picked = torch.empty(0)  # by the last step
        self.eos = torch.tensor(list(eos_ids))
        self.rows = torch.arange(len(prompts))
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logp: list[list[float]] = [[] for _ in prompts]

    def decode(
        self, params: SamplingParams, uniforms: torch.Tensor | None, stop: Callable[[], None]
    ) -> list[Completion]:
        steps_token, steps_logp, steps_rows = [], [], []
        finished = torch.zeros(len(self.tokens), dtype=torch.bool)
        done = torch.zeros(len(self.rows), dtype=torch.bool)
        self.params = params
        if uniforms is not None:
            self.uniforms = uniforms.to(self.device)
            self.u = self.uniforms[:, 0].clone()
        coming: deque[_Transfer] = deque()
        started, leaving = 0, False
        for t in range(params.max_new_tokens):
            stop()
            # A replayed step needs nothing from Python, so the next one starts before this one's
            # tokens are looked at; unless rows are about to leave.
            while started <= t or (
                self.recorded is not None
                and started == t + 1 < params.max_new_tokens
                and not leaving
            ):
                coming.append(self._start(started))
                started += 1
            token, logp = coming.popleft().wait()
            steps_token.append(token.long())
            steps_logp.append(logp.float())
            steps_rows.append(self.rows)
            done = done | torch.isin(steps_token[-1], self.eos)
            finished[self.rows[done]] = True
            if done.all():
                break
            below = COMPACT_RECORDED_BELOW if self.records else COMPACT_BELOW
            leaving = bool((~done).float().mean() <= below)
            if leaving and not coming:
                self._keep(~done)
                done, leaving = done[~done], False
        return self._collect(steps_token, steps_logp, steps_rows, finished)

    def _start(self, t: int) -> _Transfer:
        """Queue step ``t``, which continues the one before, and the transfer of what it picks."""
        if t > 0:
            self._append(self.picked[0].long())
        if self.u is not None:
            self.u.copy_(self.uniforms[:, t])
        self.picked = self._forward()
        return _Transfer(self.picked)

    def _forward(self) -> torch.Tensor:
        """Token and log-probability of each row, fp64 [2, B], which holds both exactly."""
        filled = self.length - self.ids.shape[1]
        if self.records and filled > 0:
            if self.recorded is None:
                self.recorded = RecordedStep(
                    self.model, self.cache, self.mask[:, :filled], self.position, self._pick
                )
            return self.recorded(self.ids[:, 0])
        out = self.model(
            input_ids=self.ids,
            attention_mask=self.mask[:, : self.length],
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return self._pick(out.logits[:, -1])

    def _pick(self, logits: torch.Tensor) -> torch.Tensor:
        token, logp = draw(logits, self.params, self.u)
        return torch.stack((token.double(), logp.double()))

    def _append(self, token: torch.Tensor) -> None:
        self.ids = token[:, None]
        self.length += 1
        self.position = self.position[:, -1:] + 1

    def _keep(self, running: torch.Tensor) -> None:
        index = running.nonzero().flatten()
        on_device = index.to(self.device)
        self.recorded = None
        self.ids, self.mask = self.ids[on_device], self.mask[on_device]
        self.position = self.position[on_device]
        self.cache.batch_select_indices(on_device)
        self.rows = self.rows[index]
        self.picked = self.picked[:, on_device]
        if self.u is not None:
            self.uniforms = self.uniforms[on_device]
            self.u = self.u[on_device]

    def _collect(
        self,
        tokens: list[torch.Tensor],
        logps: list[torch.Tensor],
        rows: list[torch.Tensor],
        finished: torch.Tensor,
    ) -> list[Completion]:
        if not all(torch.isfinite(logp).all() for logp in logps):
            # Some token would be drawn all the same, and a model that answers rubbish looks like
            # one that has not learnt yet.
            raise TrainingError("the model's logits hold NaN or Inf while sampling")
        eos = set(self.eos.tolist())
        ended = set()
        for token, logp, row in zip(tokens, logps, rows, strict=True):
            for r, tok, lp in zip(row.tolist(), token.tolist(), logp.tolist(), strict=True):
                if r in ended:
                    continue
                self.tokens[r].append(tok)
                self.logp[r].append(lp)
                if tok in eos:
                    ended.add(r)
        return [
            Completion(tokens, logp, truncated=not bool(done))
            for tokens, logp, done in zip(self.tokens, self.logp, finished, strict=True)
        ]


def draw(
    logits: torch.Tensor, params: SamplingParams, u: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row from ``logits`` [B, V], and its log-probability.

    With ``u`` [B] uniform in [0, 1) the token is the first whose cumulative probability exceeds
    ``u``; with ``u`` None it is the most probable one.
    """
    scale = params.temperature if params.temperature > 0 else 1.0
    logp = torch.log_softmax(logits.float() / scale, dim=-1)
    if u is None:
        token = logp.argmax(-1)
    elif params.top_p >= 1.0:
        token = _invert(logp.exp(), u)
    else:
        sorted_p, order = logp.exp().sort(dim=-1, descending=True)
        # Keep the smallest set of tokens whose mass reaches top_p: those before which less lies.
        kept = torch.where(sorted_p.cumsum(-1) - sorted_p < params.top_p, sorted_p, 0.0)
        token = order.gather(-1, _invert(kept, u)[:, None])[:, 0]
    return token, logp.gather(-1, token[:, None])[:, 0]


def _invert(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Index [B] at which the cumulative sum of ``p`` [B, V] passes ``u`` times its total.

    In two steps, first over sums of CHUNK numbers and then inside one chunk: a GPU sums up a row of
    a large vocabulary one number after another, which would take longer than the model's head.
    """
    p_BCK = F.pad(p, (0, -p.shape[-1] % CHUNK)).unflatten(-1, (-1, CHUNK))
    sums = p_BCK.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    target = (u * ends[:, -1])[:, None]
    # A uniform that rounds up to the total would fall off the end, onto a token of mass zero.
    chunk = torch.minimum(torch.searchsorted(ends, target, right=True), _last_positive(sums))
    before = torch.where(chunk > 0, ends.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = p_BCK.gather(1, chunk[:, :, None].expand(-1, 1, CHUNK))[:, 0]
    cumulative = inside.cumsum(-1, dtype=torch.float64) + before
    place = torch.minimum(
        torch.searchsorted(cumulative, target, right=True), _last_positive(inside)
    )
    return (chunk * CHUNK + place)[:, 0]


def _last_positive(x: torch.Tensor) -> torch.Tensor:
    """Index [B, 1] of the last number of ``x`` [B, N] above zero."""
    place = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x > 0, place, 0).amax(-1, keepdim=True)
