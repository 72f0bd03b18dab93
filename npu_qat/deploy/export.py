"""From a 16-bit checkpoint to a folder that a serving engine loads, complete or not at all.

The folder is written beside its place as ``NAME.partial``, with the SHA-256 of every file,
validated as a stranger's would be, and only then renamed. What is found in the place was therefore
finished, and passed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from npu_qat.__about__ import __version__
from npu_qat.config import Recipe
from npu_qat.deploy.adapter import (
    BINDING,
    Adapter,
    bind_adapter,
    refuse_changed,
    refuse_other_base,
)
from npu_qat.deploy.ascend import AscendWriter
from npu_qat.deploy.checksums import write_checksums
from npu_qat.deploy.core import (
    Fingerprint,
    PackedCore,
    Survival,
    fingerprint_of,
    refuse_plan,
    refuse_recipe,
)
from npu_qat.deploy.formats import RECORD, Writer
from npu_qat.deploy.shards import ShardedWriter
from npu_qat.deploy.validate import validate
from npu_qat.layers.plan import PlannedLinear
from npu_qat.numerics.profiles import get_profile

SHARD_BYTES = 4 * 2**30
# What serving needs beside the weights: tokenizer, chat template, generation settings, licence.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        folder: where it is.
        fingerprint: of the base.
        tensors, bytes: how much was stored.
        record: the content of ``npu_qat_export.json``.
        survival: what quantisation left of a merged adapter, by linear (empty without one).
    """

    folder: Path
    fingerprint: str
    tensors: int
    bytes: int
    record: dict[str, Any]
    survival: dict[str, Survival]


def export(
    core: PackedCore,
    writer: Writer,
    output: Path,
    *,
    adapter: Adapter | None = None,
    any_activations: bool = False,
    trained: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] = lambda name: None,
) -> Exported:
    """Write ``core`` in the format of ``writer`` to the new folder ``output``.

    Args:
        core: the quantised model; its ``merge`` holds an adapter to merge.
        writer: ``AscendWriter`` or ``CompressedTensorsWriter``.
        output: must not exist, or be empty.
        adapter: a LoRA adapter to put beside the base, bound to it by the fingerprint.
        any_activations: True: export for Ascend although the NPU rounds the inputs of linears
            otherwise than training did.
        trained: fingerprint of the base that the run trained on, without input scales; None if it
            is not known.
        shard_bytes: size of a safetensors file at which the next one begins.
        progress: called with the name of each entry when it is written.

    Raises:
        ValueError: the model, the recipe, the adapter or the folder does not fit, or the result
            does not pass ``validate``, or the checkpoint is not the model that was trained; nothing
            is left in ``output``.
    """
    writer.check(core)
    _check_activations(core.recipe, writer, any_activations)
    if adapter is not None:
        _check_adapter(core, adapter)
    if used := adapter or core.merge:
        refuse_changed(used)
    if core.merge is not None:
        _check_merge(core, core.merge, trained)
        trained = None
    partial = _new_folder(output)
    try:
        exported = _write(core, writer, partial, adapter, trained, shard_bytes, progress)
        write_checksums(partial)
        findings = validate(partial, tensor_parallel=getattr(writer, "tensor_parallel", 1))
        if findings:
            raise ValueError(
                f"the export did not pass its own check ({len(findings)} findings): {findings[0]}"
            )
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return Exported(output, *exported)


def ascend_refusal(recipe: Recipe, plan: Sequence[PlannedLinear]) -> str | None:
    """Why ``export`` would refuse a run of ``recipe`` for W4A4 on Ascend 950 with its adapter
    beside it; None if it would not, as far as recipe and linears tell.

    Args:
        recipe: of a run that need not have begun.
        plan: the linears of its model.
    """
    writer, profile = AscendWriter(), get_profile(recipe.weight_profile)
    try:
        refuse_recipe(recipe)
        refuse_plan(plan, profile)
        writer.check_linears(plan, profile)
        _check_activations(recipe, writer, any_activations=False)
        _check_lora_input(recipe)
    except ValueError as error:
        return str(error)
    return None


