"""The presets are what the published experiments were, and say what they are not."""

from __future__ import annotations

import pytest

from npu_qat.config import RunConfig, load_config, preset_names
from npu_qat.config.load import preset_path, preset_summary

PUBLISHED = tuple(name for name in preset_names() if name != "demo")


def test_the_presets_are_these_and_the_demo_comes_first() -> None:
    assert preset_names() == (
        "demo", "log-e13h", "log-e13j", "log-e6a", "log-e7a", "plan-e13c", "plan-e13d",
    )  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_each_preset_has_a_header_that_says_what_it_is(name: str) -> None:
    header = preset_path(name).read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert preset_summary(name).endswith(".")
    if name != "demo":
        assert "Source: the experiment" in header
    if name not in ("demo", "log-e7a"):
        assert "What differs on purpose" in header


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_have_the_published_hyper_parameters(name: str) -> None:
    c = load_config(preset=name)
    assert c.model.path == "Qwen/Qwen2.5-1.5B-Instruct" and c.model.gradient_checkpointing
    assert (c.task.name, c.task.path, c.task.prompt_suffix) == ("gsm8k", "openai/gsm8k", None)
    assert (c.train.steps, c.train.lr, c.train.warmup_steps) == (29, 1e-5, 10)
    assert (c.train.weight_decay, c.train.max_grad_norm) == (0.1, 1.0)
    assert c.train.micro_batch_size == 4
    assert (c.dapo.clip_low, c.dapo.clip_high, c.dapo.clip_ratio_c) == (0.2, 0.25, 3.0)
    assert (c.dapo.overlong_buffer, c.dapo.overlong_factor) == (256, 0.5)
    assert c.dapo.overlong_penalty and not c.dapo.overlong_filter and not c.dapo.tis
    assert (c.rollout.num_generations, c.rollout.temperature, c.rollout.top_p) == (8, 1.0, 1.0)
    assert (c.rollout.max_prompt_tokens, c.rollout.max_new_tokens) == (1024, 1024)
    assert (c.lora.r, c.lora.alpha, c.lora.targets) == (32, 16, "all-linear")
    # An update is 32 prompts in all of them.
    assert c.dapo.prompts_per_rollout // c.dapo.updates_per_rollout == 32
    assert c.dapo.generation_prompts == 256


def test_e13h_filters_groups_and_e13j_trains_on_all_of_them() -> None:
    h, j = load_config(preset="log-e13h"), load_config(preset="log-e13j")
    assert h.dapo.dynamic_sampling and h.dapo.max_generation_tries == 5
    assert (h.dapo.prompts_per_rollout, h.dapo.updates_per_rollout) == (128, 4)
    assert not j.dapo.dynamic_sampling
    assert (j.dapo.prompts_per_rollout, j.dapo.updates_per_rollout) == (256, 8)
    assert h.quant == j.quant
    assert not h.noise.enabled
    assert (j.noise.sigma_start, j.noise.sigma_end, j.noise.num_stages) == (0.05, 0.0005, 10)
    assert not j.noise.layers.enabled


def test_the_logs_recipes_are_the_earlier_codes() -> None:
    h = load_config(preset="log-e13h").quant
    assert (h.injection_point, h.weight_profile, h.activation_profile) == (
        "both", "fork-mxfp4", "fork-mxfp4",
    )  # fmt: skip
    assert h.lora_input == "quantised" and h.use_ste
    assert h.exclude == ("lm_head", "layers.0", "layers.27")
    a6, a7 = load_config(preset="log-e6a").quant, load_config(preset="log-e7a").quant
    assert (a6.injection_point, a6.exclude) == ("weight", ("lm_head",))
    assert a7.injection_point == "none"


@pytest.mark.parametrize("name", ["log-e13h", "log-e13j", "log-e6a"])
def test_the_logs_rollouts_are_in_16_bits_and_their_gap_does_not_stop_the_run(name: str) -> None:
    c = load_config(preset=name)
    assert c.quant.apply_during == "training"
    assert c.dapo.logp_gap_limit > 10 * RunConfig().dapo.logp_gap_limit


@pytest.mark.parametrize(
    ("name", "default", "middle"), [("plan-e13c", 0.0, 1.0), ("plan-e13d", 1.0, 1.5)]
)
def test_the_plans_presets_have_its_multipliers(name: str, default: float, middle: float) -> None:
    c = load_config(preset=name)
    assert c.quant.injection_point == "weight_output"
    assert (c.noise.sigma_start, c.noise.sigma_end) == (0.01, 1e-5)
    assert c.noise.layers.enabled and c.noise.layers.default_multiplier == default
    assert c.noise.layers.layer_multipliers == dict.fromkeys(range(6, 16), middle)


def test_the_demo_needs_no_network_and_compares_all_arms() -> None:
    c = load_config(preset="demo")
    assert (c.model.path, c.task.name) == ("demo", "word_problems")
    assert set(c.evaluation.baselines) == {"bf16", "ptq", "bf16_lora"}
    assert c.quant.injection_point == "both" and c.noise.enabled
    assert (c.task.test_size or 0) >= 1000
