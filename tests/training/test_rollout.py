"""Sampling: what transformers generates, what the trainer computes, row by row reproducible."""

from __future__ import annotations

import random

import pytest
import torch

from npu_qat.config import Recipe
from npu_qat.layers import prepare_model
from npu_qat.training import rollout
from npu_qat.training.batches import Sample, collate, completion_logp
from npu_qat.training.engine import TrainingError
from npu_qat.training.rollout import Completion, SamplingParams, draw, row_uniforms, sample
from tests.training.tiny import tiny_model

CPU = torch.device("cpu")
EOS = [7, 11, 23, 42, 55, 60, 71, 80]  # many, so that rows end at different times


def prompts(count: int = 12, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 96) for _ in range(rng.randint(2, 9))] for _ in range(count)]


def keys(count: int = 12, step: int = 0) -> list[tuple[int, ...]]:
    return [(0, step, i, 0) for i in range(count)]


def decode(model: torch.nn.Module, rows: list[list[int]], **changes: object) -> list[Completion]:
    settings = {
        "params": SamplingParams(16),
        "eos_ids": EOS,
        "pad_id": 0,
        "batch_size": 64,
        "keys": keys(len(rows)),
    } | changes
    return sample(model, rows, **settings)


def generated(model: torch.nn.Module, rows: list[list[int]], new: int) -> list[list[int]]:
    """Greedy completions by transformers, the end token included."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    found = []
    for row in out[:, width:].tolist():
        end = next((i for i, t in enumerate(row) if t in EOS), len(row) - 1)
        found.append(row[: end + 1])
    return found


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("quantised", [False, True])
def test_greedy_decoding_is_that_of_transformers(family: str, quantised: bool) -> None:
    model = tiny_model(family)
    if quantised:
        prepare_model(model, Recipe())
    rows = prompts()
    mine = decode(model, rows, params=SamplingParams(16, temperature=0.0), keys=[])
    assert [c.tokens for c in mine] == generated(model, rows, 16)
    assert len({len(c.tokens) for c in mine}) > 1, "rows should end at different times"


def test_greedy_log_probabilities_are_those_of_the_model_itself() -> None:
    model, rows = tiny_model(), prompts()
    for row, c in zip(rows, decode(model, rows, params=SamplingParams(8, 0.0)), strict=True):
        with torch.no_grad():
            batch = collate([Sample(row, c.tokens)], 0, CPU)
            wanted = completion_logp(model, batch)[0]
        torch.testing.assert_close(torch.tensor(c.logp), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("quantised", [False, True])
def test_sampled_log_probabilities_are_the_trainers(temperature: float, quantised: bool) -> None:
    """The gap between rollout and training, with noise off and in fp32, is rounding."""
    model = tiny_model()
    if quantised:
        prepare_model(model, Recipe())
    rows = prompts(24)
    found = decode(model, rows, params=SamplingParams(16, temperature))
    batch = collate([Sample(r, c.tokens) for r, c in zip(rows, found, strict=True)], 0, CPU)
    with torch.no_grad():
        trainer = completion_logp(model, batch, temperature)
    for i, c in enumerate(found):
        torch.testing.assert_close(
            torch.tensor(c.logp), trainer[i, : len(c.tokens)], rtol=1e-3, atol=1e-3
        )


def test_a_row_does_not_depend_on_its_companions() -> None:
    model, rows = tiny_model(), prompts(20)
    together = decode(model, rows)
    for size in (1, 3, 7):
        apart = decode(model, rows, batch_size=size)
        assert [c.tokens for c in apart] == [c.tokens for c in together]
    order = list(range(20))
    random.Random(3).shuffle(order)
    mixed = decode(model, [rows[i] for i in order], keys=[keys(20)[i] for i in order])
    assert [c.tokens for c in mixed] == [together[i].tokens for i in order]
    alone = decode(model, [rows[5]], keys=[keys(20)[5]])
    assert alone[0].tokens == together[5].tokens
    assert alone[0].logp == pytest.approx(together[5].logp, abs=1e-4)


def test_the_key_decides_what_is_sampled() -> None:
    model, rows = tiny_model(), [[5, 6, 7]] * 8
    first = decode(model, rows)
    assert decode(model, rows) == first
    assert len({tuple(c.tokens) for c in first}) > 4, "generations of one prompt differ"
    assert [c.tokens for c in decode(model, rows, keys=keys(8, step=1))] != [
        c.tokens for c in first
    ]
    same = decode(model, rows, keys=[(0, 0, 0, 0)] * 8)
    assert len({tuple(c.tokens) for c in same}) == 1


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    decode(tiny_model_quietly(), prompts(4))
    assert torch.equal(torch.get_rng_state(), before)


def tiny_model_quietly() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        return tiny_model()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_finished_rows_may_leave_at_any_time(
    threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0: they never leave; 1: at once. The completions are the same."""
    model, rows = tiny_model(), prompts(20)
    wanted = decode(model, rows)
    widths: list[int] = []
    forward = rollout._Batch._forward

    def watch(self: rollout._Batch) -> torch.Tensor:
        picked = forward(self)
        widths.append(picked.shape[1])
        return picked

    monkeypatch.setattr(rollout._Batch, "_forward", watch)
    monkeypatch.setattr(rollout, "COMPACT_BELOW", threshold)
    found = decode(model, rows)
    assert [c.tokens for c in found] == [c.tokens for c in wanted]
    assert [c.truncated for c in found] == [c.truncated for c in wanted]
    assert (min(widths) == 20) == (threshold == 0.0)


