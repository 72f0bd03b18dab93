"""What a model says about real text, and how much of a difference is noise.

**Statistics.** Two models read the same tokens; for every position their log-probabilities are
compared:

    |d log p|    of the token that follows: mean and 99th percentile
    KL           sum p log(p / q) over the reference's K most probable tokens and one bucket for the
                 rest: a lower bound of the full divergence, and nearly all of it
    top 1        share of positions where the most probable token differs
    perplexity   relative difference of exp(mean -log p)
    greedy       share of generated tokens after the first that differs, on the same prompts

**The noise floor.** 4-bit rounding magnifies: a number that moves by one unit in the last place of
bf16 may cross a tie, and then a whole code changes. Any two correct implementations therefore
differ by far more than their rounding, and how much depends on the model and the text; a fixed
tolerance would be a guess. So the floor is measured on the reference itself, as the largest of

* batch recomposition: the same rows alone, and in other batches (another order of summation);
* the residual stream moved at the embedding and after every decoder layer by one unit in the last
  place, up, down or not at all at random, for several seeds (what other kernels for attention,
  norms and activation functions do).

The largest of few draws is no bound, so a limit is ``MARGIN`` times the floor, plus, for a share of
n positions, 3 / n: seeing none in n draws excludes no more than that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from npu_qat.training.rollout import SamplingParams, sample

TOP = 64
MARGIN = 1.5
RULE_OF_THREE = 3.0
_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.\d+$")
_PATTERNS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Observed:
    """What a model says about one row of n tokens, for its T = n - 1 transitions.

    Attributes:
        logp: fp32 [T], log-probability of the token that follows.
        best: int64 [T], the most probable token.
        top_ids: int32 [T, K], tokens whose log-probabilities are kept.
        top_logp: fp32 [T, K].
    """

    logp: torch.Tensor
    best: torch.Tensor
    top_ids: torch.Tensor
    top_logp: torch.Tensor


@dataclass(frozen=True)
class Differences:
    """How far one model's statements are from another's; see the module docstring."""

    logp_mean: float = 0.0
    logp_p99: float = 0.0
    kl_mean: float = 0.0
    top1: float = 0.0
    perplexity: float = 0.0
    greedy: float = 0.0

    def largest(self, other: Differences) -> Differences:
        """The larger value of each statistic."""
        mine, theirs = asdict(self), asdict(other)
        return Differences(**{name: max(mine[name], theirs[name]) for name in mine})


SHARES = ("top1", "greedy")
TITLES = {
    "logp_mean": "mean |d log p| a token",
    "logp_p99": "99th percentile of |d log p|",
    "kl_mean": "mean KL a token",
    "top1": "most probable token differs",
    "perplexity": "perplexity, relative difference",
    "greedy": "greedy tokens that differ",
}


@dataclass(frozen=True)
class NoiseFloor:
    """The reference against itself.

    Attributes:
        variants: name -> differences, one for each recomposition and each seed.
        positions: transitions that were compared.
        generated: greedy tokens that were compared.
        example: |d log p| of every transition under the first seed, for the plot.
    """

    variants: dict[str, Differences]
    positions: int
    generated: int
    example: list[float] = field(default_factory=list)

    @property
    def floor(self) -> Differences:
        """The largest over the variants."""
        largest = Differences()
        for differences in self.variants.values():
            largest = largest.largest(differences)
        return largest

    def limits(self) -> dict[str, float]:
        """What a correct implementation may differ by, for each statistic."""
        found = {name: MARGIN * value for name, value in asdict(self.floor).items()}
        found["top1"] += RULE_OF_THREE / max(self.positions, 1)
        found["greedy"] += RULE_OF_THREE / max(self.generated, 1)
        return found


# --- observing ----------------------------------------------------------------------------------


@torch.no_grad()
def observe(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    pad_id: int,
    tops: Sequence[torch.Tensor] | None = None,
    order: Sequence[int] | None = None,
) -> list[Observed]:
    """Log-probabilities of ``rows`` under ``model``, padded on the right in batches.

    Args:
        model: a causal language model of transformers.
        rows: token ids.
        batch_size: rows that go through the model together.
        pad_id: any valid token.
        tops: for each row the token ids [T, K] to keep; default: the model's ``TOP`` best.
        order: in which the rows are put into batches; default: by length.

    Raises:
        ValueError: the logits hold NaN or Inf.
    """
    device = next(model.parameters()).device
    found: list[Observed | None] = [None] * len(rows)
    order = order or sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(rows[i]) for i in chosen)
        ids = [[*rows[i], *[pad_id] * (width - len(rows[i]))] for i in chosen]
        mask = [[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in chosen]
        logits = model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            use_cache=False,
        ).logits
        for j, i in enumerate(chosen):
            n = len(rows[i])
            logp = torch.log_softmax(logits[j, : n - 1].float(), dim=-1).cpu()
            if not torch.isfinite(logp).all():
                raise ValueError(f"the model's log-probabilities of row {i} hold NaN or Inf")
            found[i] = _kept(logp, rows[i], None if tops is None else tops[i])
    return [o for o in found if o is not None]


def _kept(logp: torch.Tensor, row: Sequence[int], top: torch.Tensor | None) -> Observed:
    following = torch.tensor(row[1:])[:, None]
    if top is None:
        top = logp.topk(min(TOP, logp.shape[-1]), dim=-1).indices.int()
    return Observed(
        logp=logp.gather(-1, following)[:, 0],
        best=logp.argmax(-1),
        top_ids=top,
        top_logp=logp.gather(-1, top.long()),
    )


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
) -> list[list[int]]:
    """Greedy completions of ``prompts``, by the sampler of training and evaluation."""
    completions = sample(
        model,
        prompts,
        [],
        SamplingParams(max_new_tokens, temperature=0.0),
        eos_ids=eos_ids,
        pad_id=pad_id,
        batch_size=batch_size,
    )
    return [completion.tokens for completion in completions]


# --- comparing ----------------------------------------------------------------------------------


def compare(
    reference: Sequence[Observed],
    other: Sequence[Observed],
    greedy: tuple[Sequence[list[int]], Sequence[list[int]]] | None = None,
) -> Differences:
    """``other`` against ``reference``; both kept the same ``top_ids``.

    ``greedy``: completions of the same prompts by the reference and by the other.
    """
    logp = [torch.cat([o.logp for o in side]).double() for side in (reference, other)]
    gap = (logp[1] - logp[0]).abs()
    best = [torch.cat([o.best for o in side]) for side in (reference, other)]
    kl = [
        bucketed_kl(a.top_logp.double(), b.top_logp.double())
        for a, b in zip(reference, other, strict=True)
    ]
    return Differences(
        logp_mean=gap.mean().item(),
        logp_p99=gap.quantile(0.99).item(),
        kl_mean=torch.cat(kl).mean().item(),
        top1=(best[0] != best[1]).double().mean().item(),
        perplexity=abs((logp[0].mean() - logp[1].mean()).exp().item() - 1.0),
        greedy=0.0 if greedy is None else greedy_difference(*greedy),
    )


def bucketed_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL [T] of log-probabilities [T, K] of the same tokens, the rest of each as one token.

    A token that is -inf in one of the two is part of the rest in both.
    """
    tiny = torch.finfo(p.dtype).tiny
    known = torch.isfinite(p) & torch.isfinite(q)
    p, q = p.masked_fill(~known, -torch.inf), q.masked_fill(~known, -torch.inf)
    rest = [(1.0 - x.exp().sum(-1)).clamp_min(1e-12) for x in (p, q)]
    inside = (p.exp() * (p - q)).nan_to_num(0.0).sum(-1)
    outside = rest[0] * (rest[0].clamp_min(tiny) / rest[1].clamp_min(tiny)).log()
    return (inside + outside).clamp_min(0.0)


