"""The work of a pass is what PyTorch counts; times move with what they should move with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from npu_qat.config import RunConfig
from npu_qat.planning.calibration import NEUTRAL
from npu_qat.planning.cases import Update
from npu_qat.planning.facts import ModelFacts
from npu_qat.planning.hardware import Hardware
from npu_qat.planning.memory import Layout, Load
from npu_qat.planning.steps import (
    PACKED_ROWS,
    gradient_seconds,
    micro_batch_work,
    pass_seconds,
    predict_step,
    token_work,
)
from npu_qat.planning.worker import update_batches
from npu_qat.training.batches import collate, completion_logp
from tests.planning.models import adapted_model, facts_of_small

CHIP = Hardware("chip", "cuda", 80e9, 1e14, None, None, 1e12, 1e11)
LOAD = Load(4, 128, 96, rollout_rows=16, prompt=32, new_tokens=96)


@pytest.fixture
def facts() -> ModelFacts:
    return facts_of_small()


def counted(update: Update, *, backward: bool) -> int:
    """Floating-point operations of a real pass, without attention, which a CPU kernel hides."""
    adapted, handle = adapted_model()
    if update.checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(update_batches(update, 512)[0], 0, torch.device("cpu"))
    with handle.phase("training"), FlopCounterMode(display=False) as counter:
        loss = completion_logp(adapted, batch).sum()
        if backward:
            loss.backward()
    by_operator = counter.get_flop_counts()["Global"]
    return sum(n for operator, n in by_operator.items() if "attention" not in str(operator))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_matmuls_are_those_that_are_made(
    facts: ModelFacts, checkpointing: bool, backward: bool
) -> None:
    update = Update(4, 128, checkpointing)
    layout = Layout(checkpointing=checkpointing)
    # A model whose heads have no width has the same matmuls, and no attention.
    without = replace(facts, head_dim=0)
    predicted = micro_batch_work(without, layout, LOAD, backward=backward).flops
    # The first layer needs no gradient of the embeddings, which the formula counts: 1 part in 8.
    assert counted(update, backward=backward) == pytest.approx(predicted, rel=0.08)


def test_attention_costs_the_square_of_the_length(facts: ModelFacts) -> None:
    def attention(load: Load) -> float:
        whole = micro_batch_work(facts, Layout(), load).flops
        return whole - micro_batch_work(replace(facts, head_dim=0), Layout(), load).flops

    one, two = attention(LOAD), attention(replace(LOAD, sequences=1, tokens=512))
    assert two == pytest.approx(one * 4 / 2)  # a single row needs no mask and skips half
    # 4 forward and 10 backward for each pair of tokens and element of the queries.
    assert one == 14 * 4 * 128 * 128 * facts.query_width * facts.layers


@pytest.mark.parametrize(
    "change",
    [{"flops": 2e14}, {"bandwidth": 2e12}],
)
def test_a_better_device_is_faster(facts: ModelFacts, change: dict[str, float]) -> None:
    efficiency = replace(NEUTRAL, activation_moves=2.0, logit_moves=2.0)
    work = micro_batch_work(facts, Layout(), LOAD)
    slow = pass_seconds(work, CHIP, efficiency)
    assert pass_seconds(work, replace(CHIP, **change), efficiency) < slow


def test_a_slow_host_is_what_is_waited_for(facts: ModelFacts) -> None:
    work = micro_batch_work(facts, Layout(), LOAD)
    efficiency = replace(NEUTRAL, forward_host_seconds=1.0, backward_host_seconds=3.0)
    assert pass_seconds(work, CHIP, efficiency) == facts.layers * (1 + 3)
    again = micro_batch_work(facts, Layout(checkpointing=True), LOAD)
    assert pass_seconds(again, CHIP, efficiency) == facts.layers * (2 + 3)
    alone = micro_batch_work(facts, Layout(), LOAD, backward=False)
    assert pass_seconds(alone, CHIP, efficiency) == facts.layers


def test_decoding_reads_what_is_stored() -> None:
    image, packed = facts_of_small(), facts_of_small(storage="packed")
    few = replace(LOAD, rollout_rows=PACKED_ROWS)
    many = replace(LOAD, rollout_rows=PACKED_ROWS + 1)
    assert token_work(packed, few).weights < token_work(image, few).weights
    # Above that a packed base is decoded for each token.
    assert token_work(packed, many).weights > token_work(image, many).weights
    assert token_work(image, few).weights == token_work(image, many).weights


def test_an_untied_head_leaves_the_embeddings_unread() -> None:
    facts = facts_of_small("llama-3-8b")
    tied = replace(facts, tied=True)
    head = facts.item * facts.hidden * facts.vocabulary
    assert token_work(tied, LOAD).weights - token_work(facts, LOAD).weights == head


def test_one_device_adds_nothing_up(facts: ModelFacts) -> None:
    def seconds(devices: int) -> float:
        return gradient_seconds(facts, Layout(devices), CHIP, NEUTRAL)

    assert seconds(1) == 0.0
    bytes_sent = 2 * 3 / 4 * 4 * facts.lora_parameters
    assert seconds(4) == pytest.approx(bytes_sent / 1e11)


def test_more_devices_share_a_step(facts: ModelFacts) -> None:
    config = RunConfig()
    times = [predict_step(facts, Layout(n), LOAD, config, CHIP, NEUTRAL) for n in (1, 2, 4)]
    assert times[0].total > times[1].total > times[2].total
    assert times[0].micro_batches == 2 * times[1].micro_batches == 4 * times[2].micro_batches
    assert all(0 < time.generation_share < 1 for time in times)
    # 256 prompts of 8 completions, 16 at a time, 96 tokens each.
    assert times[0].decoding_steps == 256 * 8 // 16 * 96


def test_a_step_of_supervised_learning_has_no_rollout(facts: ModelFacts) -> None:
    config = RunConfig.model_validate({"train": {"method": "sft"}})
    time = predict_step(facts, Layout(), LOAD, config, CHIP, NEUTRAL)
    assert time.rollout == time.old_policy == 0.0
    assert time.micro_batches == 64 // 4
    parts = time.forward_backward + time.optimizer + time.communication
    assert time.total == pytest.approx(parts)


def test_stage_3_pays_for_gathering(facts: ModelFacts) -> None:
    slow = replace(NEUTRAL, zero3_layer_seconds=1e-3)
    plain = predict_step(facts, Layout(4, 0), LOAD, RunConfig(), CHIP, slow)
    shared = predict_step(facts, Layout(4, 3), LOAD, RunConfig(), CHIP, slow)
    assert shared.communication > plain.communication
    work = micro_batch_work(facts, Layout(4, 3), LOAD)
    assert work.gathered == facts.bytes_stored * 2 * 3 / 4
    assert micro_batch_work(facts, Layout(1, 3), LOAD).gathered == 0