def _write(
    core: PackedCore,
    writer: Writer,
    folder: Path,
    adapter: Adapter | None,
    trained: str | None,
    shard_bytes: int,
    progress: Callable[[str], None],
) -> tuple[str, int, int, dict[str, Any], dict[str, Survival]]:
    layout, owner = [], {}
    for name, value in core.outline():
        for stored, tensor in writer.tensors(core, name, value).items():
            layout.append((stored, tensor))
            owner[stored] = name
    fingerprint = Fingerprint()
    with ShardedWriter(folder, writer.stem, layout, shard_bytes) as shards:
        _check_space(folder, shards.total_bytes)
        for name, value in core.entries():
            for stored, tensor in writer.tensors(core, name, value).items():
                shards.write(stored, tensor)
            fingerprint.add(name, value)
            progress(name)
    if trained is not None:
        _check_trained(fingerprint.hexdigest(input_scales=False), trained, core)
    base = fingerprint.hexdigest()
    config = _served_config(core)
    _write_json(folder / "config.json", writer.sign(folder, core, config, owner))
    _copy_companions(core.checkpoint.folder, folder)
    if adapter is not None:
        refuse_other_base(adapter, base, fingerprint.hexdigest(input_scales=False))
        bind_adapter(adapter, folder, base)
    record = _record(core, writer, adapter, base)
    _write_json(folder / RECORD, record)
    return base, len(owner), shards.total_bytes, record, core.survival


def _record(
    core: PackedCore, writer: Writer, adapter: Adapter | None, fingerprint: str
) -> dict[str, Any]:
    merged = None
    if core.survival:
        total = sum(core.survival.values(), Survival(0.0, 0.0, 0.0, 0.0))
        linears = {path: s.as_dict() for path, s in core.survival.items()}
        merged = {"all": total.as_dict(), "linears": linears}
    used = adapter or core.merge
    return {
        "npu_qat": __version__,
        "format": writer.format,
        "scheme": getattr(writer, "scheme", None),
        "base_fingerprint": fingerprint,
        "recipe": core.recipe.model_dump(mode="json"),
        "activations": writer.activations(core.recipe).as_dict(),
        "adapter": "beside" if adapter else "merged" if core.merge else None,
        "adapter_content": used.content() if used else None,
        "merged_adapter_survival": merged,
    }


def _check_trained(found: str, trained: str, core: PackedCore) -> None:
    if found != trained:
        raise ValueError(
            f"{core.checkpoint.folder} is not the model that was trained: quantised, it has the "
            f"fingerprint {found[:16]}..., but the run's base has {trained[:16]}... Restore it, or "
            "export it without the run (--model)"
        )


def _check_merge(core: PackedCore, merge: Adapter, trained: str | None) -> None:
    """The merged weights have a fingerprint of their own: that of the base, if anything names one,
    is made here."""
    if trained is None and not (merge.folder / BINDING).exists():
        return
    base = fingerprint_of(replace(core, merge=None))
    weights = base.hexdigest(input_scales=False)
    if trained is not None:
        _check_trained(weights, trained, core)
    refuse_other_base(merge, base.hexdigest(), weights)


def _check_activations(recipe: Recipe, writer: Writer, any_activations: bool) -> None:
    activations = writer.activations(recipe)
    if writer.format != "ascend" or getattr(writer, "scheme", "") != "W4A4_MXFP4":
        return  # chosen for other activations; the record says which
    if not activations.same and not any_activations:
        raise ValueError(
            f"the NPU rounds the inputs of linears by {activations.served!r}, but training used "
            f"{activations.trained!r}: the NPU would not compute what was trained. Train with "
            "quant.injection_point: both and quant.activation_profile: ascend950, or pass "
            "--any-activations to export all the same"
        )


def _check_adapter(core: PackedCore, adapter: Adapter) -> None:
    adapter.check({p.path: (p.out_features, p.in_features) for p in core.plan})
    _check_lora_input(core.recipe)


def _check_lora_input(recipe: Recipe) -> None:
    if recipe.lora_input == "quantised":
        raise ValueError(
            "quant.lora_input: quantised fed the adapter 4-bit inputs in training, but serving "
            "engines feed it the 16-bit ones; train with lora_input: full, or export with "
            "--adapter none"
        )


def _new_folder(output: Path) -> Path:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty; name a new folder with --output")
    partial = output.with_name(f"{output.name}.partial")
    if partial.exists():
        raise ValueError(
            f"{partial} is left over from an export that was killed, or another one is writing "
            "it; remove it or name another --output"
        )
    partial.mkdir(parents=True)
    return partial


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder.parent}: {free / 2**20:.0f} MiB free, but the export takes "
            f"{needed / 2**20:.0f} MiB; free some space or name another --output"
        )


def _served_config(core: PackedCore) -> dict[str, Any]:
    """``config.json`` of the source with the dtype that its tensors now have."""
    config = dict(core.checkpoint.config)
    config.pop("torch_dtype", None)
    return {**config, "dtype": str(core.checkpoint.dtype).removeprefix("torch.")}


def _copy_companions(source: Path, target: Path) -> None:
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
