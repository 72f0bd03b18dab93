"""Adapters: dtypes that keep small updates alive, what they see, what leaks without estimator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from npu_qat.config import LoraSection, Recipe
from npu_qat.layers import QuantizedModel, add_lora, load_lora, prepare_model
from npu_qat.layers.lora import QatLoraLinear
from npu_qat.numerics import fake_quant
from tests.training.tiny import tiny_model

IDS = torch.arange(3, 27).view(2, 12)
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(
    recipe: Recipe | None = None,
    section: LoraSection | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    live: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, QuantizedModel | None]:
    """A tiny model with adapters; ``live`` gives B values."""
    model = tiny_model(dtype=dtype)
    handle = None if recipe is None else prepare_model(model, recipe)
    peft_model = add_lora(model, section or LoraSection(r=4, alpha=8), seed=seed)
    if live:
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    generator = torch.Generator().manual_seed(sum(map(ord, name)))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return peft_model, handle


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    out = model(input_ids=IDS, use_cache=False).logits
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} was never reached"
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("autocast", [False, True])
def test_an_input_of_another_dtype_than_the_layer_has_gradients(autocast: bool) -> None:
    """As PEFT's layer takes it: norms under autocast hand fp32 to a bf16 layer, for instance."""
    model, _ = adapted(Recipe(), dtype=torch.bfloat16, live=True)
    layer = next(m for m in model.modules() if isinstance(m, QatLoraLinear))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().square().sum().backward()
    found = [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    assert len(found) == 3
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in found)


# --- the straight-through estimator, on and off ---------------------------------------------


def by_projection(found: dict[str, torch.Tensor], part: str) -> dict[str, list[float]]:
    """Largest |gradient| of ``part`` (lora_A or lora_B), per projection, layer by layer."""
    largest: dict[str, list[float]] = {name: [] for name in NAMES}
    for name, gradient in found.items():
        if match := re.search(rf"\.(\w+_proj)\.{part}\.", name):
            largest[match[1]].append(float(gradient.abs().max()))
    assert all(len(values) == 2 for values in largest.values())
    return largest


@pytest.mark.parametrize("storage", ["image", "packed"])
def test_without_it_and_lora_on_the_quantised_input_five_projections_get_exactly_nothing(
    storage: str,
) -> None:
    """What sank the earlier experiments: q, k, v, gate and up act on o and down only through a
    quantised tensor. o and down add to the residual stream directly, so theirs leaks through."""
    recipe = Recipe(use_ste=False, lora_input="quantised", base_storage=storage)
    model, _ = adapted(recipe)
    found = by_projection(gradients(model.train()), "lora_B")
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert found[name] == [0.0, 0.0], name
    for name in ("o_proj", "down_proj"):
        assert min(found[name]) > 0, name


def test_lora_on_the_full_input_leaks_some_gradient_into_all() -> None:
    """With B = 0 nothing leaks yet; once B has values, LoRA's path goes around the quantiser."""
    recipe = Recipe(use_ste=False, lora_input="full")
    first = by_projection(gradients(adapted(recipe)[0].train()), "lora_B")
    assert first["q_proj"] == [0.0, 0.0] and min(first["down_proj"]) > 0
    later = by_projection(gradients(adapted(recipe, live=True)[0].train()), "lora_B")
    for name in NAMES:
        assert min(later[name]) > 0, name
    quantised = Recipe(use_ste=False, lora_input="quantised")
    never = by_projection(gradients(adapted(quantised, live=True)[0].train()), "lora_B")
    assert never["q_proj"] == [0.0, 0.0] and min(never["down_proj"]) > 0


def test_without_it_a_hook_behind_the_wrapper_leaves_no_adapter_any_gradient() -> None:
    """The earliest W4A4 runs quantised what the LoRA wrapper returned: nothing could learn."""
    recipe = Recipe(use_ste=False, injection_point="weight_output", lora_output="quantised")
    model, _ = adapted(recipe, live=True)
    assert all(float(g.abs().max()) == 0.0 for g in gradients(model.train()).values())
    helped, _ = adapted(recipe.model_copy(update={"use_ste": True}), live=True)
    found = by_projection(gradients(helped.train()), "lora_B")
    assert all(value > 0 for values in found.values() for value in values)


def test_a_quantised_lora_output_is_the_quantised_sum() -> None:
    recipe = Recipe(injection_point="weight_output", lora_output="quantised")
    model, _ = adapted(recipe, live=True)
    layer = next(m for m in model.modules() if isinstance(m, QatLoraLinear))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    adapter = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    expected = fake_quant(layer.get_base_layer()(x) + adapter, recipe.activation_profile)
    assert torch.equal(layer(x), expected)
    full, _ = adapted(recipe.model_copy(update={"lora_output": "full"}), live=True)
    assert not torch.equal(logits(model), logits(full))


