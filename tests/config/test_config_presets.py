"""The presets are what the documents describe, run by run, and say what was really run."""

from __future__ import annotations

from typing import Any

import pytest

from npu_qat.config import ConfigError, RunConfig, load_config, load_run, preset_names
from npu_qat.config.load import PRESET_FOLDER, preset_path, preset_summary

W4A16 = {"injection_point": "weight", "weight_profile": "fork-mxfp4"}
POST_MX = {
    "injection_point": "weight_output", "weight_profile": "fork-mxfp4",
    "activation_profile": "fork-mxfp4", "lora_output": "quantised",
}  # fmt: skip
POST_NV = POST_MX | {"weight_profile": "fork-nvfp4-row", "activation_profile": "fork-nvfp4-row"}
PRE_NV = {
    "injection_point": "both", "weight_profile": "fork-nvfp4-row",
    "activation_profile": "fork-nvfp4-row", "lora_input": "quantised",
}  # fmt: skip
COLUMNS = PRE_NV | {"weight_profile": "fork-nvfp4-column", "block_axis": "column"}
PRE_MX = PRE_NV | {"weight_profile": "fork-mxfp4", "activation_profile": "fork-mxfp4"}
EDGES = {"exclude": ("lm_head", "layers.0", "layers.27")}
NO_STE = {"use_ste": False}

# Preset -> its quantisation, as the documents describe it; what is not named is the default.
QUANT: dict[str, dict[str, Any]] = {
    "log-e7a": {"injection_point": "none"},
    "log-e6a": W4A16,
    "log-e6b": W4A16,
    "log-e12": W4A16,
    "plan-e13a": POST_MX,
    "plan-e13b": POST_MX,
    "plan-e13c": POST_MX,
    "plan-e13d": POST_MX,
    "log-e13a-mxfp4": POST_MX | NO_STE,
    "log-e13a": POST_NV | NO_STE | EDGES,
    "log-e13b": POST_NV | NO_STE | EDGES,
    "log-e13c": POST_NV | NO_STE | EDGES | {"apply_during": "training"},
    "log-e13d": PRE_NV | NO_STE | EDGES,
    "log-e13e": PRE_NV | NO_STE | EDGES,
    "log-e13f": COLUMNS | NO_STE | EDGES,
    "log-e13g": COLUMNS | EDGES,
    "log-e13h": PRE_MX | EDGES,
    "log-e13j": PRE_MX | EDGES,
    "log-e13k": PRE_MX | EDGES,
    "e13i": PRE_MX | EDGES,
    "e13j": PRE_MX | EDGES,
    "e13k": PRE_MX | EDGES,
}
# Preset -> sigma_start, sigma_end of its noise; the others have none.
NOISE = {
    "log-e6b": (0.01, 0.0001),
    "log-e12": (0.05, 0.0005),
    "plan-e13b": (0.01, 1e-5),
    "plan-e13c": (0.01, 1e-5),
    "plan-e13d": (0.01, 1e-5),
    "log-e13j": (0.05, 0.0005),
    "log-e13k": (0.01, 0.0001),
    "e13i": (0.05, 0.0005),
    "e13j": (0.05, 0.0005),
    "e13k": (0.05, 0.001),
}
# Preset -> prompts trained, prompts generated, updates a step, steps, group filter.
BATCHES = {
    "log-e13b": (16, 32, 2, 233, True),
    "log-e13j": (256, 256, 8, 29, False),
    "log-e13k": (256, 256, 8, 29, False),
}
PUBLISHED = tuple(QUANT)


def test_every_run_of_the_documents_has_a_preset_and_the_demo_comes_first() -> None:
    assert preset_names()[0] == "demo"
    assert set(preset_names()) == {"demo", *PUBLISHED}


