"""The design documents' blocks: each of their keys is translated or refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npu_qat.config import ConfigError, RunConfig, load_config, load_run, parse_overrides
from npu_qat.config.load import Loaded

PLAN = """
hw_error_injection:
  enabled: true
  error_type: mxfp4
  injection_point: both
  apply_during: both
  target_modules: ["linear"]
  exclude_modules: ["lm_head", "embed_tokens", "lora_A", "lora_B"]
  use_ste: true
noise_injection:
  enabled: true
  sigma_start: 0.01
  sigma_end: 0.00001
  num_stages: 10
  layer_types: ["rmsnorm"]
  layer_sigma_config:
    default_multiplier: 0.0
    layer_multipliers: {6: 1.0, 7: 1.0}
"""
HARDWARE: dict[str, Any] = {"enabled": True, "error_type": "mxfp4", "injection_point": "both"}


def load_text(tmp_path: Path, text: str, *overrides: str) -> Loaded:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_run(file, overrides=parse_overrides(overrides))


def block(name: str, **keys: Any) -> str:
    import json

    return f"{name}: {json.dumps(keys)}"


def hardware(tmp_path: Path, **keys: Any) -> RunConfig:
    text = block("hw_error_injection", **{**HARDWARE, **keys})
    return load_text(tmp_path, text).config


def noise(tmp_path: Path, **keys: Any) -> RunConfig:
    return load_text(tmp_path, block("noise_injection", **{"enabled": True, **keys})).config


def problem(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text, *overrides)
    return str(caught.value)


def test_the_plans_blocks_are_translated(tmp_path: Path) -> None:
    config = load_text(tmp_path, PLAN).config
    assert config.quant == RunConfig().quant.model_copy(
        update={
            "weight_profile": "fork-mxfp4",
            "activation_profile": "fork-mxfp4",
            "lora_input": "quantised",
        }
    )
    n = config.noise
    assert (n.enabled, n.sigma_start, n.sigma_end, n.num_stages) == (True, 0.01, 1e-5, 10)
    assert n.layers.enabled, "the plan leaves 'enabled' out and means it"
    assert n.layers.layer_multipliers == {6: 1.0, 7: 1.0}
    assert n.layers.default_multiplier == 0.0


@pytest.mark.parametrize("form", ["nested", "dotted"])
def test_blocks_may_stand_under_trainer(tmp_path: Path, form: str) -> None:
    if form == "nested":
        text = "trainer:\n" + "".join(f"  {line}\n" for line in PLAN.splitlines())
    else:
        text = PLAN.replace("hw_error", "trainer.hw_error").replace(
            "noise_inj", "trainer.noise_inj"
        )
    assert load_text(tmp_path, text).config == load_text(tmp_path, PLAN).config


def test_other_keys_under_trainer_are_unknown(tmp_path: Path) -> None:
    text = "trainer:\n  total_epochs: 3\n  noise_injection: {enabled: false}\n"
    assert "trainer: unknown key" in problem(tmp_path, text)


def test_a_block_given_twice_is_an_error(tmp_path: Path) -> None:
    text = "noise_injection: {enabled: false}\ntrainer:\n  noise_injection: {enabled: true}\n"
    assert "is given twice, also as noise_injection" in problem(tmp_path, text)


def test_hydra_overrides_change_the_blocks(tmp_path: Path) -> None:
    text = PLAN + "\n"
    config = load_text(
        tmp_path,
        text,
        "trainer.noise_injection.sigma_start=0.05",
        "hw_error_injection.injection_point=weight",
        "trainer.noise_injection.layer_sigma_config.layer_multipliers.9=2",
    ).config
    assert config.noise.sigma_start == 0.05
    assert config.quant.injection_point == "weight"
    assert config.noise.layers.layer_multipliers == {6: 1.0, 7: 1.0, 9: 2.0}


def test_hydra_overrides_need_no_file() -> None:
    config = load_config(
        overrides=["trainer.noise_injection.enabled=True", "noise_injection.sigma_start=0.03"]
    )
    assert (config.noise.enabled, config.noise.sigma_start) == (True, 0.03)
    with pytest.raises(ConfigError, match=r"--set noise_injection\.enabled=3: .* true or false"):
        load_config(overrides=["noise_injection.enabled=3"])


def test_our_own_overrides_go_over_the_blocks(tmp_path: Path) -> None:
    config = load_text(tmp_path, PLAN, "noise.sigma_start=0.02").config
    assert config.noise.sigma_start == 0.02


def test_disabled_blocks_switch_off(tmp_path: Path) -> None:
    text = "hw_error_injection: {enabled: false}\nnoise_injection: {enabled: false}\n"
    config = load_text(tmp_path, text).config
    assert config.quant.injection_point == "none" and not config.noise.enabled
    # Whatever else the block says is then without effect, but still has to exist.
    off = {"enabled": False, "error_type": "relative_gaussian", "error_scale": 1e-5}
    assert load_text(tmp_path, block("hw_error_injection", **off)).config.quant == config.quant
    assert "unknown key" in problem(tmp_path, "hw_error_injection: {enabled: false, eror: 1}")


@pytest.mark.parametrize("name", ["hw_error_injection", "noise_injection"])
def test_a_block_that_does_not_say_whether_it_is_on_is_refused(tmp_path: Path, name: str) -> None:
    assert f"{name}: needs enabled: true or enabled: false" in problem(tmp_path, f"{name}: {{}}")


@pytest.mark.parametrize("text", ["hw_error_injection: 3", "noise_injection: [1]"])
def test_a_block_must_be_a_block(tmp_path: Path, text: str) -> None:
    assert "expected a block of keys" in problem(tmp_path, text)


@pytest.mark.parametrize("point", ["input", "output", "weight", "both", "weight_output"])
def test_injection_points_are_kept(tmp_path: Path, point: str) -> None:
    quant = hardware(tmp_path, injection_point=point).quant
    assert quant.injection_point == point
    assert quant.lora_input == ("quantised" if point in ("input", "both") else "full")
    assert quant.lora_output == ("quantised" if "output" in point else "full")


def test_the_two_meanings_of_both_are_pointed_out(tmp_path: Path) -> None:
    notes = load_text(tmp_path, PLAN).notes
    assert any("the plan's weight + output is weight_output" in note for note in notes)


def test_nvfp4_is_the_earlier_codes_last_state(tmp_path: Path) -> None:
    quant = hardware(tmp_path, error_type="nvfp4").quant
    assert quant.weight_profile == "fork-nvfp4-column" and quant.block_axis == "column"
    assert quant.activation_profile == "fork-nvfp4-row"


def test_what_a_block_implies_can_be_refined_but_not_what_it_states(tmp_path: Path) -> None:
    refined = PLAN + "quant: {weight_profile: ascend950, lora_input: full}\n"
    quant = load_text(tmp_path, refined).config.quant
    assert (quant.weight_profile, quant.activation_profile) == ("ascend950", "fork-mxfp4")
    assert quant.lora_input == "full"
    contradicted = PLAN + "quant: {injection_point: weight}\n"
    assert 'hw_error_injection.injection_point means "both"; keep one of the two' in problem(
        tmp_path, contradicted
    )
    load_text(tmp_path, PLAN + "quant: {injection_point: both}\n")


@pytest.mark.parametrize(
    "error_type",
    ["relative_gaussian", "absolute_gaussian", "systematic_bias", "deadzone", "fp8", "int4"],
)
def test_other_error_types_are_refused_with_an_alternative(tmp_path: Path, error_type: str) -> None:
    found = problem(tmp_path, block("hw_error_injection", **{**HARDWARE, "error_type": error_type}))
    assert error_type in found and "mxfp4" in found


@pytest.mark.parametrize("key", ["error_type", "injection_point"])
def test_keys_whose_old_default_would_surprise_must_be_given(tmp_path: Path, key: str) -> None:
    keys = {k: v for k, v in HARDWARE.items() if k != key}
    assert f"needs {key}" in problem(tmp_path, block("hw_error_injection", **keys))


@pytest.mark.parametrize(
    "key", ["mxfp4_stochastic_rounding", "nvfp4_stochastic_rounding", "mxfp4_block_2d"]
)
def test_numbers_that_no_operator_computes_are_refused(tmp_path: Path, key: str) -> None:
    assert hardware(tmp_path, **{key: False}) == hardware(tmp_path)
    found = problem(tmp_path, block("hw_error_injection", **{**HARDWARE, key: True}))
    assert f"set {key}: false" in found


def test_keys_without_effect_leave_a_note(tmp_path: Path) -> None:
    extra = {"error_scale": 1e-5, "deadzone_threshold": 0.01, "seed": 7}
    loaded = load_text(tmp_path, block("hw_error_injection", **{**HARDWARE, **extra}))
    assert loaded.config == hardware(tmp_path)
    for key in extra:
        assert any(note.startswith(f"hw_error_injection.{key}: has no") for note in loaded.notes)


def test_phases_layers_and_the_estimator_are_kept(tmp_path: Path) -> None:
    quant = hardware(
        tmp_path, apply_during="rollout", target_layers=[1, 2], use_ste=False, target_modules=None
    ).quant
    assert (quant.apply_during, quant.target_layers, quant.use_ste) == ("rollout", (1, 2), False)


def test_excluded_substrings_become_paths(tmp_path: Path) -> None:
    names = ["lm_head", "embed_tokens", "lora_A", "lora_B", "layers.0", "layers.2.", "base_layer",
             "mlp.down_proj", "q_proj"]  # fmt: skip
    keys = {**HARDWARE, "exclude_modules": names}
    loaded = load_text(tmp_path, block("hw_error_injection", **keys))
    assert loaded.config.quant.exclude == (
        "lm_head", "layers.0", "layers.2", "mlp.down_proj", "q_proj",
    )  # fmt: skip
    assert any("layers.2 is this layer only" in note for note in loaded.notes)
    assert not any("layers.0 is this layer only" in note for note in loaded.notes)
    assert any("base_layer" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("attn", "self_attn"),
        ("proj", "q_proj, k_proj"),
        ("layers", "layers.0"),
        ("gate", "gate_proj"),
    ],
)
def test_fragments_of_names_are_refused_with_the_names(
    tmp_path: Path, name: str, meant: str
) -> None:
    text = block("hw_error_injection", **HARDWARE, exclude_modules=[name])
    found = problem(tmp_path, text)
    assert "hw_error_injection.exclude_modules" in found and meant in found


def test_targeting_some_linears_is_answered_with_the_exclusion_of_the_others(
    tmp_path: Path,
) -> None:
    text = block("hw_error_injection", **HARDWARE, target_modules=["down_proj", "o_proj"])
    found = problem(tmp_path, text)
    assert "exclude: [lm_head, q_proj, k_proj, v_proj, gate_proj, up_proj]" in found
    rms = block("hw_error_injection", **HARDWARE, target_modules=["rmsnorm"])
    assert "use target_modules: [linear]" in problem(tmp_path, rms)


def test_the_noise_keys_are_kept(tmp_path: Path) -> None:
    n = noise(
        tmp_path,
        sigma_start=0.05,
        sigma_end=0.0005,
        num_stages=7,
        epoch_aware=True,
        stages_per_epoch=4,
        target_modules=["post_attention_layernorm"],
        exclude_patterns=["lm_head", "embed_tokens", "layers.3", "input_layernorm"],
        layer_types=[],
    ).noise
    assert (n.sigma_start, n.sigma_end, n.num_stages) == (0.05, 0.0005, 7)
    assert (n.epoch_aware, n.stages_per_epoch) == (True, 4)
    assert n.target_modules == ("post_attention_layernorm",)
    assert n.exclude == ("layers.3", "input_layernorm")


def test_old_defaults_of_the_noise_are_kept(tmp_path: Path) -> None:
    n = noise(tmp_path).noise
    assert (n.sigma_start, n.sigma_end, n.num_stages) == (0.01, 0.001, 10)
    assert n.target_modules == () and n.exclude == () and n.apply_during == "rollout"


@pytest.mark.parametrize("multipliers", [{"14": 1.5, "15": 1.2}, {14: 1.5, 15: 1.2}])
def test_layer_keys_may_be_text_or_numbers(tmp_path: Path, multipliers: dict[Any, float]) -> None:
    rows = ", ".join(f"{key!r}: {value}" for key, value in multipliers.items())
    text = (
        "noise_injection:\n  enabled: true\n  layer_sigma_config:\n"
        f"    enabled: true\n    layer_multipliers: {{{rows}}}\n"
    )
    layers = load_text(tmp_path, text).config.noise.layers
    assert layers.layer_multipliers == {14: 1.5, 15: 1.2} and layers.enabled


def test_multipliers_can_be_switched_off(tmp_path: Path) -> None:
    layers = noise(
        tmp_path, layer_sigma_config={"enabled": False, "layer_multipliers": {"1": 2}}
    ).noise.layers
    assert not layers.enabled


@pytest.mark.parametrize("suffix", ["mult", "multiplier"])
def test_zone_schedules_are_kept_in_both_spellings(tmp_path: Path, suffix: str) -> None:
    zones = {
        "enabled": True,
        "edge_layers": [0, 5, 23],
        "middle_layers": [6, 22],
        "phase_boundary_ratio": 0.4,
        f"early_middle_{suffix}": 0.9,
        f"late_middle_{suffix}": 0.3,
        f"early_edge_{suffix}": 1.1,
        f"late_edge_{suffix}": 1.2,
    }
    schedule = noise(tmp_path, layer_sigma_config={"zone_schedule": zones}).noise.layers
    z = schedule.zone_schedule
    assert z is not None
    assert (z.edge_layers, z.middle_layers, z.phase_boundary_ratio) == ((0, 5, 23), (6, 22), 0.4)
    assert (z.early_edge_multiplier, z.early_middle_multiplier) == (1.1, 0.9)
    assert (z.late_edge_multiplier, z.late_middle_multiplier) == (1.2, 0.3)
    off = noise(tmp_path, layer_sigma_config={"zone_schedule": {**zones, "enabled": False}})
    assert off.noise.layers.zone_schedule is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layer_types": ["rmsnorm", "linear"]}, "collapsed training"),
        ({"target_modules": ["layernorm"]}, "input_layernorm, post_attention_layernorm"),
        ({"exclude_patterns": ["norm"]}, "substring of all norms"),
        ({"steps_per_epoch": 29}, "computed from the training data"),
        ({"is_validation": True}, "noise is never on in evaluation"),
        ({"sigma_strat": 0.1}, "unknown key; did you mean sigma_start?"),
        ({"sigma_start": "0.1"}, "expected a number, got '0.1'"),
        ({"num_stages": 1}, "leaves no stage with noise"),
        ({"layer_sigma_config": {"multipliers": {}}}, "did you mean layer_multipliers?"),
        ({"layer_sigma_config": {"layer_multipliers": "14: 1.5, 15: 1"}}, "{14: 1.5, 15: 1}"),
        ({"layer_sigma_config": {"layer_multipliers": {"a": 1}}}, "is a whole number"),
        ({"layer_sigma_config": {"zone_schedule": {"edge_layers": [1]}}}, "needs middle_layers"),
        ({"layer_sigma_config": {"zone_schedule": {"mid": 1}}}, "unknown key"),
    ],
)
def test_noise_keys_that_cannot_be_taken_are_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    assert message in problem(tmp_path, block("noise_injection", enabled=True, **keys))


def test_a_problem_in_a_block_has_its_line(tmp_path: Path) -> None:
    text = PLAN.replace("use_ste: true", "use_ste: maybe")
    line = text.splitlines().index("  use_ste: maybe") + 1
    assert f"run.yaml:{line}: hw_error_injection.use_ste: expected true or false" in problem(
        tmp_path, text
    )
    bad = PLAN.replace("sigma_start: 0.01", "sigma_start: -1")
    line = bad.splitlines().index("  sigma_start: -1") + 1
    assert f"run.yaml:{line}: noise.sigma_start: expected number > 0, got -1" in problem(
        tmp_path, bad
    )
