"""What an export consists of, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from npu_qat.config import Recipe
from npu_qat.deploy import AscendWriter, CompressedTensorsWriter
from npu_qat.deploy.core import divisor
from npu_qat.deploy.export import export
from npu_qat.deploy.validate import Finding, validate
from tests.deploy.models import NVFP4, W4A16, WRITERS, core_of, export_tiny, save

Q_PROJ = "model.layers.0.self_attn.q_proj"
ASCEND_INDEX = "quant_model_weights.safetensors.index.json"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


# --- AscendV1 ---------------------------------------------------------------------------------


def test_ascend_tensors_have_the_layout_of_the_format(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path)
    stored = load_file(exported.folder / "quant_model_weights-00001-of-00001.safetensors")
    shapes = {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()}
    assert shapes[f"{Q_PROJ}.weight"] == (torch.uint8, (64, 32))
    assert shapes[f"{Q_PROJ}.weight_scale"] == (torch.uint8, (64, 2))
    assert shapes[f"{Q_PROJ}.bias"] == (torch.float32, (64,))
    assert shapes["model.norm.weight"] == (torch.bfloat16, (64,))
    assert "lm_head.weight" not in stored


@pytest.mark.parametrize("tied", [True, False])
def test_the_description_lists_every_tensor_and_lm_head_always(tmp_path: Path, tied: bool) -> None:
    exported = export_tiny(tmp_path, tie_word_embeddings=tied)
    description = read_json(exported.folder / "quant_model_description.json")
    stored = load_file(next(exported.folder.glob("*.safetensors")))
    types = {n: t for n, t in description.items() if "." in n}
    assert set(types) == set(stored) | {"lm_head.weight"}
    assert ("lm_head.weight" in stored) is not tied
    assert types["lm_head.weight"] == types["model.embed_tokens.weight"] == "FLOAT"
    assert types[f"{Q_PROJ}.weight"] == types[f"{Q_PROJ}.weight_scale"] == "W4A4_MXFP4"
    assert types[f"{Q_PROJ}.bias"] == "FLOAT"
    rest = {n: v for n, v in description.items() if "." not in n}
    assert rest == {
        "version": "1.0.0",
        "model_quant_type": "W4A4_MXFP4",
        "metadata": {},
        "group_size": 32,
        "optional": {},
    }


def test_w4a8_is_the_same_bytes_under_another_type(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    a4 = export(core_of(source), AscendWriter(), tmp_path / "a4")
    a8 = export(core_of(source), AscendWriter("W4A8_MXFP"), tmp_path / "a8")
    names = ["quant_model_weights-00001-of-00001.safetensors", ASCEND_INDEX]
    for name in names:
        assert (a4.folder / name).read_bytes() == (a8.folder / name).read_bytes()
    description = read_json(a8.folder / "quant_model_description.json")
    assert description[f"{Q_PROJ}.weight"] == description["model_quant_type"] == "W4A8_MXFP"
    assert validate(a8.folder) == []
    assert a8.record["activations"]["same"] is False


# --- compressed-tensors -----------------------------------------------------------------------


def test_compressed_tensors_says_what_is_quantised_and_what_is_not(tmp_path: Path) -> None:
    recipe = Recipe(exclude=("lm_head", "layers.1.mlp"))
    exported = export_tiny(tmp_path, "compressed-tensors", recipe)
    settings = read_json(exported.folder / "config.json")["quantization_config"]
    assert settings["format"] == "mxfp4-pack-quantized"
    mlp = [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert settings["ignore"] == [*mlp, "lm_head"]
    assert settings["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert not (exported.folder / "quant_model_description.json").exists()


@pytest.mark.parametrize(
    ("recipe", "format"), [(W4A16, "mxfp4-pack-quantized"), (NVFP4, "nvfp4-pack-quantized")]
)
def test_weights_alone_are_served_with_16_bit_activations(
    tmp_path: Path, recipe: Recipe, format: str
) -> None:
    exported = export_tiny(tmp_path, "compressed-tensors", recipe)
    settings = read_json(exported.folder / "config.json")["quantization_config"]
    assert settings["format"] == format
    assert settings["config_groups"]["group_0"]["input_activations"] is None
    assert exported.record["activations"] == {
        "trained": "16 bits",
        "served": "16 bits",
        "same": True,
    }


def test_calibrated_input_scales_are_stored_as_divisors(tmp_path: Path) -> None:
    recipe = Recipe(weight_profile="nvfp4", activation_profile="nvfp4")
    source = save(tmp_path / "source")
    scales = {p: torch.tensor(0.003) for p in core_of(source, recipe).quantized}
    core = core_of(source, recipe, input_scales=scales)
    exported = export(core, CompressedTensorsWriter(), tmp_path / "served")
    stored = load_file(next(exported.folder.glob("*.safetensors")))
    assert stored[f"{Q_PROJ}.input_global_scale"].equal(1 / torch.tensor([0.003]))


def test_nvfp4_activations_without_calibration_are_refused(tmp_path: Path) -> None:
    recipe = Recipe(weight_profile="nvfp4", activation_profile="nvfp4")
    with pytest.raises(ValueError, match="q_proj: NVFP4 activations need a calibrated scale"):
        export_tiny(tmp_path, "compressed-tensors", recipe)


def test_a_divisor_read_back_is_the_same_divisor() -> None:
    """1/(1/(1/x)) == 1/x for every fp32 mantissa, so that fingerprints survive the file."""
    bits = torch.arange(1 << 23, dtype=torch.int32) + (127 << 23)
    once = bits.view(torch.float32).reciprocal()
    assert torch.equal(once.reciprocal().reciprocal(), once)
    assert divisor(torch.tensor(0.25)).equal(torch.tensor([4.0]))


# --- both -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WRITERS)
def test_files_are_sharded_with_an_index_and_mean_the_same(tmp_path: Path, format: str) -> None:
    source = save(tmp_path / "source")
    whole = export(core_of(source), WRITERS[format](), tmp_path / "whole")
    parts = export(core_of(source), WRITERS[format](), tmp_path / "parts", shard_bytes=20_000)
    files = sorted(parts.folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name.endswith(f"-00001-of-{len(files):05d}.safetensors")
    (index,) = parts.folder.glob("*.index.json")
    found = {n: file.name for file in files for n in load_file(file)}
    content = read_json(index)
    assert content["weight_map"] == found
    tensors = [t for file in files for t in load_file(file).values()]
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    assert parts.fingerprint == whole.fingerprint


def test_a_sharded_source_gives_the_same_base(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole")
    parts = save(tmp_path / "parts", shard="40KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    prints = [
        export(core_of(source), AscendWriter(), tmp_path / f"served-{source.name}").fingerprint
        for source in (whole, parts)
    ]
    assert prints[0] == prints[1]


def test_the_fingerprint_tells_bases_apart(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    recipes = [
        Recipe(),
        Recipe(weight_profile="ascend950-mse"),
        Recipe(exclude=("lm_head", "layers.1")),
    ]
    prints = {
        export(core_of(source, r), AscendWriter(), tmp_path / str(i)).fingerprint
        for i, r in enumerate(recipes)
    }
    assert len(prints) == 3


def test_tokenizer_and_settings_come_along_and_the_dtype_is_the_exported_one(
    tmp_path: Path,
) -> None:
    source = save(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (source / name).write_text("{}")
    (source / "training_args.bin").write_text("not for serving")
    exported = export(core_of(source, dtype="fp16"), AscendWriter(), tmp_path / "served")
    names = {path.name for path in exported.folder.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"} <= names
    assert "training_args.bin" not in names
    assert read_json(exported.folder / "config.json")["dtype"] == "float16"


def test_checksums_are_what_sha256sum_checks(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path)
    command = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=exported.folder).returncode == 0
    listed = (exported.folder / "SHA256SUMS").read_text().splitlines()
    assert len(listed) == len(list(exported.folder.iterdir())) - 1


# --- all or nothing ---------------------------------------------------------------------------


def test_an_export_that_fails_its_own_check_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Finding("x.weight", "wrong", "right it")]
    module = sys.modules["npu_qat.deploy.export"]
    monkeypatch.setattr(module, "validate", lambda *a, **k: found)
    with pytest.raises(ValueError, match=r"did not pass its own check .*x.weight: wrong"):
        export_tiny(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def stop(name: str) -> None:
        if "layers.1" in name:
            raise KeyboardInterrupt

    source = save(tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        export(core_of(source), AscendWriter(), tmp_path / "served", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    export_tiny(tmp_path)
    with pytest.raises(ValueError, match="served is not empty"):
        export_tiny(tmp_path, source=tmp_path / "source")


def test_the_rest_of_a_killed_export_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "served.partial").mkdir()
    with pytest.raises(ValueError, match="left over from an export that was killed"):
        export_tiny(tmp_path)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"injection_point": "none"}, "leaves the weights in 16 bits"),
        ({"injection_point": "input"}, "leaves the weights in 16 bits"),
        ({"block_axis": "column"}, "block_axis: column cannot be deployed"),
        ({"rotation": "hadamard32"}, "does not rotate the inputs of a linear"),
        ({"weight_profile": "ascend950-dual"}, "scales that no checkpoint format holds"),
        ({"weight_profile": "fork-nvfp4-row"}, "scales that no checkpoint format holds"),
        ({"weight_profile": "nvfp4-one-level"}, "is not MXFP4"),
        ({"exclude": ("lm_head", "q_proj")}, "q_proj in 16 bits and the rest of"),
        ({"activation_profile": "ocp"}, "training used 'ocp'"),
        ({"injection_point": "weight"}, "training used '16 bits'"),
        ({"injection_point": "weight_output"}, "training used 'ascend950 on outputs'"),
    ],
)
def test_recipes_that_ascend_cannot_serve_are_refused(
    tmp_path: Path, recipe: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_tiny(tmp_path, recipe=Recipe(**recipe))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_other_activations_are_exported_when_asked_for_and_recorded(tmp_path: Path) -> None:
    core = core_of(save(tmp_path / "source"), Recipe(activation_profile="ocp"))
    exported = export(core, AscendWriter(), tmp_path / "served", any_activations=True)
    assert exported.record["activations"] == {
        "trained": "ocp",
        "served": "ascend950",
        "same": False,
    }


@pytest.mark.parametrize(
    ("format", "changes", "parallel", "message"),
    [
        ("ascend", {"intermediate_size": 96}, 1, "down_proj has 96 inputs: 96 are no multiple"),
        ("ascend", {}, 2, "o_proj has 64 inputs cut in 2: 32 are no multiple of 64"),
        ("compressed-tensors", {"intermediate_size": 80}, 1, "a multiple of the block of 32"),
        ("compressed-tensors", {}, 4, "o_proj has 64 inputs cut in 4: 16 are no multiple of 32"),
    ],
)
def test_lengths_that_the_readers_cannot_cut_are_refused(
    tmp_path: Path, format: str, changes: dict[str, int], parallel: int, message: str
) -> None:
    source = save(tmp_path / "source", **changes)
    with pytest.raises(ValueError, match=message):
        writer = WRITERS[format](tensor_parallel=parallel)
        export(core_of(source), writer, tmp_path / "served")


def test_an_untied_lm_head_in_4_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm_head is quantised, but serving engines keep"):
        export_tiny(tmp_path, recipe=Recipe(exclude=()), tie_word_embeddings=False)


@pytest.mark.parametrize("format", WRITERS)
def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path, format: str) -> None:
    exported = export_tiny(tmp_path, format)
    with pytest.raises(ValueError, match="is quantised already"):
        core_of(exported.folder)


def test_a_checkpoint_that_is_not_its_architectures_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    config = read_json(source / "config.json")
    for change, message in [
        ({"num_hidden_layers": 3, "layer_types": None}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1, "layer_types": None}, "has model.layers.1"),
        ({"vocab_size": 97}, "has another shape of model.embed_tokens.weight"),
    ]:
        (source / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            core_of(source)


def test_a_checkpoint_with_nan_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = save(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight .* holds NaN or Inf"):
        export(core_of(source), AscendWriter(), tmp_path / "served")


def test_another_model_than_the_run_trained_is_refused(tmp_path: Path) -> None:
    from npu_qat.layers import prepare_model
    from tests.deploy.models import tiny

    report = prepare_model(tiny(), Recipe()).audit.report(None)
    errors = {m["name"]: m["weight_rel_error"] for m in report["modules"] if m["quantized"]}
    same = core_of(save(tmp_path / "same"), trained_errors=errors)
    export(same, AscendWriter(), tmp_path / "served")
    other = core_of(save(tmp_path / "other", seed=1), trained_errors=errors)
    with pytest.raises(ValueError, match="is not the model that was trained"):
        export(other, AscendWriter(), tmp_path / "served-other")
