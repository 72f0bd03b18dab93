"""What an export takes from a run: adapter, rounding errors, calibrated scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from npu_qat.config import load_config
from npu_qat.deploy import CompressedTensorsWriter, PackedCore, open_checkpoint
from npu_qat.deploy.export import export
from npu_qat.deploy.run_source import calibrated_inputs, trained_adapter, trained_errors


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
