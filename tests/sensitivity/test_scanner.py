"""The scan: what it measures is what W4A4 quantises, and the model stays as it is."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from npu_qat.config import ModelConfig, Recipe, load_config
from npu_qat.layers import prepare_model
from npu_qat.layers.base_model import answer_ids, load_base, prompt_ids
from npu_qat.sensitivity import Scan, Text, scan
from npu_qat.sensitivity.loss import LossMeter
from npu_qat.sensitivity.statements import statements
from npu_qat.sensitivity.twins import linears_of, make_twins, unchanged
from npu_qat.tasks import load_task
from tests.sensitivity.models import texts, tiny

NORM_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def quick(model: Any, **changes: Any) -> Scan:
    loss = changes.pop("loss", "none")
    return scan(model, texts(3), Recipe(**changes), loss=loss)


@pytest.fixture(scope="module")
def demo() -> Scan:
    """The demo model, scanned as its preset quantises it."""
    model, tokenizer = load_base(ModelConfig(), torch.device("cpu"))
    config = load_config(preset="demo")
    task = load_task(config.task)
    read = [
        Text(
            tuple(prompt_ids(tokenizer, task.messages(problem))),
            tuple(answer_ids(tokenizer, problem.solution)),
        )
        for problem in task.train[:12]
    ]
    return scan(model, read, config.quant, loss="layer")


# The demo model: what docs/demo-model.md says was put in ------------------------------------------


def test_the_planted_outlier_channel_is_found_in_every_linear_that_reads_a_norm(demo: Scan) -> None:
    """Channel 46 of both norms of all three layers, times 16."""
    assert len(demo.linears) == 21
    for linear in demo.linears:
        assert linear.input is not None
        channels = [outlier.channel for outlier in linear.input.outlier_channels]
        if linear.kind in NORM_READERS:
            assert channels == [46], linear.path
            assert 8 < linear.input.outlier_channels[0].ratio < 32
        else:
            assert 46 not in channels, linear.path
    sentence = next(s for s in statements(demo) if s.startswith("Channel 46"))
    assert "15 of the 15 linears" in sentence and "layers 0, 1, 2" in sentence


def test_the_inputs_with_the_outlier_have_the_larger_error(demo: Scan) -> None:
    for layer in demo.layers:
        inputs = {s.kind: s.input for s in demo.linears if s.layer == layer}
        clean = inputs["o_proj"]
        for kind in NORM_READERS:
            hurt = inputs[kind]
            assert hurt and clean and hurt.sqnr_db["p50"] < clean.sqnr_db["p50"] - 1.0
            assert hurt.dead_zone > clean.dead_zone
    weights = [s.weight.sqnr_db["p50"] for s in demo.linears if s.weight]
    assert max(weights) - min(weights) < 1.0  # the outliers are in activations only


def test_four_bits_cost_the_demo_model_loss(demo: Scan) -> None:
    loss = demo.loss
    assert loss is not None and loss.quantized > 1.5 * loss.clean
    assert loss.gap.mean == pytest.approx(loss.quantized - loss.clean)
    assert sorted(loss.layers) == [0, 1, 2] and loss.linears == {}
    assert any(c.leave_one_out.mean > 0 for c in loss.layers.values())


# Nothing is changed, nothing is left out ----------------------------------------------------------


def test_the_model_is_not_changed() -> None:
    model = tiny()
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules = {name: type(m) for name, m in model.named_modules()}
    quick(model, loss="linear")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert {name: type(m) for name, m in model.named_modules()} == modules
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_change_of_the_model_would_be_noticed() -> None:
    model = tiny()
    with pytest.raises(RuntimeError, match="changed the model"), unchanged(model):
        model.model.layers[0].mlp.up_proj.weight.mul_(1.0)


def test_a_scan_is_deterministic() -> None:
    first, second = (quick(tiny(), loss="linear").as_dict() for _ in range(2))
    assert json.dumps(first) == json.dumps(second)


def test_a_linear_that_never_runs_is_an_error() -> None:
    model = tiny()
    model.spare = nn.Linear(64, 64).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"1 linears were never called.*spare"):
        quick(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection_point": "none"}, "nothing to scan"),
        ({"exclude": ("lm_head", "nose")}, "'nose' matches no linear"),
        ({"loss": "all"}, "loss is one of"),
    ],
)
def test_what_cannot_be_scanned_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(tiny(), **changes)
    with pytest.raises(ValueError, match="at least one text"):
        scan(tiny(), [], Recipe())
    with pytest.raises(ValueError, match="completion of at least one token"):
        Text((1,), ())


@pytest.mark.parametrize("loss", ["none", "linear"])
def test_a_damaged_model_is_an_error_that_names_where_it_shows(loss: str) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(
        ValueError, match=r"the input of model\.layers\.1\.self_attn\.q_proj holds NaN"
    ):
        quick(model, loss=loss)
    head = tiny(tie_word_embeddings=False)
    with torch.no_grad():
        head.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="the loss of text 1 is nan in 16 bits"):
        quick(head, loss="layer")


def test_a_linear_of_zeros_is_named() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj \(quant\.exclude.*every row is zero"
    ):
        quick(model)


def test_a_text_that_is_longer_than_the_context_is_an_error() -> None:
    assert quick(tiny(max_position_embeddings=18)).texts == 3
    with pytest.raises(ValueError, match="text 3 has 18 tokens and this model's context is 17"):
        quick(tiny(max_position_embeddings=17))


def test_one_text_has_no_standard_error_and_says_so() -> None:
    found = scan(tiny(), texts(1), Recipe(), loss="linear")
    assert found.loss is not None and found.loss.gap.standard_error is None
    assert not any(c.one_at_a_time.clear for c in found.loss.linears.values())
    said = " ".join(statements(found))
    assert "One text has no standard error" in said and "±" not in said and "nan" not in said
    json.dumps(found.as_dict(), allow_nan=False)


# What is measured ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_the_quantised_loss_is_that_of_the_prepared_model(architecture: str) -> None:
    """The scan's extremes, computed a second time by the layers that training uses."""
    model, read = tiny(architecture), texts()
    found = scan(model, read, Recipe(), loss="layer", batch_size=3).loss
    assert found is not None
    for expected, prepared in ((found.clean, False), (found.quantized, True)):
        other = copy.deepcopy(model)
        if prepared:
            prepare_model(other, Recipe())
        losses = []
        for text in read:
            with torch.no_grad():
                logits = other(input_ids=torch.tensor([text.tokens])).logits[0]
            n = len(text.completion)
            logp = logits[-n - 1 : -1].float().log_softmax(-1)
            losses.append(-logp.gather(-1, torch.tensor(text.completion)[:, None]).mean())
        # Padding changes the shapes of matmuls, and bf16 rounds their sums differently.
        assert expected == pytest.approx(float(torch.stack(losses).mean()), rel=2e-3)
    assert found.quantized != found.clean


