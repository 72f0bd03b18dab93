"""What is written is read back unchanged, by this program and by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npu_qat.config import RunConfig, describe_yaml, dump_yaml, load_config, preset_names
from npu_qat.config.dump import to_plain
from npu_qat.config.fields import walk

NASTY = st.sampled_from(
    ["no", "1e5", "12e4567", "0x1F", "010", "~", "true", "null", ":", "a: b", "#", "é ü", "", " x "]
)


@pytest.mark.parametrize("write", [dump_yaml, describe_yaml])
@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_survives_writing_and_reading(preset: str, write, tmp_path: Path) -> None:
    config = load_config(preset=preset)
    file = tmp_path / "config.yaml"
    file.write_text(write(config), encoding="utf-8")
    assert load_config(file) == config


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
@given(
    text=st.one_of(NASTY, st.text(st.characters(codec="utf-8", exclude_categories=["C"]))),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    layers=st.dictionaries(st.integers(0, 99), st.floats(0, 1e9)),
)
def test_any_text_number_and_mapping_survives(
    tmp_path: Path, text: str, lr: float, layers: dict[int, float]
) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"path": text, "revision": text},
            "train": {"lr": lr},
            "quant": {"exclude": ["lm_head", "1e5"]},
            "noise": {"layers": {"layer_multipliers": layers}},
            "deepspeed": {"overrides": {"a": [1, {"b": text}]}},
        }
    )
    file = tmp_path / "config.yaml"
    for write in (dump_yaml, describe_yaml):
        file.write_text(write(config), encoding="utf-8")
        assert load_config(file) == config


def test_a_reader_of_yaml_1_1_sees_the_same_values() -> None:
    for preset in preset_names():
        config = load_config(preset=preset, overrides=["model.revision='12e4567'"])
        assert yaml.safe_load(dump_yaml(config)) == to_plain(config)


def test_the_description_has_a_comment_for_every_key() -> None:
    text = describe_yaml(
        load_config(
            overrides=[
                "noise.layers.zone_schedule.edge_layers=[0]",
                "noise.layers.zone_schedule.middle_layers=[1]",
            ]
        )
    )
    words = " ".join(line.strip("# ") for line in text.splitlines() if line.strip().startswith("#"))
    for key in walk():
        assert " ".join(key.description.split()) in words, key.dotted
