"""Checks that span several keys, and the words in which keys are described."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from npu_qat.config import NoiseConfig, Recipe, RunConfig, load_config
from npu_qat.config.fields import known_keys, nearest_key, walk


def test_sections_cannot_be_changed_and_refuse_unknown_keys() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().train.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Recipe(weight_profil="ocp")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation_profile": "ascend950-mse"}, "defined for weights only"),
        ({"weight_profile": "fork-nvfp4-column"}, "set block_axis: column"),
        ({"weight_profile": "fork-mxfp4", "block_axis": "column"}, "set block_axis: row"),
        ({"activation_profile": "fork-nvfp4-column"}, "activations have none of"),
        ({"injection_point": "none", "lora_input": "quantised"}, "needs a quantised input"),
        ({"injection_point": "both", "lora_output": "quantised"}, "needs a quantised output"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe(**kwargs)


def test_profiles_of_what_is_not_quantised_are_not_looked_at() -> None:
    Recipe(injection_point="weight", activation_profile="ascend950-mse")
    Recipe(injection_point="input", weight_profile="fork-nvfp4-column")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_stages": 1}, "leaves no stage with noise"),
        ({"epoch_aware": True, "stages_per_epoch": 1}, "stages_per_epoch: 1"),
        ({"sigma_start": 1e-4, "sigma_end": 1e-3}, "the schedule decays"),
    ],
)
def test_a_noise_schedule_without_noise_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NoiseConfig(enabled=True, **kwargs)
    NoiseConfig(enabled=False, **kwargs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dapo.dynamic_sampling=false"], "must equal dapo.generation_prompts"),
        (
            ["dapo.prompts_per_rollout=2048", "dapo.max_generation_tries=2"],
            "is more than generation_prompts x max_generation_tries can give",
        ),
        (["dapo.overlong_buffer=2000"], "is longer than rollout.max_new_tokens"),
        (
            ["quant.base_storage=packed", "quant.apply_during=training"],
            "packed keeps no 16-bit weight",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(overrides=overrides)


def test_reinforcement_learning_keys_do_not_matter_for_fine_tuning() -> None:
    load_config(overrides=["train.method=sft", "dapo.dynamic_sampling=false"])


def test_every_key_says_what_it_means_and_what_it_takes() -> None:
    for key in walk():
        assert key.description, key.dotted
        assert key.kind, key.dotted


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("train.lr", "number > 0"),
        ("train.steps", "whole number > 0 or null"),
        ("dapo.clip_ratio_c", "number > 1 or null"),
        ("dapo.clip_low", "number > 0 and < 1"),
        ("run.device", "one of auto, npu, cuda, cpu"),
        ("lora.targets", "one of all-linear or list of text"),
        ("noise.layers.layer_multipliers", "mapping of whole number to number >= 0"),
        ("deepspeed.overrides", "mapping"),
        ("noise.layers.zone_schedule", "section"),
    ],
)
def test_types_are_described_in_words(key: str, kind: str) -> None:
    assert known_keys()[tuple(key.split("."))].kind == kind


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("train.lrr", "train.lr"),
        ("train.learning_rate", "train.lr"),
        ("optimizer.lr", "train.lr"),
        ("rollout.temp", "rollout.temperature"),
        ("rollout.tempature", "rollout.temperature"),
        ("quant.weight_profil", "quant.weight_profile"),
        ("weight_profile", "quant.weight_profile"),
        ("dapo.clip_ratio_high", "dapo.clip_high"),
        ("trainer.total_epochs", "train.epochs"),
        ("xyzzy", None),
    ],
)
def test_the_nearest_key_is_suggested(unknown: str, nearest: str | None) -> None:
    assert nearest_key(tuple(unknown.split("."))) == nearest


def test_every_synonym_leads_to_a_key() -> None:
    from npu_qat.config.fields import _SYNONYMS

    dotted = {key.dotted for key in walk()}
    assert set(_SYNONYMS.values()) <= dotted
    assert not [word for word in _SYNONYMS if word in dotted]
