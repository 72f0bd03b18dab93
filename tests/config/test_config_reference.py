"""The documentation page shows the schema as it is, and its examples hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from npu_qat.config import ConfigError, load_config, preset_names
from npu_qat.config.fields import walk
from npu_qat.config.reference import render_reference, with_reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The keys of the two blocks, as the earlier program had them.
DESIGN_KEYS = (
    *("enabled", "error_scale", "error_type", "injection_point", "target_modules", "use_ste"),
    *("target_layers", "apply_during", "seed", "deadzone_threshold", "exclude_modules"),
    *("mxfp4_stochastic_rounding", "nvfp4_stochastic_rounding", "mxfp4_block_2d"),
    *("sigma_start", "sigma_end", "num_stages", "exclude_patterns", "layer_types"),
    *("epoch_aware", "stages_per_epoch", "layer_sigma_config", "zone_schedule"),
)


def test_the_page_is_current() -> None:
    assert with_reference(TEXT) == TEXT, (
        "run: python -m npu_qat.config.reference docs/configuration.md"
    )


def test_the_reference_has_every_key_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", render_reference(), re.MULTILINE)
    assert sorted(rows) == sorted(key.path[-1] for key in walk() if len(key.path) > 1)


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly one line"):
        with_reference("# Page\n")


@pytest.mark.parametrize("name", preset_names())
def test_the_page_names_every_preset(name: str) -> None:
    assert f"| `{name}` |" in TEXT


@pytest.mark.parametrize("key", DESIGN_KEYS)
def test_the_page_says_what_becomes_of_every_key_of_the_design_documents(key: str) -> None:
    assert re.search(rf"`[^`]*\b{key}\b[^`]*`", TEXT.split("## The design documents")[1])


def test_the_yaml_on_the_page_is_valid(tmp_path: Path) -> None:
    blocks = [body for language, body in BLOCK.findall(TEXT) if language == "yaml"]
    assert len(blocks) == 2
    for body in blocks:
        file = tmp_path / "my-run.yaml"
        file.write_text(body, encoding="utf-8")
        load_config(file)


def test_the_errors_on_the_page_are_the_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-run.yaml").write_text("train:\n  learning_rate: 1e-4\n  steps: many\n")
    pairs = ", ".join(f"{layer}: 1.0" for layer in range(6, 16))
    Path("plan.yaml").write_text(
        "noise_injection:\n  layer_sigma_config:\n    layer_multipliers:\n      " + pairs + "\n"
    )
    shown = [body for language, body in BLOCK.findall(TEXT) if body.startswith("error:")]
    for file, body in zip(("my-run.yaml", "plan.yaml"), shown, strict=True):
        with pytest.raises(ConfigError) as caught:
            load_config(file)
        assert f"error: {caught.value}\n" == body
