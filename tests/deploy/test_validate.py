"""Every damage that a loader would take is found, named, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from npu_qat.config import Recipe
from npu_qat.deploy import AscendWriter, CompressedTensorsWriter
from npu_qat.deploy.adapter import BINDING, bind_adapter, read_adapter
from npu_qat.deploy.checksums import write_checksums
from npu_qat.deploy.export import export
from npu_qat.deploy.validate import Finding, validate
from tests.deploy.models import NVFP4, core_of, damage, damage_json, export_tiny, save, save_adapter

Tensors = dict[str, torch.Tensor]
O_PROJ = "model.layers.0.self_attn.o_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj"
K_PROJ = "model.layers.0.self_attn.k_proj"
NORM = "model.layers.1.input_layernorm.weight"
DESCRIPTION = "quant_model_description.json"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good export of each format, not to be changed."""
    folder = tmp_path_factory.mktemp("good")
    source = save(folder / "source")
    jobs: dict[str, tuple[Any, Recipe]] = {
        "ascend": (AscendWriter(), Recipe()),
        "mxfp4": (CompressedTensorsWriter(), Recipe()),
        "nvfp4": (CompressedTensorsWriter(), NVFP4),
    }
    for name, (writer, recipe) in jobs.items():
        export(core_of(source, recipe), writer, folder / name)
    return {name: folder / name for name in jobs}


@pytest.fixture
def good(exports: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a good export, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(exports[name], tmp_path / name))

    return copy


