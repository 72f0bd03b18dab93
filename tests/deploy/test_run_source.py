"""What an export takes from a run: adapter, rounding errors, calibrated scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from npu_qat.config import Recipe, RunConfig, load_config
from npu_qat.deploy import AscendWriter, CompressedTensorsWriter, PackedCore, open_checkpoint
from npu_qat.deploy.core import fingerprint_of
from npu_qat.deploy.export import export
from npu_qat.deploy.run_source import (
    BASE,
    calibrated_inputs,
    describe_base,
    trained_adapter,
    trained_base,
    trained_errors,
)
from npu_qat.layers import QuantizedModel, prepare_model
from npu_qat.layers.base_model import load_base


def test_the_adapter_of_the_quantised_arm_is_taken(tmp_path: Path) -> None:
    for arm in ("bf16_lora", "w4a4"):
        (tmp_path / "adapters" / arm).mkdir(parents=True)
    assert trained_adapter(tmp_path) == tmp_path / "adapters" / "w4a4"
    (tmp_path / "adapters" / "w4a4").rmdir()
    with pytest.raises(ValueError, match="holds no trained adapter yet"):
        trained_adapter(tmp_path)


def test_rounding_errors_come_from_the_audit(tmp_path: Path) -> None:
    assert trained_errors(tmp_path) == {}
    modules = [{"name": "a", "weight_rel_error": 0.1}, {"name": "b", "weight_rel_error": None}]
    (tmp_path / "audit.json").write_text(json.dumps({"modules": modules}))
    assert trained_errors(tmp_path) == {"a": 0.1}


def prepared(**quant: str) -> tuple[RunConfig, QuantizedModel]:
    """The demo's configuration with other quantisation, and its model as training prepares it."""
    overrides = [f"quant.{key}={value}" for key, value in quant.items()]
    config = load_config(preset="demo", overrides=overrides)
    model, _ = load_base(config.model, torch.device("cpu"))
    return config, prepare_model(model, config.quant)


def test_the_base_of_a_run_is_the_one_that_is_exported(tmp_path: Path) -> None:
    config, handle = prepared()
    (tmp_path / BASE).write_text(json.dumps(describe_base(config, handle)))
    base = trained_base(tmp_path)
    assert base is not None and base.input_scales == {}
    core = PackedCore(open_checkpoint(config.model), config.quant)
    assert base.fingerprint == fingerprint_of(core).hexdigest()
    exported = export(core, AscendWriter(), tmp_path / "served", trained=base.fingerprint)
    assert exported.fingerprint == base.fingerprint


def test_another_model_is_not_exported_for_the_run(tmp_path: Path) -> None:
    config, handle = prepared()
    found = describe_base(config, handle)["fingerprint"]
    other = PackedCore(open_checkpoint(config.model), Recipe(weight_profile="ascend950-mse"))
    with pytest.raises(ValueError, match="is not the model that was trained"):
        export(other, AscendWriter(), tmp_path / "served", trained=found)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_no_format_holds_has_no_fingerprint_but_a_reason() -> None:
    config, handle = prepared(block_axis="column")
    found = describe_base(config, handle)
    assert found["fingerprint"] is None and "block_axis: column" in found["reason"]


def test_scales_of_a_run_come_back_exactly_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert trained_base(tmp_path) is None
    config, handle = prepared(weight_profile="nvfp4", activation_profile="nvfp4")
    layer = next(iter(handle.layers.values()))
    for other in handle.layers.values():
        other.input_tensor_scale.fill_(1.0)
    layer.input_tensor_scale.fill_(0.1)
    (tmp_path / BASE).write_text(json.dumps(describe_base(config, handle)))
    base = trained_base(tmp_path)
    assert base is not None and torch.equal(base.input_scales[layer.path], torch.tensor(0.1))
    (tmp_path / BASE).write_text("{}")
    with pytest.raises(ValueError, match=r"base\.json cannot be read"):
        trained_base(tmp_path)


def test_nvfp4_inputs_are_calibrated_and_shared_as_in_training(tmp_path: Path) -> None:
    config = load_config(
        preset="demo",
        overrides=[
            "quant.weight_profile=nvfp4",
            "quant.activation_profile=nvfp4",
            "run.device=cpu",
        ],
    )
    scales = calibrated_inputs(config)
    core = PackedCore(open_checkpoint(config.model), config.quant, input_scales=scales)
    assert set(scales) == set(core.quantized)
    layer = "model.layers.0"
    assert scales[f"{layer}.self_attn.q_proj"] == scales[f"{layer}.self_attn.v_proj"]
    assert scales[f"{layer}.mlp.gate_proj"] == scales[f"{layer}.mlp.up_proj"]
    assert scales[f"{layer}.mlp.gate_proj"] != scales[f"{layer}.mlp.down_proj"]
    assert all(torch.isfinite(s) and s > 0 for s in scales.values())
    exported = export(core, CompressedTensorsWriter(), tmp_path / "served")
    assert exported.record["activations"]["same"]
