"""AQN on real decoder classes: exact removal, reproducible draws, measurements that can object."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from npu_qat.config import LayerSigma, NoiseConfig, ZoneSchedule
from npu_qat.noise import AQN, NoiseError
from npu_qat.noise.measurement import Change

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
TOKENS = torch.arange(24).reshape(2, 12)


def tiny(
    family: str = "qwen2", dtype: torch.dtype = torch.bfloat16, **changes: object
) -> nn.Module:
    """A random frozen decoder of 3 layers whose norm weights are not all 1."""
    config_class, model_class = FAMILIES[family]
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        **changes,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**sizes))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in name:
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def config(**changes: object) -> NoiseConfig:
    values = {"enabled": True, "sigma_start": 0.05, "sigma_end": 0.005, "num_stages": 3, **changes}
    return NoiseConfig.model_validate(values)


def aqn_for(model: nn.Module, seed: int = 0, total_steps: int = 9, **changes: object) -> AQN:
    return AQN(model, config(**changes), total_steps=total_steps, seed=seed)


def norm_weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "norm" in k}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


# What is found ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "norms"), [("qwen2", 7), ("llama", 7), ("qwen3", 13)])
def test_every_rms_norm_gets_noise_final_norm_and_qk_norms_included(
    family: str, norms: int
) -> None:
    model = tiny(family)
    clean = norm_weights(model)
    with aqn_for(model).applied(3) as record:
        changed = [
            k for k, v in norm_weights(model).items() if not torch.equal(v, clean[k].float())
        ]
    assert len(changed) == len(clean) == norms
    assert "model.norm.weight" in changed
    assert (record.norms_total, record.norms_expected, record.norms_changed) == (norms,) * 3


def test_target_modules_and_exclude_are_matched_by_segments() -> None:
    model = tiny("qwen3", num_hidden_layers=12)
    aqn = aqn_for(
        model, target_modules=["q_norm", "k_norm"], exclude=["layers.1", "layers.*.*.k_norm"]
    )
    assert {norm.layer for norm in aqn.norms} == set(range(12)) - {1}
    assert {norm.path.rpartition(".")[2] for norm in aqn.norms} == {"q_norm"}


def test_exclusions_may_name_modules_that_are_not_norms() -> None:
    assert len(aqn_for(tiny(), exclude=["lm_head", "embed_tokens"]).norms) == 7


def test_layer_multipliers_reach_the_norms_of_their_layer() -> None:
    model = tiny("qwen3")
    layers = LayerSigma(default_multiplier=0.0, layer_multipliers={1: 0.5, 2: 2.0})
    clean = norm_weights(model)
    with aqn_for(model, layers=layers).applied(3) as record:
        std = {k: float((v - clean[k].float()).std()) for k, v in norm_weights(model).items()}
    assert record.norms_expected == record.norms_changed == 8
    assert std["model.norm.weight"] == std["model.layers.0.self_attn.q_norm.weight"] == 0.0
    assert std["model.layers.1.input_layernorm.weight"] == pytest.approx(0.025, rel=0.3)
    assert std["model.layers.2.input_layernorm.weight"] == pytest.approx(0.1, rel=0.3)
    assert record.sigma_realized == pytest.approx(0.05, rel=0.15)
    assert record.rms_expected == pytest.approx(0.05 * ((0.25 + 4) / 2) ** 0.5)
    assert record.rms_realized == pytest.approx(record.rms_expected, rel=0.2)


def test_a_model_with_layer_norms_only_is_an_error_that_names_them() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)).requires_grad_(False)
    with pytest.raises(NoiseError, match=r"no RMSNorm.*LayerNorm \(2\)"):
        aqn_for(model)


def test_a_trainable_norm_is_an_error_and_changes_nothing() -> None:
    model = tiny()
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(NoiseError, match=r"model\.norm is trainable.*freeze"):
        aqn_for(model)
    assert isinstance(model.model.layers[0].input_layernorm.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_norm"]}, "'q_norm'.*input_layernorm, norm, post_attention"),
        ({"exclude": ["layers.3"]}, "'layers.3', which matches no module"),
        ({"target_modules": ["norm"], "exclude": ["norm"]}, "leave no RMSNorm"),
        ({"layers": LayerSigma(layer_multipliers={3: 1.0})}, r"names layers \[3\]"),
    ],
)
def test_a_pattern_that_selects_nothing_is_an_error(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aqn_for(tiny(), **changes)


def test_disabled_noise_leaves_the_model_alone() -> None:
    model = tiny()
    aqn = AQN(model, NoiseConfig(), total_steps=1, seed=0)
    assert isinstance(model.model.norm.weight, nn.Parameter)
    with aqn.applied(0) as record:
        assert record.reason == "noise is not enabled"
    assert aqn.check() == []
    assert aqn.describe() == {"enabled": False}


# Holding the weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_held_norms_give_bitwise_the_same_output_and_gradient(
    family: str, dtype: torch.dtype
) -> None:
    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        inputs = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
        logits = model(inputs_embeds=inputs).logits
        logits.float().square().mean().backward()
        return logits.detach(), inputs.grad

    plain = tiny(family, dtype)
    held = copy.deepcopy(plain)
    aqn_for(held, norm_dtype="fp32")
    assert held.model.norm.weight.dtype == torch.float32
    assert type(held.model.norm).__name__.endswith("RMSNorm")
    for a, b in zip(run(plain), run(held), strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)


def test_torch_rms_norm_is_held_in_fp32_too() -> None:
    model = (
        nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 64)).to(torch.bfloat16).requires_grad_(False)
    )
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    before = model(x)
    aqn = aqn_for(model)
    assert torch.equal(model(x), before)
    with aqn.applied(3):
        assert not torch.equal(model(x), before)


def test_weights_become_buffers_under_the_same_names() -> None:
    model = tiny()
    names = list(model.state_dict())
    aqn_for(model)
    assert sorted(model.state_dict()) == sorted(names)
    assert not any("norm" in name for name, _ in model.named_parameters())


def test_a_cast_of_the_whole_model_leaves_the_norms_exact_in_fp32() -> None:
    model = tiny(dtype=torch.float32)
    aqn_for(model, norm_dtype="fp32")
    model.to(torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16  # nothing was held: the model was fp32

    model = tiny(dtype=torch.bfloat16)
    aqn = aqn_for(model, norm_dtype="fp32")
    with aqn.applied(3):
        noisy = norm_weights(model)
        model.to(torch.bfloat16)
        assert same_bits(norm_weights(model), noisy)
    assert model.model.norm.weight.dtype == torch.float32


def test_model_dtype_after_fp32_is_an_error() -> None:
    model = tiny()
    aqn_for(model, norm_dtype="fp32")
    aqn_for(model, norm_dtype="fp32")
    with pytest.raises(NoiseError, match="held in fp32 by an earlier AQN"):
        aqn_for(model, norm_dtype="model")


# Adding and removing ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_dtype", ["model", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_restored_bitwise_also_after_an_exception(
    dtype: torch.dtype, norm_dtype: str
) -> None:
    model = tiny(dtype=dtype)
    aqn = aqn_for(model, norm_dtype=norm_dtype)
    clean = norm_weights(model)
    with aqn.applied(3):
        assert aqn.active
        assert not same_bits(norm_weights(model), clean)
    assert same_bits(norm_weights(model), clean)
    with pytest.raises(RuntimeError, match="rollout failed"), aqn.applied(4):
        raise RuntimeError("rollout failed")
    assert same_bits(norm_weights(model), clean)
    assert not aqn.active


def test_draws_depend_on_seed_step_and_norm_only() -> None:
    def noisy(seed: int, step: int, warm_up: int = 0, phase: str = "rollout") -> dict[str, Tensor]:
        model = tiny()
        aqn = aqn_for(model, seed, apply_during="both", num_stages=2)
        for _ in range(warm_up):
            torch.randn(7)
            with aqn.applied(8):
                pass
        with aqn.applied(step, phase):
            return norm_weights(model)

    reference = noisy(0, 5)
    assert same_bits(noisy(0, 5, warm_up=3), reference)
    assert same_bits(noisy(0, 5, phase="training"), reference)
    assert not same_bits(noisy(1, 5), reference)
    assert not same_bits(noisy(0, 6), reference)
    draws = [v - tiny().state_dict()[k].float() for k, v in reference.items()]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_wrappers_around_the_model_do_not_change_the_draw() -> None:
    def wrap(model: nn.Module, *names: str) -> nn.Module:
        for name in reversed(names):
            outer = nn.Module()
            outer.add_module(name, model)
            model = outer
        return model

    weights = []
    for names in ((), ("module",), ("base_model", "model"), ("module", "base_model", "model")):
        inner = tiny()
        with aqn_for(wrap(inner, *names)).applied(3):
            weights.append(norm_weights(inner))
    assert all(same_bits(w, weights[0]) for w in weights)


@pytest.mark.parametrize(
    ("apply_during", "noisy_phases"),
    [("rollout", {"rollout"}), ("training", {"training"}), ("both", {"rollout", "training"})],
)
def test_noise_acts_in_its_phases_and_never_in_evaluation(
    apply_during: str, noisy_phases: set[str]
) -> None:
    model = tiny()
    aqn = aqn_for(model, apply_during=apply_during)
    clean = norm_weights(model)
    for phase in ("rollout", "training", "evaluation"):
        with aqn.applied(3, phase) as record:
            noisy = not same_bits(norm_weights(model), clean)
        assert noisy == (phase in noisy_phases)
        assert bool(record.reason) != noisy
        assert record.norms_changed == (7 if noisy else 0)


def test_clean_stages_say_why_and_change_nothing() -> None:
    model = tiny()
    aqn = aqn_for(model)
    clean = norm_weights(model)
    with aqn.applied(0) as record:
        assert same_bits(norm_weights(model), clean)
    assert (record.sigma, record.norms_changed, record.norms_total) == (0.0, 0, 7)
    assert "stage has no noise" in record.reason


def test_noise_never_stacks() -> None:
    model = tiny()
    one, two = aqn_for(model), aqn_for(model)
    clean = norm_weights(model)
    with one.applied(3):
        for aqn, phase in ((one, "rollout"), (one, "evaluation"), (two, "rollout")):
            with pytest.raises(NoiseError, match="inside another"), aqn.applied(3, phase):
                pass
    assert same_bits(norm_weights(model), clean)


def test_an_unknown_phase_and_a_step_outside_of_the_run_are_errors() -> None:
    aqn = aqn_for(tiny())
    with pytest.raises(ValueError, match="'validation'"), aqn.applied(3, "validation"):
        pass
    with pytest.raises(ValueError, match="0 to 8"), aqn.applied(9):
        pass


def trainable(gradient_checkpointing: bool) -> tuple[nn.Module, nn.Parameter]:
    """A tiny decoder with one trainable linear in each layer, and the first of them."""
    model = tiny(dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.requires_grad_(True)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train(), model.model.layers[0].mlp.gate_proj.weight


def test_gradients_are_the_same_with_and_without_checkpointing() -> None:
    gradients = []
    for gradient_checkpointing in (False, True):
        model, weight = trainable(gradient_checkpointing)
        with aqn_for(model, apply_during="training").applied(3, "training"):
            model(TOKENS).logits.square().mean().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)
    model, weight = trainable(gradient_checkpointing=False)
    model(TOKENS).logits.square().mean().backward()
    assert not torch.allclose(weight.grad, gradients[0], rtol=1e-3)


def test_a_backward_pass_after_the_block_is_an_error() -> None:
    model, _ = trainable(gradient_checkpointing=False)
    with aqn_for(model, apply_during="training").applied(3, "training"):
        loss = model(TOKENS).logits.square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Measuring ----------------------------------------------------------------------------------------


def test_fp32_norms_realize_the_scheduled_sigma_in_every_stage() -> None:
    aqn = aqn_for(tiny(), sigma_start=0.01, sigma_end=0.0001, num_stages=6, total_steps=12)
    for stage in aqn.check()[1:]:
        with aqn.applied(stage.first_step) as record:
            assert record.sigma_realized == pytest.approx(stage.sigma, rel=0.15)
            assert record.sigma_realized == stage.sigma_realized
            assert record.elements_changed_fraction > 0.99
            assert record.norm_dtype == "float32"


def ones(model: nn.Module) -> nn.Module:
    """All norm weights 1, as the resolution of bf16 is quoted for."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
    return model