def only(folder: Path, **options: Any) -> Finding:
    """The one finding about ``folder``."""
    found = validate(folder, **options)
    assert len(found) == 1, [str(f) for f in found]
    return found[0]


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    """An edit that replaces tensor ``name``."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return edit


def with_value(value: float, *where: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[where] = value
        return tensor

    return change


@pytest.mark.parametrize("name", ["ascend", "mxfp4", "nvfp4"])
def test_a_good_export_has_no_findings(exports: dict[str, Path], name: str) -> None:
    assert validate(exports[name]) == []


@pytest.mark.parametrize("name", ["ascend", "mxfp4"])
def test_a_checkpoint_of_another_tool_needs_no_record(
    good: Callable[[str], Path], name: str
) -> None:
    folder = good(name)
    for file in ("SHA256SUMS", "npu_qat_export.json"):
        (folder / file).unlink()
    assert validate(folder) == []


# --- tensors ----------------------------------------------------------------------------------


def numbers(scale: torch.Tensor) -> torch.Tensor:
    return torch.exp2(scale.float() - 127)


TENSOR_DAMAGE: list[tuple[str, str, Callable[[Tensors], object], str, str]] = [
    (f"{O_PROJ}.weight_scale", "scale missing", lambda t: t.pop(f"{O_PROJ}.weight_scale"),
     "missing; the loader computes with whatever lies in memory", "export the model again"),
    (f"{O_PROJ}.weight", "weight missing", lambda t: t.pop(f"{O_PROJ}.weight"),
     "missing", "export the model again"),
    (NORM, "norm missing", lambda t: t.pop(NORM), "missing", "export the model again"),
    (f"{O_PROJ}.weight_offset", "extra tensor",
     lambda t: t.update({f"{O_PROJ}.weight_offset": torch.zeros(64)}), "extra", "remove it from"),
    (f"{O_PROJ}.weight_scale", "float8 scale",
     put(f"{O_PROJ}.weight_scale", lambda s: s.view(torch.float8_e8m0fnu)),
     "stored as F8_E8M0, not U8: the loader converts the numbers", "view(torch.uint8)"),
    (f"{O_PROJ}.weight_scale", "fp32 scale", put(f"{O_PROJ}.weight_scale", numbers),
     "stored as F32, not U8: numbers instead of exponents", "log2(scale) + 127"),
    (f"{O_PROJ}.weight_scale", "int8 exponents",
     put(f"{O_PROJ}.weight_scale", lambda s: (s.int() - 127).to(torch.int8)),
     "stored as I8, not U8: exponents without the bias", "add 127"),
    (f"{O_PROJ}.weight_scale", "uint8 exponents", put(f"{O_PROJ}.weight_scale", lambda s: s - 127),
     "exponents without the bias of 127", "add 127"),
    (f"{O_PROJ}.weight_scale", "transposed scale", put(f"{O_PROJ}.weight_scale", torch.t),
     r"shape [2, 64] is transposed already, instead of [64, 2]", "store [64, 2], row-major"),
    (f"{O_PROJ}.weight_scale", "scale in pairs",
     put(f"{O_PROJ}.weight_scale", lambda s: s.reshape(64, 1, 2)),
     "shape [64, 1, 2] is arranged in pairs already", "store [64, 2], row-major"),
    (f"{O_PROJ}.weight", "transposed weight", put(f"{O_PROJ}.weight", torch.t),
     "shape [32, 64] is transposed already", "store [64, 32], row-major"),
    (f"{O_PROJ}.weight", "int8 weight", put(f"{O_PROJ}.weight", lambda w: w.view(torch.int8)),
     "stored as I8, not U8", "view(torch.uint8)"),
    (f"{O_PROJ}.weight_scale", "NaN scale", put(f"{O_PROJ}.weight_scale", with_value(255, 3, 1)),
     "1 scales are 0xFF (NaN), the first at row 3, block 1", "export the model again"),
    (NORM, "NaN in a norm", put(NORM, with_value(float("nan"), 5)), "holds NaN or Inf", "find"),
    ("model.embed_tokens.weight", "Inf in the embeddings",
     put("model.embed_tokens.weight", with_value(float("inf"), 5, 5)), "holds NaN or Inf", "find"),
    (f"{Q_PROJ}.bias", "bias in 16 bits", put(f"{Q_PROJ}.bias", lambda b: b.bfloat16()),
     "stored as BF16, not F32", "export the model again"),
    (NORM, "norm in float8", put(NORM, lambda w: w.to(torch.float8_e4m3fn)),
     "stored as F8_E4M3, not BF16 or F16 or F32", "export the model again"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tensor", "edit", "problem", "fix"),
    [pytest.param(n, e, p, f, id=name.replace(" ", "-")) for n, name, e, p, f in TENSOR_DAMAGE],
)
def test_damaged_tensors_are_found(
    good: Callable[[str], Path],
    tensor: str,
    edit: Callable[[Tensors], object],
    problem: str,
    fix: str,
) -> None:
    folder = good("ascend")
    damage(folder, edit)
    finding = only(folder)
    assert finding.tensor == tensor
    assert problem in finding.problem and fix in finding.fix


COMPRESSED_DAMAGE: list[tuple[str, str, str, Callable[[Tensors], object], str]] = [
    ("mxfp4", f"{O_PROJ}.weight_packed", "packed missing",
     lambda t: t.pop(f"{O_PROJ}.weight_packed"), "missing"),
    ("mxfp4", f"{O_PROJ}.weight_scale", "scale missing",
     lambda t: t.pop(f"{O_PROJ}.weight_scale"), "missing"),
    ("mxfp4", f"{O_PROJ}.weight_scale", "scale as float8",
     put(f"{O_PROJ}.weight_scale", lambda s: s.view(torch.float8_e8m0fnu)), "stored as F8_E8M0"),
    ("mxfp4", f"{O_PROJ}.weight", "weight in 16 bits",
     lambda t: (t.pop(f"{O_PROJ}.weight_packed"), t.pop(f"{O_PROJ}.weight_scale"),
                t.update({f"{O_PROJ}.weight": torch.zeros(64, 64, dtype=torch.bfloat16)})),
     "in 16 bits, but config.json says that it is quantised"),
    ("nvfp4", f"{O_PROJ}.weight_global_scale", "global scale missing",
     lambda t: t.pop(f"{O_PROJ}.weight_global_scale"), "missing"),
    ("nvfp4", f"{K_PROJ}.weight_global_scale", "global scales differ",
     put(f"{K_PROJ}.weight_global_scale", lambda s: s * 2), f"differs from {Q_PROJ}"),
    ("nvfp4", f"{O_PROJ}.weight_global_scale", "global scale zero",
     put(f"{O_PROJ}.weight_global_scale", lambda s: s * 0), "not positive"),
    ("nvfp4", f"{O_PROJ}.weight_scale", "scale as bytes",
     put(f"{O_PROJ}.weight_scale", lambda s: s.view(torch.uint8)), "stored as U8, not F8_E4M3"),
    ("nvfp4", f"{O_PROJ}.weight_scale", "NaN scale",
     put(f"{O_PROJ}.weight_scale",
         lambda s: with_value(0x7F, 2, 1)(s.view(torch.uint8)).view(torch.float8_e4m3fn)),
     "1 scales are NaN or negative, the first at row 2, block 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tensor", "edit", "problem"),
    [pytest.param(n, t, e, p, id=f"{n}-{i}") for n, t, i, e, p in COMPRESSED_DAMAGE],
)
def test_damaged_compressed_tensors_are_found(
    good: Callable[[str], Path],
    name: str,
    tensor: str,
    edit: Callable[[Tensors], object],
    problem: str,
) -> None:
    folder = good(name)
    damage(folder, edit)
    finding = only(folder)
    assert finding.tensor == tensor and problem in finding.problem and finding.fix


def test_zero_weights_may_have_any_scale(good: Callable[[str], Path]) -> None:
    folder = good("ascend")

    def edit(tensors: Tensors) -> None:
        tensors[f"{O_PROJ}.weight"].fill_(0x80)  # -0 and 0
        tensors[f"{O_PROJ}.weight_scale"].zero_()

    damage(folder, edit)
    (folder / "npu_qat_export.json").unlink()
    write_checksums(folder)
    assert validate(folder) == []


# --- description and tensors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "tensor", "problem"),
    [
        (lambda d: d.pop(f"{O_PROJ}.weight"), f"{O_PROJ}.weight", f"not in {DESCRIPTION}"),
        (
            lambda d: d.pop(f"{O_PROJ}.weight_scale"),
            f"{O_PROJ}.weight_scale",
            f"not in {DESCRIPTION}",
        ),
        (lambda d: d.pop("lm_head.weight"), "lm_head.weight", f"not in {DESCRIPTION}"),
        (
            lambda d: d.update({"model.layers.7.mlp.up_proj.weight": "FLOAT"}),
            "model.layers.7.mlp.up_proj.weight",
            "in the description, but not in the model",
        ),
        (
            lambda d: d.update({f"{O_PROJ}.weight": "FLOAT"}),
            f"{O_PROJ}.weight",
            "FLOAT in the description, but stored as packed codes",
        ),
        (
            lambda d: d.update({f"{O_PROJ}.weight_scale": "W4A8_MXFP"}),
            f"{O_PROJ}.weight_scale",
            "W4A8_MXFP in the description, but its weight is W4A4_MXFP4",
        ),
        (lambda d: d.update({f"{O_PROJ}.weight": "W4A4"}), f"{O_PROJ}.weight", "unknown type"),
        (lambda d: d.update(group_size=0), DESCRIPTION, "group_size is 0, not 32"),
        (lambda d: d.pop("group_size"), DESCRIPTION, "group_size is None, not 32"),
        (
            lambda d: d.update(
                {f"{Q_PROJ}.weight": "W4A8_MXFP", f"{Q_PROJ}.weight_scale": "W4A8_MXFP"}
            ),
            f"{Q_PROJ}.weight",
            "mixed types in linears that the engine fuses: q_proj W4A8_MXFP, k_proj W4A4_MXFP4",
        ),
    ],
)
def test_a_description_that_disagrees_is_found(
    good: Callable[[str], Path],
    edit: Callable[[dict[str, Any]], object],
    tensor: str,
    problem: str,
) -> None:
    folder = good("ascend")
    damage_json(folder, DESCRIPTION, edit)
    finding = only(folder)
    assert finding.tensor == tensor and problem in finding.problem and finding.fix


def test_16_bit_weights_under_a_4_bit_type_are_found(good: Callable[[str], Path]) -> None:
    folder = good("ascend")

    def edit(tensors: Tensors) -> None:
        del tensors[f"{O_PROJ}.weight_scale"]
        tensors[f"{O_PROJ}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)

    damage(folder, edit)
    finding = only(folder)
    assert finding.tensor == f"{O_PROJ}.weight"
    assert "W4A4_MXFP4 in the description, but stored in 16 bits (BF16)" in finding.problem


def test_one_fused_linear_in_16_bits_is_found(good: Callable[[str], Path]) -> None:
    folder = good("ascend")

    def edit(tensors: Tensors) -> None:
        del tensors[f"{Q_PROJ}.weight_scale"]
        tensors[f"{Q_PROJ}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)

    def describe(description: dict[str, Any]) -> None:
        del description[f"{Q_PROJ}.weight_scale"]
        description[f"{Q_PROJ}.weight"] = "FLOAT"

    damage(folder, edit)
    damage_json(folder, DESCRIPTION, describe)
    finding = only(folder)
    assert finding.tensor == f"{Q_PROJ}.weight"
    assert "mixed types in linears that the engine fuses: q_proj FLOAT" in finding.problem


def test_an_ignored_linear_that_is_packed_is_found(good: Callable[[str], Path]) -> None:
    folder = good("mxfp4")
    damage_json(folder, "config.json", lambda c: c["quantization_config"]["ignore"].append(O_PROJ))
    finding = only(folder)
    assert finding.tensor == f"{O_PROJ}.weight_packed"
    assert "lists the linear under 'ignore'" in finding.problem


@pytest.mark.parametrize(
    ("key", "value"), [("group_size", 64), ("num_bits", 8), ("strategy", "channel")]
)
def test_quantisation_arguments_that_do_not_fit_the_format_are_found(
    good: Callable[[str], Path], key: str, value: object
) -> None:
    folder = good("mxfp4")

    def edit(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value

    damage_json(folder, "config.json", edit)
    finding = only(folder)
    assert finding.tensor == "config.json" and f"weights.{key} is {value!r}" in finding.problem


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("quant_method", "gptq", "quant_method is 'gptq'"),
        ("config_groups", {}, "has 0 config_groups"),
    ],
)
def test_a_configuration_that_another_reader_would_take_is_found(
    good: Callable[[str], Path], key: str, value: object, problem: str
) -> None:
    folder = good("mxfp4")
    damage_json(folder, "config.json", lambda c: c["quantization_config"].update({key: value}))
    assert any(f.tensor == "config.json" and problem in f.problem for f in validate(folder))


def test_a_group_of_another_format_is_found(good: Callable[[str], Path]) -> None:
    folder = good("mxfp4")

    def edit(config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["format"] = "nvfp4-pack-quantized"

    damage_json(folder, "config.json", edit)
    finding = only(folder)
    assert finding.tensor == "config.json" and "the group's format is" in finding.problem


@pytest.mark.parametrize(
    ("key", "value"), [("ignore", ["lm_head", "re:.*o_proj"]), ("targets", ["re:.*mlp", "Conv1d"])]
)
def test_lists_that_leave_out_a_packed_linear_are_found(
    good: Callable[[str], Path], key: str, value: list[str]
) -> None:
    folder = good("mxfp4")

    def edit(config: dict[str, Any]) -> None:
        settings = config["quantization_config"]
        (settings if key == "ignore" else settings["config_groups"]["group_0"])[key] = value

    damage_json(folder, "config.json", edit)
    found = [f.tensor for f in validate(folder)]
    assert f"{O_PROJ}.weight_packed" in found


def test_a_regular_expression_may_name_what_is_in_16_bits(good: Callable[[str], Path]) -> None:
    """As llm-compressor writes it."""
    folder = good("mxfp4")

    def edit(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"] = ["re:.*lm_head"]
        config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:model.layers"]

    damage_json(folder, "config.json", edit)
    assert validate(folder) == []


def test_an_unknown_compression_format_is_found(good: Callable[[str], Path]) -> None:
    folder = good("mxfp4")
    damage_json(
        folder, "config.json", lambda c: c["quantization_config"].update(format="float-quantized")
    )
    assert any("has format 'float-quantized'" in f.problem for f in validate(folder))


# --- shapes -----------------------------------------------------------------------------------


def test_a_length_that_vllm_ascend_cannot_cut_is_found(tmp_path: Path) -> None:
    """A checkpoint with K = 96, whose scales are 3 a row."""
    recipe = Recipe(exclude=("lm_head", "down_proj"))
    exported = export_tiny(tmp_path, recipe=recipe, intermediate_size=96)
    down = "model.layers.0.mlp.down_proj"

    def edit(tensors: Tensors) -> None:
        tensors[f"{down}.weight"] = torch.full((64, 48), 0x21, dtype=torch.uint8)
        tensors[f"{down}.weight_scale"] = torch.full((64, 3), 120, dtype=torch.uint8)

    types = dict.fromkeys([f"{down}.weight", f"{down}.weight_scale"], "W4A4_MXFP4")
    damage(exported.folder, edit)
    damage_json(exported.folder, DESCRIPTION, lambda d: d.update(types))
    finding = only(exported.folder)
    assert finding.tensor == f"{down}.weight"
    assert "K is 96, no multiple of 64" in finding.problem


def test_a_length_a_device_is_looked_at(exports: dict[str, Path]) -> None:
    found = validate(exports["ascend"], tensor_parallel=2)
    assert {f.tensor.split(".")[-2] for f in found} == {"o_proj", "down_proj"}
    assert "K is 32 on each of 2 devices, no multiple of 64" in found[0].problem
    assert "serve on fewer devices" in found[0].fix


# --- files ------------------------------------------------------------------------------------


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def test_a_truncated_file_is_found(good: Callable[[str], Path]) -> None:
    folder = good("ascend")
    file = weights_of(folder)
    file.write_bytes(file.read_bytes()[:-100])
    finding = only(folder)
    assert finding.tensor == file.name and "truncated or altered" in finding.problem


def test_a_truncated_file_is_found_without_checksums(good: Callable[[str], Path]) -> None:
    folder = good("ascend")
    for name in ("SHA256SUMS", "npu_qat_export.json"):
        (folder / name).unlink()
    file = weights_of(folder)
    file.write_bytes(file.read_bytes()[:-100])
    finding = only(folder)
    assert finding.tensor == file.name and "cannot be read" in finding.problem


def test_one_altered_byte_is_found(good: Callable[[str], Path]) -> None:
    folder = good("ascend")
    file = weights_of(folder)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    finding = only(folder)
    assert finding.tensor == file.name and "truncated or altered" in finding.problem


def test_altered_codes_are_found_even_under_new_checksums(good: Callable[[str], Path]) -> None:
    folder = good("ascend")
    damage(folder, put(f"{O_PROJ}.weight", lambda w: w ^ 1))
    finding = only(folder)
    assert finding.tensor == "npu_qat_export.json"
    assert "describes another base" in finding.problem


@pytest.mark.parametrize("file", ["tokenizer.json", "weights"])
def test_a_missing_file_is_found_once(tmp_path: Path, file: str) -> None:
    source = save(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    folder = tmp_path / "served"
    export(core_of(source), AscendWriter(), folder, shard_bytes=20_000)
    gone = sorted(folder.glob("*.safetensors"))[1] if file == "weights" else folder / file
    gone.unlink()
    finding = only(folder)
    assert finding.tensor == gone.name and finding.problem == "the file is missing"


def test_a_shard_that_the_index_names_is_missed_without_checksums(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    export(core_of(save(tmp_path / "source")), AscendWriter(), folder, shard_bytes=20_000)
    for name in ("SHA256SUMS", "npu_qat_export.json"):
        (folder / name).unlink()
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    assert only(folder) == Finding(gone.name, "the file is missing", "copy the folder again")


def test_a_second_copy_of_a_tensor_is_found(good: Callable[[str], Path]) -> None:
    """Engines load every safetensors file of a folder, in whatever order."""
    folder = good("ascend")
    tensor = load_file(weights_of(folder))[NORM]
    save_file({NORM: tensor * 2}, folder / "aa.safetensors")
    found = validate(folder)
    assert [f.tensor for f in found] == ["aa.safetensors", NORM]
    assert "added after the export" in found[0].problem and "in two files" in found[1].problem


def test_an_index_that_points_elsewhere_is_found(good: Callable[[str], Path]) -> None:
    folder = good("ascend")
    (index,) = folder.glob("*.index.json")
    damage_json(folder, index.name, lambda i: i["weight_map"].update({NORM: "gone.safetensors"}))
    found = validate(folder)
    assert {f.tensor for f in found} == {NORM, "gone.safetensors"}


def test_checksums_that_were_removed_are_missed(good: Callable[[str], Path]) -> None:
    folder = good("ascend")
    (folder / "SHA256SUMS").unlink()
    assert only(folder).tensor == "SHA256SUMS"


@pytest.mark.parametrize("name", ["ascend", "mxfp4"])
def test_two_signatures_are_found(
    good: Callable[[str], Path], exports: dict[str, Path], name: str
) -> None:
    folder = good(name)
    if name == "ascend":
        config = json.loads((exports["mxfp4"] / "config.json").read_text())
        settings = config["quantization_config"]
        damage_json(folder, "config.json", lambda c: c.update(quantization_config=settings))
    else:
        shutil.copyfile(exports["ascend"] / DESCRIPTION, folder / DESCRIPTION)
        write_checksums(folder)
    finding = only(folder)
    assert finding.tensor == "config.json" and "two signatures" in finding.problem


def test_a_lost_signature_is_found(good: Callable[[str], Path]) -> None:
    folder = good("ascend")
    (folder / DESCRIPTION).unlink()
    write_checksums(folder)
    finding = only(folder)
    assert finding.tensor == DESCRIPTION and "take this for a 16-bit model" in finding.problem


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "unheard-of"}'])
def test_an_unusable_configuration_is_found(good: Callable[[str], Path], text: str) -> None:
    folder = good("ascend")
    (folder / "config.json").write_text(text)
    write_checksums(folder)
    assert only(folder).tensor == "config.json"


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_an_unusable_description_is_found(good: Callable[[str], Path], text: str) -> None:
    folder = good("ascend")
    (folder / DESCRIPTION).write_text(text)
    write_checksums(folder)
    finding = only(folder)
    assert finding.tensor == DESCRIPTION and "cannot be read" in finding.problem


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        validate(tmp_path / "nothing")


# --- adapter ----------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_found(good: Callable[[str], Path], tmp_path: Path) -> None:
    folder = good("ascend")
    bind_adapter(read_adapter(save_adapter(tmp_path / "adapter")), folder, "0" * 64)
    write_checksums(folder)
    finding = only(folder)
    assert finding.tensor == "adapter" and "was trained on another base" in finding.problem


def test_an_adapter_that_names_no_base_is_found(
    good: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = good("ascend")
    bind_adapter(read_adapter(save_adapter(tmp_path / "adapter")), folder, "0" * 64)
    (folder / "adapter" / BINDING).unlink()
    write_checksums(folder)
    finding = only(folder)
    assert finding.tensor == "adapter" and "does not say which base" in finding.problem


@pytest.mark.parametrize(
    ("name", "told"),
    [(BINDING, "does not say which base"), ("adapter_config.json", "holds no readable adapter")],
)
def test_files_of_an_adapter_that_are_no_text_are_findings(
    adapted: Path, tmp_path: Path, name: str, told: str
) -> None:
    folder = copy_of(adapted, tmp_path)
    (folder / "adapter" / name).write_bytes(b"\xff\xfe{}")
    write_checksums(folder)
    finding = only(folder)
    assert finding.tensor == "adapter" and told in finding.problem


def test_an_adapter_of_another_shape_is_found(good: Callable[[str], Path], tmp_path: Path) -> None:
    folder = good("ascend")
    adapter = read_adapter(save_adapter(tmp_path / "adapter", intermediate_size=128))
    bind_adapter(adapter, folder, "0" * 64)
    write_checksums(folder)
    finding = only(folder)
    assert finding.tensor == "adapter" and "do not fit its weight" in finding.problem


# Changes of adapter_config.json by which an engine would apply another adapter, and what is said.
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"lora_alpha": 16}, "lora_alpha is 16, not 8"),
    ({"use_rslora": True}, "use_rslora is True, not False"),
    ({"r": 8}, "says r 8 and lora_alpha 8"),
    ({"r": 8, "lora_alpha": 16}, "says r 8 and lora_alpha 16"),
    ({"target_modules": ["q_proj"]}, "target_modules is ['q_proj'], not ['"),
    ({"exclude_modules": ["q_proj"]}, "exclude_modules is ['q_proj'], not None"),
    ({"layers_to_transform": [0]}, "layers_to_transform is [0], not None"),
]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good export with an adapter beside it, not to be changed."""
    folder = tmp_path_factory.mktemp("adapted")
    adapter = read_adapter(save_adapter(folder / "lora"))
    export(core_of(save(folder / "source")), AscendWriter(), folder / "served", adapter=adapter)
    return folder / "served"