def test_one_at_a_time_and_leave_one_out_are_the_losses_of_their_sets() -> None:
    model, read = tiny(), texts()
    handle = make_twins(model, Recipe())
    report = scan(model, read, Recipe(), loss="linear", batch_size=8).loss
    assert report is not None
    path = "model.layers.1.mlp.down_proj"
    meter = LossMeter(model, linears_of(model, handle), handle.layers, read, 8)
    with unchanged(model):
        alone, all_but = meter.losses({path}), meter.losses(set(handle.layers) - {path})
        nothing, everything = meter.losses(set()), meter.losses(set(handle.layers))
    c = report.linears[path]
    assert c.one_at_a_time.mean == pytest.approx(float((alone - nothing).mean()))
    assert c.leave_one_out.mean == pytest.approx(float((everything - all_but).mean()))
    spread = float((alone - nothing).std()) / len(read) ** 0.5
    assert c.one_at_a_time.standard_error == pytest.approx(spread)
    layer = {p for p in handle.layers if ".layers.1." in p}
    with unchanged(model):
        whole = meter.losses(layer)
    assert report.layers[1].one_at_a_time.mean == pytest.approx(float((whole - nothing).mean()))


def test_padding_moves_no_position_and_no_loss() -> None:
    model, read = tiny().float(), texts()
    handle = make_twins(model, Recipe())
    meters = [LossMeter(model, linears_of(model, handle), handle.layers, read, n) for n in (1, 5)]
    with unchanged(model):
        one_by_one, together = (meter.losses(set()) for meter in meters)
    assert torch.allclose(one_by_one, together, rtol=1e-5)
    (batch,) = meters[1]._batches
    for row, text in zip(batch._positions, read, strict=True):
        assert row[-len(text.tokens) :].tolist() == list(range(len(text.tokens)))