def greedy_difference(reference: Sequence[list[int]], other: Sequence[list[int]]) -> float:
    """Share of the reference's tokens that come after the first difference."""
    same = total = 0
    for a, b in zip(reference, other, strict=True):
        agree = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        same += min(len(a), len(b)) if agree is None else agree
        total += max(len(a), 1)
    return 1.0 - same / max(total, 1)


# --- the floor ----------------------------------------------------------------------------------


@contextmanager
def perturbed(model: Any, seed: int) -> Iterator[None]:
    """Inside, the residual stream moves by one unit in the last place, at random."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        moved = one_ulp(hidden, generator)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    layers = [m for name, m in model.named_modules() if _DECODER_LAYER.search(name)]
    if not layers:
        raise ValueError("the model has no decoder layers 'layers.N'; its noise cannot be measured")
    handles = [m.register_forward_hook(hook) for m in (model.get_input_embeddings(), *layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def one_ulp(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``x`` with every element one unit in the last place up, down, or as it is; zeros stay."""
    integer = _PATTERNS[x.dtype]
    step = torch.randint(-1, 2, x.shape, generator=generator, device=x.device).to(integer)
    movable = torch.isfinite(x) & (x != 0)
    return (x.contiguous().view(integer) + step * movable).view(x.dtype)


def measure_noise(
    model: Any,
    rows: Sequence[Sequence[int]],
    reference: Sequence[Observed],
    greedy: Sequence[list[int]],
    *,
    seeds: int,
    batch_size: int,
    pad_id: int,
    decode: Callable[[Any, int], list[list[int]]],
) -> NoiseFloor:
    """The noise floor of ``model`` on ``rows``.

    Args:
        reference, greedy: what ``observe`` and ``generate`` gave with ``batch_size``.
        seeds: of the perturbation.
        decode: (model, batch size) to greedy completions of the same prompts as ``greedy``.
    """
    tops = [o.top_ids for o in reference]
    variants: dict[str, Differences] = {}
    example: list[float] = []

    def measure(name: str, size: int, order: Sequence[int] | None = None) -> list[Observed]:
        seen = observe(model, rows, batch_size=size, pad_id=pad_id, tops=tops, order=order)
        variants[name] = compare(reference, seen, (greedy, decode(model, size)))
        return seen

    measure("each row alone", 1)
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    measure("other batches", max(2, batch_size // 2 + 1), shuffled)
    for seed in range(seeds):
        with perturbed(model, seed):
            seen = measure(f"1 ulp, seed {seed}", batch_size)
        if not example:
            pairs = zip(reference, seen, strict=True)
            example = torch.cat([(b.logp - a.logp).abs() for a, b in pairs]).tolist()
    positions = sum(len(o.logp) for o in reference)
    return NoiseFloor(variants, positions, sum(map(len, greedy)), example)