@pytest.mark.parametrize("place", ["npu_qat_export.json", f"adapter/{BINDING}"])
@pytest.mark.parametrize(("change", "told"), SETTINGS, ids=[str(list(c)) for c, _ in SETTINGS])
def test_another_setting_of_the_adapter_is_found_even_under_new_checksums(
    adapted: Path, tmp_path: Path, change: dict[str, Any], told: str, place: str
) -> None:
    """``place`` alone still knows what was exported; the other says nothing, as it did once."""
    folder = copy_of(adapted, tmp_path)
    forget(folder, {"npu_qat_export.json", f"adapter/{BINDING}"} - {place})
    damage_json(folder / "adapter", "adapter_config.json", lambda c: c.update(change))
    write_checksums(folder)
    finding = only(folder)
    assert finding.tensor == "adapter" and told in finding.problem
    assert "r" in change or f"not the adapter that {place} describes" in finding.problem


def test_other_matrices_of_the_adapter_are_found_even_under_new_checksums(
    adapted: Path, tmp_path: Path
) -> None:
    folder = copy_of(adapted, tmp_path)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "lora_B" in n)
    save_file({**tensors, name: tensors[name] * 2}, file)
    write_checksums(folder)
    assert "describes: its matrices are others" in only(folder).problem


@pytest.mark.parametrize("earlier", [False, True])
def test_an_adapter_that_is_gone_is_missed_even_under_new_checksums(
    adapted: Path, tmp_path: Path, earlier: bool
) -> None:
    folder = copy_of(adapted, tmp_path)
    forget(folder, {"npu_qat_export.json"} if earlier else set())
    shutil.rmtree(folder / "adapter")
    write_checksums(folder)
    finding = only(folder)
    assert finding.tensor == "adapter" and "missing, but npu_qat_export.json" in finding.problem


