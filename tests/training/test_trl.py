"""The DAPO loss and its gradient equal those of an independent implementation, TRL.

One fixed batch on one tiny model: both advantage signs, old log-probabilities perturbed so that
both clips act, truncated rows. TRL's normaliser spans a generation batch and is rescaled to one
accumulation window; both are the same thing where ``steps_per_generation`` equals the accumulation
steps, as set here. TRL has no dynamic sampling, no dual clip and one update a rollout in this
setting; ``test_updates.py`` covers those.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from npu_qat.config import LoraSection, Recipe
from npu_qat.layers import add_lora, prepare_model
from npu_qat.training.batches import Sample, collate, completion_logp, micro_batches
from npu_qat.training.dapo import dapo_token_loss, group_advantages, tis_weight
from tests.training.tiny import tiny_model

trl = pytest.importorskip("trl", reason="the reference implementation is the extra 'trl'")

LOW, HIGH, CAP = 0.2, 0.28, 2.0
EOS = 2
GROUPS, SIZE, MICRO = 4, 8, 4


@pytest.fixture(scope="module")
def adapted() -> torch.nn.Module:
    """A quantised tiny model with adapters that are not zero."""
    model = tiny_model()
    prepare_model(model, Recipe())
    peft_model = add_lora(model, LoraSection(r=4, alpha=8), seed=0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return peft_model.train()


@pytest.fixture(scope="module")
def trainer(adapted: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real GRPOTrainer, of which only the loss is used."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, "<eos>": EOS} | {f"w{i}": i for i in range(3, 96)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    args = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        loss_type="dapo",
        epsilon=LOW,
        epsilon_high=HIGH,
        beta=0.0,
        num_generations=SIZE,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=GROUPS * SIZE // MICRO,
        steps_per_generation=GROUPS * SIZE // MICRO,
        mask_truncated_completions=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    made = trl.GRPOTrainer(
        model=adapted,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["w3"] * 4}),
        processing_class=tokenizer,
    )
    # What the training loop sets before each accumulation window.
    made.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    yield made


@pytest.fixture(scope="module")
def samples(adapted: torch.nn.Module) -> list[Sample]:
    """Groups of eight; a completion that does not end in EOS is truncated and has no weight."""
    rng = random.Random(4)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 96) for _ in range(rng.randint(low, high))]

    made = []
    for group in range(GROUPS):
        prompt = tokens(3, 7)
        advantages = group_advantages([float(rng.random() < 0.5) for _ in range(SIZE)])
        for i, advantage in enumerate(advantages):
            truncated = i % 4 == group
            completion = tokens(10, 10) if truncated else [*tokens(2, 8), EOS]
            made.append(Sample(prompt, completion, 0.0 if truncated else 1.0, advantage))
    batch = collate(made, 0, torch.device("cpu"))
    with torch.no_grad():
        logp = completion_logp(adapted, batch)
    spread = torch.randn(logp.shape, generator=torch.Generator().manual_seed(0)) * 0.4
    rollout = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1)) * 0.6
    return [
        Sample(
            s.prompt,
            s.completion,
            s.weight,
            s.advantage,
            rollout_logp=(logp + spread + rollout)[i, : len(s.completion)].tolist(),
            old_logp=(logp + spread)[i, : len(s.completion)].tolist(),
        )
        for i, s in enumerate(made)
    ]


def mine(model: torch.nn.Module, samples: list[Sample], *, tis: bool) -> tuple[float, dict]:
    """Loss and gradients of one update by this program's pieces."""
    model.zero_grad()
    tokens, total, acted = sum(s.tokens for s in samples), 0.0, [0.0, 0.0]
    for micro in micro_batches(samples, MICRO, 0, 1):
        batch = collate(micro, 0, torch.device("cpu"))
        logp, old = completion_logp(model, batch), batch.old_logp
        losses = dapo_token_loss(
            logp,
            old,
            batch.advantage,
            clip_low=LOW,
            clip_high=HIGH,
            tis_weight=tis_weight(old, batch.rollout_logp, CAP) if tis else None,
        )
        ratio = (logp - old).exp()
        acted[0] += float(((ratio < 1 - LOW) & (batch.advantage < 0)).mul(batch.mask).sum())
        acted[1] += float(((ratio > 1 + HIGH) & (batch.advantage > 0)).mul(batch.mask).sum())
        loss = (losses * batch.mask).sum() / tokens
        loss.backward()
        total += float(loss.detach())
    assert min(acted) > 2, "both clips should act"
    return total, gradients(model)