@pytest.mark.parametrize("lora_input", ["full", "quantised"])
def test_with_it_every_adapter_learns_from_the_first_update(lora_input: str) -> None:
    model, _ = adapted(Recipe(lora_input=lora_input))
    found = gradients(model.train())
    for name, values in by_projection(found, "lora_B").items():
        assert min(values) > 0, name
    # B = 0: no gradient reaches A before the first update, which is how LoRA starts.
    assert all(v == [0.0, 0.0] for v in by_projection(found, "lora_A").values())


@pytest.mark.parametrize("profile", ["ascend950", "nvfp4"])
def test_lora_sees_the_input_that_the_recipe_names(profile: str) -> None:
    seen = {}
    for lora_input in ("full", "quantised"):
        recipe = Recipe(weight_profile=profile, activation_profile=profile, lora_input=lora_input)
        model, handle = adapted(recipe)
        assert handle is not None
        if handle.needs_calibration:
            handle.calibrate(lambda m: logits(m))
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
        inputs: list[torch.Tensor] = []
        layer.register_forward_pre_hook(lambda _, args, i=inputs: i.append(args[0]))
        layer.lora_A["default"].register_forward_pre_hook(
            lambda _, args, i=inputs: i.append(args[0])
        )
        logits(model)
        x, z = inputs
        seen[lora_input] = float((z - x).norm() / x.norm())
    assert seen["full"] == 0.0
    assert 0.02 < seen["quantised"] < 0.3, "Q(x) is x up to 4-bit rounding, tensor scale included"


def test_lora_on_the_quantised_input_sees_x_where_the_quantisers_are_off() -> None:
    model, handle = adapted(Recipe(lora_input="quantised", apply_during="rollout"), live=True)
    assert handle is not None
    plain, _ = adapted(live=True)
    with handle.phase("training"):
        assert torch.equal(logits(model), logits(plain))


def test_calibration_works_with_adapters_on_the_quantised_input() -> None:
    recipe = Recipe(weight_profile="nvfp4", activation_profile="nvfp4", lora_input="quantised")
    model, handle = adapted(recipe)
    assert handle is not None
    handle.calibrate(lambda m: logits(model))
    assert torch.isfinite(logits(model)).all()