@pytest.mark.parametrize("damaged", [{}, {"config": 5, "fingerprint": ""}, [1]])
def test_a_damaged_description_of_the_adapter_is_found(
    adapted: Path, tmp_path: Path, damaged: Any
) -> None:
    folder = copy_of(adapted, tmp_path)
    damage_json(folder, "npu_qat_export.json", lambda r: r.update(adapter_content=damaged))
    assert "describes: the description is damaged" in only(folder).problem


def test_an_export_of_an_earlier_version_has_no_findings(adapted: Path, tmp_path: Path) -> None:
    folder = copy_of(adapted, tmp_path)
    forget(folder, {"npu_qat_export.json", f"adapter/{BINDING}"})
    assert validate(folder) == []


def test_what_is_rewritten_everywhere_is_not_found(adapted: Path, tmp_path: Path) -> None:
    """The limit that docs/deploy.md states: all that is compared lies in the folder."""
    folder = copy_of(adapted, tmp_path)
    damage_json(folder / "adapter", "adapter_config.json", lambda c: c.update(lora_alpha=16))
    content = read_adapter(folder / "adapter").content()
    damage_json(folder, "npu_qat_export.json", lambda r: r.update(adapter_content=content))
    damage_json(folder / "adapter", BINDING, lambda b: b.update(content=content))
    write_checksums(folder)
    assert validate(folder) == []


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "served"))


def forget(folder: Path, places: set[str]) -> None:
    """Take away what ``places`` hold of the adapter, as versions before this one wrote them."""

    def edit(content: dict[str, Any]) -> None:
        for key in ("content", "adapter_content"):
            content.pop(key, None)

    for place in places:
        damage_json(folder, place, edit)