@pytest.mark.parametrize("name", preset_names())
def test_each_header_says_what_it_is(name: str) -> None:
    header = preset_path(name).read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") and len(line) <= 100 for line in header.splitlines())
    assert preset_summary(name).endswith(".")
    if name != "demo":
        assert "Source: the experiment" in header or "Source: the launch script" in header
        says = any(f"The {who} say" in header for who in ("documents", "plan", "log", "guide"))
        assert says or "The later records say" in header
        assert "What was really run" in header


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_quantisation_is_the_documents(name: str) -> None:
    expected = {"weight_profile": "ascend950", "activation_profile": "ascend950", **QUANT[name]}
    found = load_config(preset=name).quant.model_dump()
    for key, default in RunConfig().quant.model_dump().items():
        assert found[key] == expected.get(key, default), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_noise_is_the_documents(name: str) -> None:
    noise = load_config(preset=name).noise
    assert noise.enabled == (name in NOISE)
    if not noise.enabled:
        return
    assert (noise.sigma_start, noise.sigma_end) == NOISE[name]
    assert noise.zero_first_stage and noise.apply_during == "rollout"
    assert noise.epoch_aware == (name == "log-e12")
    assert (noise.stages_per_epoch if noise.epoch_aware else noise.num_stages) == 10
    # As run: norms in the model's dtype. As planned: in fp32, where small sigmas survive.
    assert noise.norm_dtype == ("model" if name.startswith("log-") else "fp32")
    guided = name in ("plan-e13c", "plan-e13d", "e13i", "e13j", "e13k")
    assert noise.layers.enabled == guided


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_hyper_parameters_are_the_scripts(name: str) -> None:
    c = load_config(preset=name)
    trained, generated, updates, steps, filtered = BATCHES.get(name, (128, 256, 4, 29, True))
    assert (c.dapo.prompts_per_rollout, c.dapo.generation_prompts) == (trained, generated)
    assert (c.dapo.updates_per_rollout, c.train.steps) == (updates, steps)
    assert c.dapo.dynamic_sampling == filtered
    assert c.train.micro_batch_size == (1 if name == "log-e13b" else 4)
    assert c.model.path == "Qwen/Qwen2.5-1.5B-Instruct" and c.model.gradient_checkpointing
    assert (c.task.name, c.task.path, c.task.prompt_suffix) == ("gsm8k", "openai/gsm8k", None)
    assert (c.train.lr, c.train.warmup_steps) == (1e-5, 10)
    assert (c.train.weight_decay, c.train.max_grad_norm) == (0.1, 1.0)
    assert (c.dapo.clip_low, c.dapo.clip_high, c.dapo.clip_ratio_c) == (0.2, 0.25, 3.0)
    assert (c.dapo.max_generation_tries, c.rollout.num_generations) == (5, 8)
    assert (c.dapo.overlong_buffer, c.dapo.overlong_factor) == (256, 0.5)
    assert c.dapo.overlong_penalty and not c.dapo.overlong_filter and not c.dapo.tis
    assert (c.rollout.temperature, c.rollout.top_p) == (1.0, 1.0)
    assert (c.rollout.max_prompt_tokens, c.rollout.max_new_tokens) == (1024, 1024)
    assert (c.lora.r, c.lora.alpha, c.lora.targets) == (32, 16, "all-linear")
    assert c.evaluation.every == 20


def test_an_epoch_of_233_steps_is_all_of_gsm8k_in_32s() -> None:
    c = load_config(preset="log-e13b")
    assert c.train.steps == 7473 // c.dapo.generation_prompts
    assert load_config(preset="log-e13a").train.steps == 7473 // 256


def test_runs_differ_in_what_the_documents_say_they_differ_in() -> None:
    def differing(a: str, b: str) -> set[str]:
        first, second = (load_config(preset=name).model_dump() for name in (a, b))
        return {
            f"{section}.{key}"
            for section, keys in first.items()
            for key, value in keys.items()
            if second[section][key] != value
        }

    assert differing("log-e13a", "log-e13c") == {"quant.apply_during", "dapo.logp_gap_limit"}
    assert differing("log-e13d", "log-e13e") == set()
    assert differing("log-e13e", "log-e13f") == {"quant.weight_profile", "quant.block_axis"}
    assert differing("log-e13f", "log-e13g") == {"quant.use_ste"}
    assert differing("plan-e13a", "log-e13a-mxfp4") == {"quant.use_ste"}
    assert differing("plan-e13c", "plan-e13d") == {"noise.layers"}
    assert differing("log-e13j", "log-e13k") == {"noise.sigma_start", "noise.sigma_end"}
    assert {k.split(".")[0] for k in differing("log-e6a", "log-e6b")} == {"noise"}
    assert {k.split(".")[0] for k in differing("log-e13h", "e13j")} == {"noise"}
    assert {k.split(".")[0] for k in differing("log-e13h", "log-e13j")} == {"noise", "dapo"}


