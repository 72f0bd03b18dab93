"""The cache that does not move, and the recorded step, give what the plain ones give."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from npu_qat.training import rollout
from npu_qat.training.decode import RecordedStep, RoomyLayer, can_record, roomy_cache
from tests.training.test_rollout import decode, prompts
from tests.training.tiny import tiny_model

IDS = torch.tensor([[0, 5, 6, 7], [3, 4, 5, 6], [0, 0, 8, 9]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])


def forward(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, cache: object):
    position = mask.cumsum(-1).sub(1).clamp(min=0)[:, -ids.shape[1] :]
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1]


@torch.no_grad()
def test_the_roomy_cache_gives_the_logits_of_the_dynamic_one_bit_for_bit() -> None:
    model = tiny_model()
    caches = [DynamicCache(config=model.config), roomy_cache(model.config, 9)]
    mask, ids = MASK, IDS
    for step in range(5):
        wanted, found = (forward(model, ids, mask, cache) for cache in caches)
        assert torch.equal(wanted, found)
        if step == 2:
            keep = torch.tensor([0, 2])
            for cache in caches:
                cache.batch_select_indices(keep)
            mask, wanted = mask[keep], wanted[keep]
        ids = wanted.argmax(-1)[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


@torch.no_grad()
def test_the_roomy_cache_never_moves() -> None:
    model, cache = tiny_model(), roomy_cache(tiny_model().config, 9)
    forward(model, IDS, MASK, cache)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    forward(model, IDS[:, :1], torch.cat([MASK, MASK[:, -1:]], 1), cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert [layer.get_seq_length() for layer in cache.layers] == [5] * len(before)


@torch.no_grad()
def test_a_step_of_fixed_shapes_computes_the_same_distribution() -> None:
    model = tiny_model()
    plain, fixed = (roomy_cache(model.config, 12) for _ in range(2))
    wanted = forward(model, IDS, MASK, plain)
    forward(model, IDS, MASK, fixed)
    step = RecordedStep(model, fixed, MASK, MASK.sum(-1, keepdim=True))
    mask = MASK
    for _ in range(4):
        token = wanted.argmax(-1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        wanted = forward(model, token[:, None], mask, plain)
        torch.testing.assert_close(step(token), wanted)


def test_rollouts_by_recorded_steps_sample_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rows = tiny_model(), prompts(20)
    wanted = decode(model, rows)
    used: list[int] = []
    call = RecordedStep.__call__

    def watch(self: RecordedStep, token: torch.Tensor) -> torch.Tensor:
        used.append(len(token))
        return call(self, token)

    monkeypatch.setattr(RecordedStep, "__call__", watch)
    monkeypatch.setattr(rollout, "can_record", lambda model, cache: True)
    found = decode(model, rows)
    assert [c.tokens for c in found] == [c.tokens for c in wanted]
    assert max(used) == 20 and min(used) < 20


def test_only_a_gpu_records() -> None:
    model = tiny_model()
    assert not can_record(model, roomy_cache(model.config, 4))


def test_a_model_that_someone_hooks_into_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    cache = roomy_cache(model.config, 4)
    gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(model, "parameters", lambda: iter([gpu]))
    assert can_record(model, cache)
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert not can_record(model, cache)
    handle.remove()
    assert can_record(model, cache)


@torch.no_grad()
def test_hooks_that_serve_training_neither_prevent_a_recording_nor_run_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed's synchronises, which a recording forbids; rollouts of a run had no graph."""
    model = tiny_model()
    cache = roomy_cache(model.config, 12)
    forward(model, IDS, MASK, cache)

    def of_deepspeed(*args: object) -> None:
        raise AssertionError("called while recording")

    of_deepspeed.__module__ = "deepspeed.runtime.engine"
    model.register_forward_pre_hook(of_deepspeed)
    model.enable_input_require_grads()
    gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    with monkeypatch.context() as patch:
        patch.setattr(model, "parameters", lambda: iter([gpu]))
        assert can_record(model, cache)
        of_deepspeed.__module__ = "deepspeed.runtime.zero.parameter_offload"
        assert not can_record(model, cache)
    step = RecordedStep(model, cache, MASK, MASK.sum(-1, keepdim=True))
    assert torch.isfinite(step(IDS[:, -1])).all()


def test_layers_with_a_sliding_window_stay_what_they_are() -> None:
    config = tiny_model().config
    config.layer_types = ["sliding_attention", *config.layer_types[1:]]
    config.sliding_window = 4
    layers = roomy_cache(config, 9).layers
    assert not isinstance(layers[0], RoomyLayer) and isinstance(layers[1], RoomyLayer)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:decoding goes on without")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_cuda_graph_samples_what_plain_steps_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, where the two kernels' sums differ too little to change a token."""
    model, rows = tiny_model().cuda(), prompts(20)
    recorded = decode(model, rows)
    monkeypatch.setattr(rollout, "can_record", lambda model, cache: False)
    assert [c.tokens for c in recorded] == [c.tokens for c in decode(model, rows)]


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:decoding goes on without")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("storage", ["image", "packed"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_quantised_model_with_adapters_can_be_recorded(storage: str, adapters: bool) -> None:
    from npu_qat.backends import select
    from npu_qat.bench import models

    selection = select("cuda")
    model = models.random_model(models.architecture(models.DEMO), selection.device)
    recipe = models.recipe(storage)
    if adapters:
        model, _ = models.quantized_lora(model, recipe, selection)
    else:
        from npu_qat.layers import prepare_model

        prepare_model(model, recipe, selection.backend)
    assert len(decode(model.eval(), prompts(20))) == 20
