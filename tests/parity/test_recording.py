"""A recording travels to another machine, and says so when it did not arrive whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from npu_qat.deploy.run_source import TrainedBase, describe_base, trained_base
from npu_qat.parity.levels import check
from npu_qat.parity.recording import CONTENT, TENSORS, Recording, Settings, record
from npu_qat.parity.training_side import open_training
from tests.parity.world import SMALL, World, failed, make, verdicts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    world.recording.save(tmp_path / "recording")
    return tmp_path / "recording"


def edit(folder: Path, change: Any) -> None:
    content = json.loads((folder / CONTENT).read_text())
    change(content)
    (folder / CONTENT).write_text(json.dumps(content))


def test_what_was_written_is_read_and_judges_alike(world: World, folder: Path) -> None:
    again = Recording.load(folder)
    assert again.content == json.loads(json.dumps(world.recording.content))
    assert set(again.tensors) == set(world.recording.tensors)
    report = check(again, world.export, world.selection)
    assert failed(report) == {} and report.passed


def test_it_holds_no_weights_and_names_machine_versions_and_texts(world: World) -> None:
    content, tensors = world.recording.content, world.recording.tensors
    assert content["version"] == 1 and content["environment"] == {"device": "cpu"}
    assert content["computed_on"]["torch"] == torch.__version__
    assert content["recipe"]["activation_profile"] == "ascend950"
    assert len(content["prompts"]) == SMALL.prompts and content["prompts"][0]["messages"]
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"x", "codes", "scales", "y", "logp", "best", "top_ids", "top_logp"}
    # q, k and v read one tensor, which is kept once.
    inputs = [name for name in tensors if name.startswith("x.model.layers.0.self_attn")]
    assert inputs == ["x.model.layers.0.self_attn.q_proj", "x.model.layers.0.self_attn.o_proj"]


def test_an_edited_limit_is_refused(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["noise"]["variants"]["each row alone"]["kl_mean"] = 100.0

    edit(folder, change)
    with pytest.raises(ValueError, match="edited or damaged: its seal does not fit"):
        Recording.load(folder)


def test_an_edited_tensor_is_refused(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError, match="its SHA-256 is not the one"):
        Recording.load(folder)


def test_a_cut_or_lost_file_is_refused(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1])
    with pytest.raises(ValueError, match="is cut"):
        Recording.load(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(ValueError, match=r"recording\.safetensors is missing"):
        Recording.load(folder)
    (folder / CONTENT).write_text("{")
    with pytest.raises(ValueError, match="holds no readable recording"):
        Recording.load(folder)


def test_another_version_is_refused(folder: Path) -> None:
    edit(folder, lambda content: content.update(version=2))
    with pytest.raises(ValueError, match="version 2, but this program reads version 1"):
        Recording.load(folder)


def test_a_folder_in_use_is_not_written(world: World, folder: Path) -> None:
    with pytest.raises(ValueError, match="is not empty"):
        world.recording.save(folder)


def test_more_prompts_than_the_task_has_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match="the task has 20 test problems"):
        record(world.side, Settings(prompts=21))


def test_a_model_that_is_not_the_runs_is_refused(world: World) -> None:
    found = describe_base(world.config, world.side.handle)
    base = TrainedBase(found["fingerprint"], {})
    right = open_training(world.config, None, world.selection, base)
    assert record(right, SMALL).content["base_fingerprint"] == found["fingerprint"]
    wrong = open_training(world.config, None, world.selection, TrainedBase("0" * 64, {}))
    with pytest.raises(ValueError, match="is not the model that was trained"):
        record(wrong, SMALL)


def test_the_scales_that_a_run_calibrated_are_used_again(tmp_path: Path) -> None:
    quant = {"weight_profile": "nvfp4", "activation_profile": "nvfp4"}
    world = make(tmp_path, "compressed-tensors", **quant)
    content = describe_base(world.config, world.side.handle)
    path = next(iter(content["input_scales"]))
    content["input_scales"] = dict.fromkeys(content["input_scales"], 0.5)
    (tmp_path / "base.json").write_text(json.dumps(content))
    side = open_training(world.config, None, world.selection, trained_base(tmp_path))
    assert float(side.handle.layers[path].input_tensor_scale) == 0.5
    # The export has the calibrated ones, so the two are told apart.
    with pytest.raises(ValueError, match="of another base"):
        check(record(side, SMALL), world.export, world.selection)
    assert set(verdicts(world.judge()).values()) == {"pass"}
