"""An adapter stays with its base, or is merged with a report that means what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from npu_qat.config import Recipe
from npu_qat.deploy import (
    AdapterMismatch,
    AscendWriter,
    CompressedTensorsWriter,
    check_adapter,
    open_export,
    read_adapter,
)
from npu_qat.deploy.adapter import BINDING, read_binding, write_binding
from npu_qat.deploy.export import export
from npu_qat.numerics import fake_quant
from tests.deploy.models import core_of, damage_json, save, save_adapter, tiny

UP = "model.layers.0.mlp.up_proj"


def test_an_adapter_travels_with_its_base_and_is_taken_by_it(tmp_path: Path) -> None:
    source, adapter = save(tmp_path / "source"), save_adapter(tmp_path / "adapter")
    exported = export(
        core_of(source), AscendWriter(), tmp_path / "served", adapter=read_adapter(adapter)
    )
    beside = exported.folder / "adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (beside / name).read_bytes() == (adapter / name).read_bytes()
    content = read_adapter(adapter).content()
    assert json.loads((beside / BINDING).read_text()) == {
        "base_fingerprint": exported.fingerprint,
        "content": content,
    }
    assert exported.record["adapter"] == "beside"
    assert exported.record["adapter_content"] == content
    assert (content["config"]["r"], content["config"]["lora_alpha"]) == (4, 8)
    check_adapter(exported.folder, beside)
    # The twin is the same base in another format.
    twin = export(core_of(source), CompressedTensorsWriter(), tmp_path / "twin")
    check_adapter(twin.folder, beside)


@pytest.mark.parametrize(
    ("recipe", "seed"), [(Recipe(weight_profile="ascend950-mse"), 0), (Recipe(), 1)]
)
def test_an_adapter_is_refused_on_another_base(tmp_path: Path, recipe: Recipe, seed: int) -> None:
    adapter = read_adapter(save_adapter(tmp_path / "adapter"))
    one = export(
        core_of(save(tmp_path / "one")), AscendWriter(), tmp_path / "served", adapter=adapter
    )
    other = core_of(save(tmp_path / "two", seed=seed), recipe)
    export(other, AscendWriter(), tmp_path / "other")
    with pytest.raises(AdapterMismatch, match="was trained on another base"):
        check_adapter(tmp_path / "other", one.folder / "adapter")


def test_an_adapter_that_names_its_base_is_exported_with_no_other(tmp_path: Path) -> None:
    source, adapter = save(tmp_path / "source"), save_adapter(tmp_path / "lora")
    right = export(core_of(source), AscendWriter(), tmp_path / "right").fingerprint
    write_binding(adapter, right)
    export(core_of(source), AscendWriter(), tmp_path / "bound", adapter=read_adapter(adapter))
    export(core_of(source, merge=read_adapter(adapter)), AscendWriter(), tmp_path / "merged")
    recipe = Recipe(weight_profile="ascend950-mse")
    with pytest.raises(AdapterMismatch, match="was trained on another base"):
        export(
            core_of(source, recipe),
            AscendWriter(),
            tmp_path / "other",
            adapter=read_adapter(adapter),
        )
    with pytest.raises(AdapterMismatch, match="was trained on another base"):
        merging = core_of(source, recipe, merge=read_adapter(adapter))
        export(merging, AscendWriter(), tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


def test_an_adapter_that_names_no_base_is_refused(tmp_path: Path) -> None:
    exported = export(core_of(save(tmp_path / "source")), AscendWriter(), tmp_path / "served")
    with pytest.raises(AdapterMismatch, match="does not say which base"):
        check_adapter(exported.folder, save_adapter(tmp_path / "adapter"))


@pytest.mark.parametrize("choice", ["keep", "merge"])
def test_an_adapter_that_was_changed_since_training_is_refused(tmp_path: Path, choice: str) -> None:
    source, folder = save(tmp_path / "source"), save_adapter(tmp_path / "lora")
    write_binding(folder, export(core_of(source), AscendWriter(), tmp_path / "base").fingerprint)
    check_adapter(tmp_path / "base", folder)
    damage_json(folder, "adapter_config.json", lambda config: config.update(lora_alpha=16))
    told = "was changed after .* lora_alpha is 16, not 8"
    adapter = read_adapter(folder)
    core = core_of(source, merge=adapter if choice == "merge" else None)
    with pytest.raises(AdapterMismatch, match=told):
        kept = adapter if choice == "keep" else None
        export(core, AscendWriter(), tmp_path / "served", adapter=kept)
    with pytest.raises(AdapterMismatch, match=told):
        check_adapter(tmp_path / "base", folder)
    assert not list(tmp_path.glob("served*"))


def test_what_an_earlier_version_wrote_beside_an_adapter_is_enough(tmp_path: Path) -> None:
    source, folder = save(tmp_path / "source"), save_adapter(tmp_path / "lora")
    right = export(core_of(source), AscendWriter(), tmp_path / "base").fingerprint
    (folder / BINDING).write_text(json.dumps({"base_fingerprint": right}))
    check_adapter(tmp_path / "base", folder)
    export(core_of(source), AscendWriter(), tmp_path / "served", adapter=read_adapter(folder))


def test_where_the_base_lay_who_wrote_it_and_in_which_order_is_no_part_of_an_adapter(
    tmp_path: Path,
) -> None:
    """As another version of PEFT writes it that loads the adapter and saves it again."""
    folder = save_adapter(tmp_path / "lora")
    excluded = {"exclude_modules": ["layers.0.k_proj", "layers.1.k_proj"]}
    damage_json(folder, "adapter_config.json", lambda config: config.update(excluded))
    before = read_adapter(folder).content()

    def edit(config: dict[str, Any]) -> None:
        config["base_model_name_or_path"] = "elsewhere"
        config["peft_version"] = "9.9"
        config["target_modules"].reverse()
        config["exclude_modules"].reverse()
        config |= {"use_what_comes": False, "what_comes_config": {}, "rank_pattern": None}

    damage_json(folder, "adapter_config.json", edit)
    assert read_adapter(folder).changes(before) == []
    assert str(tmp_path) not in json.dumps(before)
    before["config"]["peft_version"] = "0.1"
    assert read_adapter(folder).changes(before) == []
    damage_json(folder, "adapter_config.json", lambda config: config.update(use_what_comes=True))
    assert read_adapter(folder).changes(before) == ["use_what_comes is True, not None"]


def test_the_update_is_the_one_that_peft_merges(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter")
    adapter = read_adapter(folder)
    model = tiny().float()
    before = {n: m.weight.detach().clone() for n, m in model.named_modules() if n in adapter.a}
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    assert len(before) == 14
    for path, weight in before.items():
        delta = merged.get_submodule(path).weight.detach() - weight
        torch.testing.assert_close(adapter.delta(path), delta, atol=1e-6, rtol=1e-4)


def test_merging_quantises_the_sum_and_reports_what_survives(tmp_path: Path) -> None:
    source, folder = save(tmp_path / "source"), save_adapter(tmp_path / "adapter", size=0.05)
    adapter = read_adapter(folder)
    core = core_of(source, merge=adapter)
    exported = export(core, AscendWriter(), tmp_path / "served")
    weight = load_file(source / "model.safetensors")[f"{UP}.weight"]
    delta = adapter.delta(UP)
    before = fake_quant(weight, "ascend950").float()
    after = fake_quant((weight.float() + delta).to(weight.dtype), "ascend950").float()
    served: Any = open_export(exported.folder).read(f"{UP}.weight")
    from npu_qat.numerics import dequantize

    assert torch.equal(dequantize(served), after)
    effect = (after - before).double()
    kept = float((effect * delta).sum() / (delta.double() ** 2).sum())
    noise = float((effect - kept * delta.double()).norm() / delta.double().norm())
    found = exported.survival[UP]
    assert found.kept == pytest.approx(kept, rel=1e-6)
    assert found.noise == pytest.approx(noise, rel=1e-6)
    assert found.size == pytest.approx(float(delta.norm() / weight.float().norm()), rel=1e-4)
    assert 0.8 < found.kept < 1.2 and found.noise > 0.5
    report = exported.record["merged_adapter_survival"]
    assert set(report["linears"]) == set(adapter.a)
    assert exported.record["adapter_content"] == adapter.content()
    assert exported.record["adapter"] == "merged" and not (exported.folder / "adapter").exists()


def test_a_merged_base_is_another_base(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    adapter = read_adapter(save_adapter(tmp_path / "adapter"))
    kept = export(core_of(source), AscendWriter(), tmp_path / "kept", adapter=adapter)
    export(core_of(source, merge=adapter), AscendWriter(), tmp_path / "merged")
    with pytest.raises(AdapterMismatch):
        check_adapter(tmp_path / "merged", kept.folder / "adapter")


def test_an_adapter_that_saw_quantised_inputs_is_refused(tmp_path: Path) -> None:
    core = core_of(save(tmp_path / "source"), Recipe(lora_input="quantised"))
    adapter = read_adapter(save_adapter(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="fed the adapter 4-bit inputs in training"):
        export(core, AscendWriter(), tmp_path / "served", adapter=adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"use_dora": True}, "uses use_dora"),
        ({"bias": "all"}, "uses bias"),
        ({"rank_pattern": {"q_proj": 8}}, "uses rank_pattern, which serving engines do not apply"),
        ({"alpha_pattern": {"q_proj": 8}}, "uses alpha_pattern"),
        ({"alora_invocation_tokens": [3, 4]}, "uses alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses layer_replication"),
        ({"init_lora_weights": "pissa_niter_16"}, "began with init_lora_weights: pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "took out of the base what the adapter began with"),
        ({"r": 8}, "says r 8 and lora_alpha 8, by which engines scale, but the matrices of"),
        ({"lora_alpha": None}, "lora_alpha None, by which engines scale: that is no number"),
        ({"lora_alpha": [8]}, "that is no number"),
        ({"lora_alpha": "8"}, "that is no number"),
        ({"lora_alpha": float("nan")}, "that is no number"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = save_adapter(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def test_an_incomplete_or_damaged_adapter_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.{UP}.lora_B.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(ValueError, match=f"one matrix of the pair of {UP}"):
        read_adapter(folder)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        read_adapter(folder)
    with pytest.raises(ValueError, match="holds no readable adapter"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva"])
def test_starts_that_leave_the_base_alone_are_taken(tmp_path: Path, start: Any) -> None:
    folder = save_adapter(tmp_path / "adapter")
    damage_json(folder, "adapter_config.json", lambda c: c.update(init_lora_weights=start))
    assert read_adapter(folder).paths


@pytest.mark.parametrize("content", [b"[]", b'"x"', b"null", b"{", b"\xff\xfe{}"])
def test_settings_that_are_none_are_named(tmp_path: Path, content: bytes) -> None:
    folder = save_adapter(tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder}.*adapter_config.json"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[0],
        lambda a: a[0, 0],
        lambda a: a[None],
        lambda a: a[:0],
        lambda a: a.to(torch.float8_e4m3fn),
        lambda a: a.to(torch.complex64),
        lambda a: a.to(torch.int32),
    ],
)
def test_what_is_no_matrix_of_floats_is_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    folder = save_adapter(tmp_path / "adapter")
    file, name = folder / "adapter_model.safetensors", f"base_model.model.{UP}.lora_A.weight"
    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file)
    with pytest.raises(ValueError, match=f"{name} holds .*, no matrix of"):
        read_adapter(folder)


def test_a_second_matrix_under_another_name_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter")
    file, name = folder / "adapter_model.safetensors", f"base_model.model.{UP}.lora_A"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[f"{name}.weight"] * 3}, file)
    with pytest.raises(ValueError, match="is no LoRA matrix of a linear"):
        read_adapter(folder)


@pytest.mark.parametrize("content", [b"[]", b'"x"', b"", b"\xff\xfe{}"])
def test_a_damaged_binding_is_named(tmp_path: Path, content: bytes) -> None:
    folder = save_adapter(tmp_path / "adapter")
    (folder / BINDING).write_bytes(content)
    with pytest.raises(AdapterMismatch, match=f"{BINDING} is missing or damaged"):
        read_binding(folder)