# --- dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, Recipe(), Recipe(base_storage="packed")])
def test_masters_are_fp32_and_compute_is_16_bits(recipe: Recipe | None) -> None:
    model, _ = adapted(recipe, dtype=torch.bfloat16, live=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 28 and {p.dtype for p in trainable} == {torch.float32}
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert layer(x).dtype == a(x).dtype == torch.bfloat16
    adapter = x @ a.weight.bfloat16().T @ b.weight.bfloat16().T
    wanted = layer.get_base_layer()(x).float() + adapter.float() * layer.scaling["default"]
    # The sum of both is rounded once; that of the adapter here, too.
    torch.testing.assert_close(layer(x).float(), wanted, rtol=2**-8, atol=2**-8)
    assert layer.scaling["default"] == 2.0


@pytest.mark.parametrize("recipe", [None, Recipe(), Recipe(injection_point="weight")])
@pytest.mark.parametrize("alpha", [4, 8, 12])
def test_one_step_gives_the_result_and_the_gradients_of_separate_steps(
    recipe: Recipe | None, alpha: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = adapted(recipe, LoraSection(r=4, alpha=alpha), live=True)
    in_one_step, one_result = gradients(model.train()), logits(model)
    monkeypatch.setattr(QatLoraLinear, "_in_one_step", lambda *args: False)
    model.zero_grad()
    torch.testing.assert_close(one_result, logits(model), rtol=1e-4, atol=1e-5)
    separate = gradients(model)
    assert in_one_step.keys() == separate.keys() and in_one_step
    for name, gradient in separate.items():
        torch.testing.assert_close(in_one_step[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_hook_on_an_adapter_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 gathers the adapter's weight in one."""
    model, _ = adapted(Recipe())
    layer = next(m for m in model.modules() if isinstance(m, QatLoraLinear))
    seen = []
    layer.lora_B["default"].register_forward_pre_hook(lambda *args: seen.append(1))
    logits(model)
    assert seen == [1]


def step(master: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    parameter = nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-5, weight_decay=0.0)
    for _ in range(116):
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def test_small_updates_are_not_swallowed() -> None:
    """lr 1e-5, 116 steps as in the plan: fp32 masters move everywhere, bf16 ones hardly at all."""
    model, _ = adapted(Recipe(), LoraSection(r=32), dtype=torch.bfloat16)
    master = model.get_submodule(
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.default"
    ).weight.detach()
    gradient = torch.randn(master.shape, generator=torch.Generator().manual_seed(0))
    moved = step(master, gradient)
    assert (moved != master).all()
    torch.testing.assert_close(
        (moved - master).abs().mean(), torch.tensor(116e-5), rtol=0.05, atol=0
    )
    rounded = master.bfloat16()
    unchanged = (step(rounded, gradient) == rounded).float().mean()
    assert unchanged > 0.8, "otherwise this test shows nothing"


# --- wiring ---------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_a_live_one_can_be_disabled() -> None:
    plain = tiny_model()
    prepare_model(plain, Recipe())
    wanted = logits(plain)
    assert torch.equal(logits(adapted(Recipe())[0]), wanted)
    model, _ = adapted(Recipe(), live=True)
    assert not torch.allclose(logits(model), wanted, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)


def test_the_initialisation_depends_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = adapted(seed=1)[0]
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    second = add_lora(tiny_model_without_seeding(), LoraSection(r=4, alpha=8), seed=1)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was moved"
    third = adapted(seed=2)[0]
    torch.set_rng_state(state)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.default"
    assert torch.equal(first.get_submodule(name).weight, second.get_submodule(name).weight)
    assert not torch.equal(first.get_submodule(name).weight, third.get_submodule(name).weight)


def tiny_model_without_seeding() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return tiny_model()


@pytest.mark.parametrize(
    ("targets", "count"), [("all-linear", 14), (("q_proj", "v_proj"), 4), (("down_proj",), 2)]
)
def test_targets(targets: object, count: int) -> None:
    model, handle = adapted(
        Recipe(exclude=("lm_head", "layers.0.mlp")), LoraSection(r=2, targets=targets)
    )
    found = [n for n, m in model.named_modules() if isinstance(m, QatLoraLinear)]
    assert len(found) == count
    assert not any("lm_head" in name for name in found)
    assert handle is not None and len(handle.layers) == 11
    logits(model)
    handle.audit.verify(model)


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens"])
def test_a_target_that_is_no_linear_of_a_decoder_layer_is_an_error(target: str) -> None:
    message = rf"lora.targets: \['{target}'\].*choose from \['down_proj'"
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_model(), LoraSection(targets=("q_proj", target)), seed=0)


@pytest.mark.parametrize("recipe", [None, Recipe(), Recipe(base_storage="packed")])
def test_merging_is_refused(recipe: Recipe | None) -> None:
    """It would write into the frozen 4-bit weight."""
    model, handle = adapted(recipe, live=True)
    before = logits(model)
    with pytest.raises(ValueError, match="not merged"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="not merged"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)
    if handle is not None:
        handle.audit.verify(model)


def test_dropout_acts_in_training_only() -> None:
    model, _ = adapted(Recipe(), LoraSection(r=4, dropout=0.5), live=True)
    assert torch.equal(logits(model.eval()), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recipe", [None, Recipe(base_storage="packed")])
def test_a_saved_adapter_comes_back(
    tmp_path: Path, recipe: Recipe | None, dtype: torch.dtype
) -> None:
    model, _ = adapted(recipe, dtype=dtype, live=True)
    state = {n: p.detach().to(dtype) for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path, state_dict=state)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for trainable in (False, True):
        base = tiny_model(dtype=dtype)
        if recipe is not None:
            prepare_model(base, recipe)
        loaded = load_lora(base, str(tmp_path), trainable=trainable)
        assert torch.equal(logits(loaded.eval()), logits(model.eval()))
        wanted = 28 if trainable else 0
        assert sum(p.requires_grad for p in loaded.parameters()) == wanted
        masters = {p.dtype for n, p in loaded.named_parameters() if "lora_" in n}
        assert masters == {torch.float32}


def test_an_adapter_of_16_bits_serves_on_the_4_bit_base(tmp_path: Path) -> None:
    trained, _ = adapted(None, live=True)
    trained.save_pretrained(tmp_path)
    base = tiny_model()
    handle = prepare_model(base, Recipe())
    served = load_lora(base, str(tmp_path))
    assert not torch.allclose(logits(served), logits(trained), atol=1e-3)
    handle.audit.verify(served)
    layer = served.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    original = trained.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert torch.equal(layer.lora_B["default"].weight, original.lora_B["default"].weight)