@pytest.mark.parametrize(
    ("point", "parts"),
    [
        ("weight", ("weight",)),
        ("input", ("input",)),
        ("both", ("weight", "input")),
        ("output", ("output_rounding",)),
        ("weight_output", ("weight", "output_rounding")),
    ],
)
def test_each_injection_point_measures_what_it_quantises(
    point: str, parts: tuple[str, ...]
) -> None:
    for linear in quick(tiny(), injection_point=point).linears:
        measured = {
            name
            for name in ("weight", "input", "output_rounding")
            if getattr(linear, name) is not None
        }
        assert measured == set(parts)
        assert 0 < linear.output.relative_error < 1


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        ({}, 17, 20),
        ({"weight_profile": "nvfp4", "activation_profile": "nvfp4"}, 19.5, 22),
        ({"weight_profile": "fork-mxfp4", "activation_profile": "fork-mxfp4"}, 17, 20),
        (
            {
                "weight_profile": "fork-nvfp4-column",
                "block_axis": "column",
                "activation_profile": "fork-nvfp4-row",
            },
            15,
            21,
        ),
        ({"weight_profile": "ascend950-mse"}, 17, 20),
        ({"rotation": "hadamard32"}, 17, 20),
    ],
)
def test_any_profile_can_be_scanned(changes: dict[str, Any], low: float, high: float) -> None:
    found = quick(tiny(), **changes)
    assert found.audit["verdict"] == "pass"
    for linear in found.linears:
        assert linear.weight and low < linear.weight.sqnr_db["p50"] < high
        assert linear.input and low < linear.input.sqnr_db["p50"] < high


def test_the_accumulated_error_is_that_of_the_hidden_states() -> None:
    model, read = tiny(), texts(1)
    found = scan(model, read, Recipe(), loss="none")
    other = copy.deepcopy(model)
    prepare_model(other, Recipe())
    with torch.no_grad():
        ids = torch.tensor([read[0].tokens])
        clean = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        hurt = other(input_ids=ids, output_hidden_states=True).hidden_states[1]
    errors = (hurt - clean).float().norm(dim=-1) / clean.float().norm(dim=-1)
    assert found.accumulated[0].relative_error == pytest.approx(float(errors.median()), rel=0.05)


def test_excluded_layers_are_not_in_the_scan() -> None:
    found = quick(tiny(), exclude=("lm_head", "layers.0"))
    assert found.layers == [1]
    assert found.accumulated[0].relative_error < 1e-6 < found.accumulated[1].relative_error
    assert [row["measured"]["weight"] > 0 for row in found.plan] == [False, True]


def test_the_result_is_json() -> None:
    data = json.loads(json.dumps(quick(tiny(), loss="linear").as_dict()))
    assert data["schema"] == "npu-qat-scan/1"
    assert set(data["loss"]["layers"]) == {"0", "1"}
    assert data["linears"][0]["input"]["sqnr_db"].keys() == {"p05", "p25", "p50", "p75", "p95"}