def theirs(trainer: Any, samples: list[Sample], *, tis: bool) -> tuple[float, dict]:
    """The same by TRL: padded prompts and completions, masks, ``num_items_in_batch``."""
    trainer.model.zero_grad()
    total, tokens = 0.0, sum(s.tokens for s in samples)
    for start in range(0, len(samples), MICRO):
        rows = samples[start : start + MICRO]
        batch = collate(rows, 0, torch.device("cpu"))
        width = max(len(s.prompt) for s in rows)
        truncated = torch.tensor([[s.completion[-1] != EOS] for s in rows])
        completion_mask = batch.attention_mask[:, width:] * ~truncated
        inputs = {
            "prompt_ids": batch.input_ids[:, :width],
            "prompt_mask": batch.attention_mask[:, :width],
            "completion_ids": batch.completion,
            "completion_mask": completion_mask.int(),
            "advantages": batch.advantage[:, 0],
            "old_per_token_logps": batch.old_logp,
            "num_items_in_batch": torch.tensor(tokens),
            "importance_sampling_ratio": tis_ratio(batch.old_logp, batch.rollout_logp),
        }
        trainer.use_vllm = tis
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        total += float(loss.detach())
    return total, gradients(trainer.model)


def tis_ratio(old: torch.Tensor, rollout: torch.Tensor) -> torch.Tensor:
    """As TRL computes it in vllm_importance_sampling_mode "token_truncate"."""
    return torch.clamp(torch.exp(old - rollout), max=CAP)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tis", [False, True])
def test_loss_and_gradient_equal_those_of_trl(
    adapted: torch.nn.Module,
    trainer: Any,
    samples: list[Sample],
    tis: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {s.advantage > 0 for s in samples} == {True, False}
    assert 2 <= sum(s.weight == 0 for s in samples) < len(samples)
    monkeypatch.setattr(trainer, "use_vllm", tis)
    loss, gradient = mine(adapted, samples, tis=tis)
    reference, reference_gradient = theirs(trainer, samples, tis=tis)
    assert loss == pytest.approx(reference, rel=1e-5)
    assert gradient.keys() == reference_gradient.keys() and len(gradient) == 28
    for name, value in gradient.items():
        wanted = reference_gradient[name]
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6 + 1e-5 * wanted.abs().max())
        assert wanted.abs().max() > 0


def test_the_reference_can_tell_a_wrong_normaliser(
    adapted: torch.nn.Module, trainer: Any, samples: list[Sample]
) -> None:
    """Counting the truncated rows' tokens would show."""
    counted = [Sample(**{**vars(s), "weight": 1.0}) for s in samples]
    loss, _ = mine(adapted, counted, tis=False)
    reference, _ = theirs(trainer, samples, tis=False)
    assert loss != pytest.approx(reference, rel=1e-2)


def test_advantages_equal_those_of_trl() -> None:
    """Its formula for ``scale_rewards="group"``, which lies in the middle of a long method."""
    assert "advantages = advantages / (std_rewards + 1e-4)" in inspect.getsource(trl.GRPOTrainer)
    rng = random.Random(7)
    rewards = torch.tensor(
        [[rng.choice([0.0, 1.0]) - rng.random() for _ in range(8)] for _ in range(5)]
    )
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    wanted = (rewards - mean) / (std + 1e-4)
    for row, advantages in zip(rewards.tolist(), wanted.tolist(), strict=True):
        assert group_advantages(row) == pytest.approx(advantages, rel=1e-5)