def test_bf16_swallows_small_noise_and_the_check_says_so() -> None:
    """At weight 1 bf16 keeps nothing of sigma 5e-4 and some 2.6 % of 1e-3 (half the draws round
    towards the finer side below 1, where 2 sigma are needed)."""
    model = ones(tiny(num_hidden_layers=40))
    aqn = aqn_for(model, norm_dtype="model", sigma_start=0.02, sigma_end=0.0005)
    clean, strong, weak = aqn.check()
    assert (clean.inert, strong.inert, weak.inert) == (False, False, True)
    assert weak.elements_changed_fraction < 0.001
    with aqn.applied(weak.first_step) as record:
        assert record.inert and not record.reason
    one_per_mille = aqn_for(model, norm_dtype="model", sigma_start=0.02, sigma_end=0.001).check()[
        -1
    ]
    assert one_per_mille.elements_changed_fraction == pytest.approx(0.026, abs=0.008)


def test_a_schedule_of_inert_stages_is_an_error_that_names_the_remedy() -> None:
    model = ones(tiny())
    with pytest.raises(
        NoiseError, match=r"every noisy stage.*bfloat16.*set noise.norm_dtype: fp32"
    ):
        aqn_for(model, norm_dtype="model", sigma_start=0.0005, sigma_end=0.0001).check()
    aqn_for(model, norm_dtype="fp32", sigma_start=0.0005, sigma_end=0.0001).check()


