"""The formulas of memory, against what autograd and the cache really keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from npu_qat.planning import memory
from npu_qat.planning.cases import Update
from npu_qat.planning.facts import ModelFacts
from npu_qat.planning.memory import (
    FP32,
    GIB,
    Layout,
    Load,
    activations,
    adapter_states,
    kv_cache,
    loss_work,
    predict_memory,
)
from npu_qat.planning.worker import profiled_peak, update_batches
from npu_qat.training import batches
from npu_qat.training.batches import collate, completion_logp
from npu_qat.training.decode import roomy_cache
from tests.planning.models import FusingBackend, adapted_model, facts_of_small, small_architecture

CPU = torch.device("cpu")


def saved_bytes(adapted: Any, handle: Any, update: Update) -> int:
    """Bytes that autograd keeps of one forward pass up to the loss, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    batch = collate(update_batches(update, 512)[0], 0, CPU)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), handle.phase("training"):
        loss = completion_logp(adapted, batch).sum()
    found = sum(storage.nbytes() for storage in kept.values())
    del loss
    return found


def load_of(update: Update) -> Load:
    return Load(
        update.sequences, update.tokens, update.tokens - update.tokens // 4, padded=update.ragged
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen3-8b"])
def test_saved_activations_are_those_that_autograd_saves(
    name: str, fused: bool, ragged: bool
) -> None:
    update = Update(4, 96, ragged=ragged)
    adapted, handle = adapted_model(name, backend=FusingBackend() if fused else None)
    facts, load = facts_of_small(name), load_of(update)
    layout = Layout(fused=fused)
    # Of the loss, only the log-probabilities are kept until the backward pass.
    logits = FP32 * load.sequences * load.completion * facts.vocabulary
    predicted = activations(facts, layout, load)["activations"] + logits
    measured = saved_bytes(adapted, handle, update)
    assert measured == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("fused", [False, True])
def test_checkpointing_keeps_the_inputs_of_layers(fused: bool) -> None:
    update = Update(4, 96, checkpointing=True)
    adapted, handle = adapted_model(backend=FusingBackend() if fused else None, num_hidden_layers=4)
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    facts, load = facts_of_small(num_hidden_layers=4), load_of(update)
    layout = Layout(fused=fused, checkpointing=True)
    inputs = 4 * load.sequences * load.tokens * facts.hidden * facts.item
    logits = FP32 * load.sequences * load.completion * facts.vocabulary
    predicted = activations(facts, layout, load)["layer inputs"]
    measured = saved_bytes(adapted, handle, update) - logits
    assert inputs < predicted < 2.5 * inputs
    # What the layers share (rotary tables, the mask) is kept by their closures, not by autograd.
    assert inputs <= measured <= predicted


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("vocabulary", [512, 8192])
def test_the_peak_of_an_update_is_predicted(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int, rows: int
) -> None:
    """Forward and backward of real passes; with the larger vocabulary the loss comes in pieces."""
    monkeypatch.setattr(batches, "CHUNK_ELEMENTS", 2**19)
    update = Update(rows, 128)
    adapted, handle = adapted_model(vocab_size=vocabulary)
    facts, load = facts_of_small(vocab_size=vocabulary), load_of(update)

    def run() -> None:
        batch = collate(update_batches(update, 512)[0], 0, CPU)
        with handle.phase("training"):
            completion_logp(adapted, batch).sum().backward()
        adapted.zero_grad(set_to_none=True)

    run()
    predicted = sum(activations(facts, Layout(fused=False), load).values())
    predicted += FP32 * facts.lora_parameters  # the gradients
    assert profiled_peak(run) == pytest.approx(predicted, rel=0.06)


def test_the_cache_has_the_predicted_size() -> None:
    facts = facts_of_small()
    load = Load(1, 1, 1, rollout_rows=3, prompt=17, new_tokens=10)
    cache = roomy_cache(small_architecture(), load.prompt + load.new_tokens)
    states = torch.zeros(3, 2, load.prompt, 32, dtype=torch.bfloat16)
    for i in range(facts.layers):
        cache.update(states, states, i)
    rooms = [room for layer in cache.layers for room in layer._rooms]
    assert kv_cache(facts, load) == sum(r.numel() * r.element_size() for r in rooms)


# ---------------------------------------------------------------- properties


@pytest.fixture
def facts() -> ModelFacts:
    return facts_of_small()


LOAD = Load(4, 256, 192, rollout_rows=8, prompt=64, new_tokens=192)


@pytest.mark.parametrize("field", ["sequences", "tokens", "completion", "rollout_rows"])
def test_more_work_never_needs_less(facts: ModelFacts, field: str) -> None:
    peaks = [
        predict_memory(facts, Layout(), replace(LOAD, **{field: n * getattr(LOAD, field)})).peak
        for n in (1, 2, 4)
    ]
    assert peaks == sorted(peaks)
    totals = [
        sum(
            predict_memory(
                facts, Layout(), replace(LOAD, **{field: n * getattr(LOAD, field)})
            ).total(p)
            for p in ("update", "rollout")
        )
        for n in (1, 2, 4)
    ]
    assert totals[0] < totals[1] < totals[2]


def test_checkpointing_and_packing_need_less() -> None:
    image, packed = (
        facts_of_small(num_hidden_layers=8),
        facts_of_small(storage="packed", num_hidden_layers=8),
    )
    plain = predict_memory(image, Layout(), LOAD)
    again = predict_memory(image, Layout(checkpointing=True), LOAD)
    four = predict_memory(packed, Layout(), LOAD)
    assert again.total("update") < plain.total("update")
    assert four.phases["update"]["base"] < image.bytes_stored / 2
    # The 16-bit weights of a packed base are on the device in turns.
    assert plain.phases["load"]["base in 16 bits"] == image.bytes_loaded
    assert four.total("load") < plain.total("load") < 2 * image.bytes_loaded


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_states_are_shared_out_and_the_bucket_is_not(facts: ModelFacts, zero: int) -> None:
    whole = FP32 * facts.lora_parameters
    one, four = (adapter_states(facts, Layout(n, zero)) for n in (1, 4))
    assert one["LoRA, Adam moments"] == 2 * whole and one["LoRA, fp32 gradients"] == whole
    assert four["LoRA, Adam moments"] == whole // 2
    assert four["gradient bucket"] == one["gradient bucket"] == 4 * 500_000_000
    assert adapter_states(facts, Layout(4, zero, bucket=7))["gradient bucket"] == 28


def test_stage_3_shares_the_base_in_updates_only() -> None:
    facts = replace(facts_of_small(), parameters=4 * 10**9, bytes_stored=8 * 10**9)
    found = predict_memory(facts, Layout(4, 3), LOAD)
    update = found.phases["update"]
    assert update["base, this device's share"] == 2 * 10**9
    assert update["base, gathered"] == pytest.approx(2.1e9, rel=0.01)
    assert found.phases["rollout"]["base, whole"] == 8 * 10**9
    assert found.phases["shard"]["base, whole"] == 8 * 10**9


def test_what_else_holds_a_model_is_counted(facts: ModelFacts) -> None:
    taught = predict_memory(facts, Layout(teacher=True), LOAD)
    assert all("teacher in 16 bits" in parts for parts in taught.phases.values())
    compensated = predict_memory(facts, Layout(compensation=True), LOAD)
    assert compensated.total("compensate") > 2 * GIB
    # A linear of 8192 x 32768: its sums in fp64, and the decomposition of one of them.
    wide = replace(facts, hidden=8192, intermediate=32768)
    statistics = predict_memory(wide, Layout(compensation=True), LOAD).phases["compensate"]
    assert statistics["statistics of inputs"] == (10 + 24) * GIB
    assert "rollout" not in predict_memory(facts, Layout(), Load(1, 8, 8)).phases


def test_the_loss_works_on_pieces(monkeypatch: pytest.MonkeyPatch, facts: ModelFacts) -> None:
    row = LOAD.completion * facts.vocabulary
    monkeypatch.setattr(batches, "CHUNK_ELEMENTS", 100 * row)
    assert loss_work(facts, LOAD) == 12 * 4 * row
    monkeypatch.setattr(batches, "CHUNK_ELEMENTS", 1)
    assert loss_work(facts, LOAD) == (2 * (2 * 4 - 1) + 12) * row
    assert loss_work(facts, replace(LOAD, completion=0)) == 0


def test_a_mask_is_needed_only_where_rows_differ(facts: ModelFacts) -> None:
    def saved(load: Load) -> int:
        return activations(facts, Layout(), load)["activations"]

    assert saved(replace(LOAD, padded=False)) < saved(LOAD)
    one = replace(LOAD, sequences=1)
    assert saved(replace(one, padded=False)) == saved(one)


def test_the_worst_phase_is_named(facts: ModelFacts) -> None:
    found = memory.Memory({"load": {"a": 1}, "update": {"a": 1, "b": 2}})
    assert (found.peak_phase, found.peak, found.total("load")) == ("update", 3, 1)