def test_the_multipliers_are_the_documents() -> None:
    def layers(name: str) -> tuple[float, dict[int, float]]:
        found = load_config(preset=name).noise.layers
        return found.default_multiplier, found.layer_multipliers

    assert layers("plan-e13c") == (0.0, dict.fromkeys(range(6, 16), 1.0))
    assert layers("plan-e13d") == (1.0, dict.fromkeys(range(6, 16), 1.5))
    assert layers("e13i") == layers("e13k") == (0.0, dict.fromkeys(range(10, 20), 1.0))
    default, table = layers("e13j")
    assert default == 1.0 and sorted(table) == list(range(28))
    assert max(table, key=table.__getitem__) == 15 and table[15] == 1.17
    assert min(table.values()) == table[26] == 0.79
    assert sum(table.values()) / 28 == pytest.approx(1.0, abs=0.01)


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name"),
    [("e6a", "log-e6a"), ("E6b", "log-e6b"), ("e7a", "log-e7a"), ("E12", "log-e12"),
     ("e13h", "log-e13h"), ("e13a-mxfp4", "log-e13a-mxfp4"), ("e13i", "e13i"),
     ("E13a-nvfp4", "log-e13a"), ("log-e13g-nvfp4", "log-e13g")],
)  # fmt: skip
def test_a_bare_id_of_one_run_is_enough(written: str, name: str) -> None:
    loaded = load_run(preset=written)
    assert loaded.name == name and loaded.config == load_config(preset=name)


@pytest.mark.parametrize(
    ("written", "candidates"),
    [
        ("e13a", ["log-e13a", "log-e13a-mxfp4", "plan-e13a"]),
        ("e13b", ["log-e13b", "plan-e13b"]),
        ("E13c", ["log-e13c", "plan-e13c"]),
        ("e13d", ["log-e13d", "plan-e13d"]),
    ],
)
def test_an_id_of_several_runs_is_an_error_that_lists_them(
    written: str, candidates: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(preset=written)
    text = str(caught.value)
    assert f"names {len(candidates)} different runs" in text
    for name in candidates:
        assert f"{name}: {preset_summary(name)}" in text


def test_the_planned_runs_point_at_what_was_run_under_their_id() -> None:
    (note,) = load_run(preset="e13j").notes
    assert "Planned E13j" in note and "log-e13j" in note
    assert load_run(preset="e13i").notes == ()  # noise on linear weights: no preset
    assert load_run(preset="log-e13j").notes == ()


@pytest.mark.parametrize("written", ["e13z", "e1", "plan-e6a", "base/dapo-gsm8k"])
def test_unknown_presets_are_an_error_with_the_list(written: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no preset.*plan-e13d"):
        load_config(preset=written)


def test_only_presets_extend(tmp_path: Any) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: log-e13h\n")
    with pytest.raises(ConfigError, match="extends: unknown key"):
        load_config(file)
    assert (PRESET_FOLDER / "base" / "dapo-gsm8k.yaml").exists()


def test_the_demo_needs_no_network_and_compares_all_arms() -> None:
    c = load_config(preset="demo")
    assert (c.model.path, c.task.name) == ("demo", "word_problems")
    assert set(c.evaluation.baselines) == {"bf16", "ptq", "bf16_lora"}
    assert c.quant.injection_point == "both" and c.noise.enabled
    assert (c.task.test_size or 0) >= 1000