def test_check_and_describe_leave_the_weights_alone_and_are_json() -> None:
    model = tiny()
    aqn = aqn_for(model)
    clean = norm_weights(model)
    description = aqn.describe()
    assert same_bits(norm_weights(model), clean)
    assert json.loads(json.dumps(description)) == description
    assert description["elements"] == 7 * 64
    assert [stage["sigma"] for stage in description["stages"]] == pytest.approx([0, 0.05, 0.005])
    assert json.dumps(asdict(aqn.check()[0]))


def test_weights_that_do_not_take_the_noise_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    aqn = aqn_for(tiny())
    monkeypatch.setattr("npu_qat.noise.injector.write", lambda weight, values: None)
    with pytest.raises(NoiseError, match="0 of 7 norms changed"), aqn.applied(3):
        pass


def test_a_weight_shared_by_two_norms_is_an_error_not_double_noise() -> None:
    model = tiny(dtype=torch.float32)
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    with pytest.raises(NoiseError, match="does another module share"), aqn_for(model).applied(3):
        pass


def test_noise_of_the_wrong_strength_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    aqn = aqn_for(tiny(num_hidden_layers=12))
    draw = aqn._draw

    def stronger(step: int) -> list[Change]:
        return [replace(c, noise=1.2 * c.noise, noisy=c.clean + 1.2 * c.noise) for c in draw(step)]

    with aqn.applied(3):
        pass
    monkeypatch.setattr(aqn, "_draw", stronger)
    with (
        pytest.raises(NoiseError, match=r"0\.0599\d+, but the schedule says 0\.05"),
        aqn.applied(3),
    ):
        pass