@pytest.mark.parametrize("vocabulary", [5, rollout.CHUNK, 3 * rollout.CHUNK + 7])
def test_a_token_is_where_the_cumulative_sum_passes_the_uniform(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(64, vocabulary, generator=generator) ** 8
    p[p < 0.3] = 0.0  # holes
    p[:, -(vocabulary // 3) :] = 0.0  # and an end without mass, larger than a chunk
    p[:, 0] += 1e-3
    u = torch.rand(64, generator=generator, dtype=torch.float64)
    u[:3] = torch.tensor([0.0, 1.0, 1.0 - 2**-53], dtype=torch.float64)
    cumulative = p.double().cumsum(-1)
    wanted = (cumulative <= (u * cumulative[:, -1])[:, None]).sum(-1)
    wanted = wanted.minimum((p > 0).long().cumsum(-1).argmax(-1))
    found = rollout._invert(p, u)
    assert torch.equal(found, wanted)
    assert (p.gather(1, found[:, None]) > 0).all()


# --- the end --------------------------------------------------------------------------------


def test_every_completion_ends_at_its_first_end_token_or_is_truncated() -> None:
    found = decode(tiny_model(), prompts(30), params=SamplingParams(10))
    ended = [c for c in found if not c.truncated]
    cut = [c for c in found if c.truncated]
    assert ended and cut
    for c in ended:
        assert c.tokens[-1] in EOS and not set(c.tokens[:-1]) & set(EOS)
    for c in cut:
        assert len(c.tokens) == 10 and not set(c.tokens) & set(EOS)
    assert all(len(c.tokens) == len(c.logp) for c in found)


def test_an_end_token_at_the_limit_is_no_truncation() -> None:
    model, rows = tiny_model(), prompts(30)
    longest = decode(model, rows, params=SamplingParams(64))
    for i, c in enumerate(longest):
        if c.truncated:
            continue
        (again,) = decode(
            model, [rows[i]], keys=[keys(30)[i]], params=SamplingParams(len(c.tokens))
        )
        assert again.tokens == c.tokens and not again.truncated
        break
    else:
        pytest.fail("no completion ended")


def test_one_token_and_no_rows() -> None:
    found = decode(tiny_model(), prompts(3), params=SamplingParams(1))
    assert [len(c.tokens) for c in found] == [1, 1, 1]
    assert decode(tiny_model(), []) == []


def test_the_stop_callback_is_asked_for_every_token_and_may_abandon() -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(tiny_model(), prompts(3), eos_ids=[1], stop=stop)
    assert len(calls) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error_not_a_completion(temperature: float) -> None:
    """Drawn from, they give some token; every reward is then 0 and no group ever trains."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(TrainingError, match="NaN or Inf"):
        decode(model, prompts(3), params=SamplingParams(4, temperature))


# --- drawing one token ----------------------------------------------------------------------


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_with_their_probabilities(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    n = 20_000
    u = row_uniforms([(1, 2, 3, 4)], n)[0]
    token, logp = draw(logits.expand(n, 5), SamplingParams(1, temperature), u)
    p = (logits / temperature).softmax(-1)
    assert chi_square(token.bincount(minlength=5).double(), p.double()) < 23.5  # 4 d.f., p = 1e-4
    torch.testing.assert_close(logp, p.log()[token])


def test_nucleus_sampling_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    n = 20_000
    u = row_uniforms([(5,)], n)[0]
    token, logp = draw(p.log().expand(n, 5), SamplingParams(1, top_p=0.75), u)
    # 0.4 + 0.3 = 0.7 is not enough, so 0.15 stays too.
    assert set(token.tolist()) == {1, 3, 4}
    kept = torch.tensor([0.0, 0.4, 0.0, 0.3, 0.15]) / 0.85
    counts = token.bincount(minlength=5).double()[[1, 3, 4]]
    assert chi_square(counts, kept.double()[[1, 3, 4]]) < 18.4  # 2 d.f., p = 1e-4
    torch.testing.assert_close(logp, p.log()[token])  # of the whole distribution


@pytest.mark.parametrize("top_p", [1e-9, 0.4])
def test_a_tiny_nucleus_is_greedy(top_p: float) -> None:
    p = torch.tensor([[0.1, 0.5, 0.4]])
    for u in (0.0, 0.5, 1 - 2**-53):
        token, _ = draw(p.log(), SamplingParams(1, top_p=top_p), torch.tensor([u]).double())
        assert token.tolist() == [1]


@pytest.mark.parametrize("top_p", [1.0, 0.999999])
def test_no_uniform_falls_onto_a_token_of_mass_zero(top_p: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for u, wanted in ((0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-53, 3)):
        token, logp = draw(logits, SamplingParams(1, top_p=top_p), torch.tensor([u]).double())
        assert token.tolist() == [wanted]
        assert float(logp) == pytest.approx(-0.6931, abs=1e-4)


def test_a_large_vocabulary_is_drawn_from_with_enough_digits() -> None:
    """In fp32 the cumulative sum of 150,000 equal masses reaches 0.99 or 1.01, not 1."""
    vocabulary, n = 150_000, 64
    u = (torch.arange(n).double() + 0.5) / n
    token, _ = draw(torch.zeros(n, vocabulary), SamplingParams(1), u)
    torch.testing.assert_close(token.double(), u * vocabulary, rtol=0, atol=2.0, check_dtype=False)


def test_streams_are_uniform_independent_and_prefix_stable() -> None:
    u = row_uniforms([(0, 1, 2, i) for i in range(50)], 200)
    assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()
    assert abs(float(u.mean()) - 0.5) < 0.02
    assert torch.equal(row_uniforms([(0, 1, 2, 7)], 50)[0], u[7, :50])
    correlation = torch.corrcoef(u)
    assert (correlation - torch.eye(50)).abs().max() < 0.35
