"""The base of a rollout engine: written once, found again, replaced when it is not right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npu_qat.config import ModelConfig, Recipe, RunConfig
from npu_qat.deploy import open_checkpoint, open_export
from npu_qat.deploy.core import PackedCore
from npu_qat.deploy.engine_base import FOLDER, check_engine_base, write_engine_base
from npu_qat.deploy.validate import validate
from npu_qat.training.rundir import BASE
from tests.deploy.models import damage, save

OTHER_MODEL = "rollout.engine vllm does not compute the model that is trained: with a base in "


def configuration(
    source: Path, recipe: Recipe | None = None, format: str = "auto", engine: str = "vllm"
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": ModelConfig(path=str(source)),
            "quant": recipe or Recipe(),
            "rollout": {"engine": engine, "engine_format": format},
        }
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source")


def signed(folder: Path) -> tuple[int, int]:
    """What another folder in its place would not have."""
    status = (folder / "SHA256SUMS").stat()
    return status.st_ino, status.st_mtime_ns


@pytest.mark.parametrize(
    ("format", "device", "written"),
    [
        ("auto", "npu", "ascend"),
        ("auto", "cuda", "compressed-tensors"),
        ("ascend", "cpu", "ascend"),
        ("compressed-tensors", "npu", "compressed-tensors"),
    ],
)
def test_the_format_is_the_devices_unless_it_is_named(
    source: Path, tmp_path: Path, format: str, device: str, written: str
) -> None:
    folder = tmp_path / FOLDER
    write_engine_base(configuration(source, format=format), folder, device)
    assert validate(folder) == [] and open_export(folder).format == written
    assert not (folder / "adapter").exists()


def test_an_intact_base_is_kept(source: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / FOLDER, configuration(source)
    write_engine_base(config, folder, "npu")
    before = signed(folder)
    write_engine_base(config, folder, "npu")
    assert signed(folder) == before


@pytest.mark.parametrize("reason", ["damaged", "another base", "another format"])
def test_what_is_not_the_runs_base_is_replaced(source: Path, tmp_path: Path, reason: str) -> None:
    folder, config, device = tmp_path / FOLDER, configuration(source), "npu"
    write_engine_base(config, folder, device)
    before = signed(folder)
    if reason == "damaged":
        damage(folder, lambda tensors: tensors.pop("model.norm.weight"))
    elif reason == "another base":
        config = configuration(source, Recipe(weight_profile="ascend950-mse"))
    else:
        device = "cuda"
    write_engine_base(config, folder, device)
    assert signed(folder) != before and validate(folder) == []


def test_the_rest_of_a_killed_run_is_no_obstacle(source: Path, tmp_path: Path) -> None:
    (tmp_path / f"{FOLDER}.partial").mkdir()
    (tmp_path / f"{FOLDER}.partial" / "model.safetensors").write_text("cut")
    write_engine_base(configuration(source), tmp_path / FOLDER, "npu")
    assert validate(tmp_path / FOLDER) == []
    assert not (tmp_path / f"{FOLDER}.partial").exists()


def test_nvfp4_inputs_have_the_scales_that_the_run_calibrated(source: Path, tmp_path: Path) -> None:
    config = configuration(source, Recipe(weight_profile="nvfp4", activation_profile="nvfp4"))
    linears = PackedCore(open_checkpoint(config.model), config.quant).quantized
    content = {"fingerprint": None, "input_scales": dict.fromkeys(linears, 0.125)}
    (tmp_path / BASE).write_text(json.dumps(content))
    write_engine_base(config, tmp_path / FOLDER, "cuda")
    scale = open_export(tmp_path / FOLDER).read(f"{linears[0]}.input_tensor_scale")
    assert float(scale) == 0.125  # type: ignore[arg-type]


# --- before anything is loaded ------------------------------------------------------------------

W4A16 = Recipe(injection_point="weight")
OUTPUTS = Recipe(injection_point="output")
TWIN = Recipe(activation_profile="compressed-tensors")
NVFP4 = Recipe(weight_profile="nvfp4", activation_profile="nvfp4")


@pytest.mark.parametrize(
    ("recipe", "format", "device", "told"),
    [
        (
            Recipe(),
            "auto",
            "cuda",
            "format compressed-tensors (rollout.engine_format: auto on cuda) it makes the inputs "
            "of linears 'compressed-tensors', but training makes them 'ascend950'",
        ),
        (Recipe(), "compressed-tensors", "npu", "(rollout.engine_format: compressed-tensors)"),
        (TWIN, "auto", "npu", "auto on npu) it makes the inputs of linears 'ascend950'"),
        (NVFP4, "ascend", "cuda", "activation_profile: ascend950, or sample with"),
        (W4A16, "auto", "npu", "but training makes them '16 bits'"),
        (OUTPUTS, "auto", "cuda", "Train with quant.injection_point: weight, or"),
    ],
)
def test_an_engine_with_another_rule_for_inputs_is_refused(
    tmp_path: Path, recipe: Recipe, format: str, device: str, told: str
) -> None:
    """There is no model in that place: none is needed to know."""
    config = configuration(tmp_path / "nowhere", recipe, format)
    with pytest.raises(ValueError) as caught:
        check_engine_base(config, device)
    assert str(caught.value).startswith(OTHER_MODEL) and told in str(caught.value)
    check_engine_base(configuration(tmp_path / "nowhere", recipe, format, engine="hf"), device)


@pytest.mark.parametrize(
    ("recipe", "format", "device"),
    [
        (Recipe(), "auto", "npu"),
        (Recipe(), "ascend", "cpu"),
        (TWIN, "auto", "cuda"),
        (NVFP4, "auto", "cpu"),
        (W4A16, "auto", "cuda"),
    ],
)
def test_an_engine_with_the_same_rule_is_let_through(
    tmp_path: Path, recipe: Recipe, format: str, device: str
) -> None:
    check_engine_base(configuration(tmp_path / "nowhere", recipe, format), device)