def test_weights_changed_behind_the_back_of_the_noise_are_an_error() -> None:
    model = tiny()
    aqn = aqn_for(model)
    model.model.layers[2].input_layernorm.weight[5] += 1e-4
    with (
        pytest.raises(NoiseError, match=r"layers\.2\.input_layernorm changed since"),
        aqn.applied(3),
    ):
        pass


def test_a_restore_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    aqn = aqn_for(tiny())
    with pytest.raises(NoiseError, match="is not what it was before the noise"), aqn.applied(3):
        monkeypatch.setattr("npu_qat.noise.injector.write", lambda weight, values: None)


# Multipliers --------------------------------------------------------------------------------------


def test_the_multipliers_of_each_layer_are_measured_and_in_the_audit() -> None:
    layers = LayerSigma(layer_multipliers={0: 0.0, 1: 2.0}, default_multiplier=0.5)
    aqn = aqn_for(tiny(num_hidden_layers=4), layers=layers)
    (found,) = aqn.check_multipliers()
    assert found.expected == {"0": 0.0, "1": 2.0, "2": 0.5, "3": 0.5, "other": 0.5}
    assert found.measured["0"] == 0.0
    for name, multiplier in found.expected.items():
        assert found.measured[name] == pytest.approx(multiplier, rel=0.4)
    assert found.off == []
    assert aqn.describe()["multipliers"] == [asdict(found)]


def test_multipliers_that_change_with_the_phase_are_listed_once_each() -> None:
    zones = ZoneSchedule(edge_layers=(0,), middle_layers=(1, 2), late_middle_multiplier=0.25)
    aqn = aqn_for(tiny(), layers=LayerSigma(zone_schedule=zones))
    early, late = aqn.check_multipliers()
    assert early.first_step == 3 and late.first_step == 5  # of 9 steps, the first 3 are clean
    assert (early.expected["1"], late.expected["1"]) == (1.0, 0.25)


def test_multipliers_that_never_reach_the_draw_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The defect of the earlier program: a table that nobody forwarded."""
    aqn = aqn_for(tiny(num_hidden_layers=4), layers=LayerSigma(layer_multipliers={1: 2.0, 3: 0.25}))
    draw = aqn._draw

    def uniform(step: int) -> list[Change]:
        sigma = aqn.schedule.sigma(step)
        changes = []
        for change in draw(step):
            noise = torch.randn(change.noise.shape, generator=torch.Generator().manual_seed(1))
            changes.append(replace(change, noise=noise * sigma, noisy=change.clean + noise * sigma))
        return changes

    monkeypatch.setattr(aqn, "_draw", uniform)
    (found,) = aqn.check_multipliers()
    assert set(found.off) >= {"1", "3"}
    with pytest.raises(NoiseError, match="the schedule says"), aqn.applied(3):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": LayerSigma(default_multiplier=0.0, layer_multipliers={1: 1.0}),
         "exclude": ("layers.1",)},
        {"layers": LayerSigma(default_multiplier=0.0, layer_multipliers={1: 1.0}),
         "target_modules": ("norm",)},
        {"layers": LayerSigma(
            default_multiplier=0.0,
            layer_multipliers={0: 1.0, 1: 1.0, 2: 1.0},
            zone_schedule=ZoneSchedule(
                edge_layers=(0, 1, 2), middle_layers=(),
                early_edge_multiplier=0.0, late_edge_multiplier=0.0))},
    ],
    ids=["targets excluded", "targets not chosen", "zones at zero"],
)  # fmt: skip
def test_multipliers_that_leave_no_noise_at_all_are_an_error(changes: dict[str, object]) -> None:
    model = tiny()
    with pytest.raises(NoiseError, match=r"noise\.enabled is true, but in every step"):
        aqn_for(model, **changes)
