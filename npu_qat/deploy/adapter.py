"""LoRA adapters beside a quantised base: read, bound to the base, checked, or merged.

An adapter was trained to correct the rounding of one particular base. On another one (a different
weight profile, a re-quantised or newer checkpoint) it loads without complaint and makes the model
worse. So an export writes the base's fingerprint beside the adapter, and ``check_adapter`` refuses
the pair if the tensors on disk have another one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npu_qat.deploy.checkpoint import all_finite

ADAPTER_FOLDER = "adapter"
BINDING = "npu_qat_base.json"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Features of PEFT that change what a linear computes beyond W + s B A.
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "modules_to_save", "trainable_token_indices")


class AdapterMismatch(ValueError):
    """The adapter was trained on another base, or nothing says on which."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in PEFT's format: ``W + s B A`` for some linears.

    Attributes:
        folder: where it came from.
        a, b: linear -> A [r, K] and B [N, r], as stored.
        scaling: linear -> s.
    """

    folder: Path
    a: Mapping[str, torch.Tensor]
    b: Mapping[str, torch.Tensor]
    scaling: Mapping[str, float]

    @property
    def paths(self) -> list[str]:
        """The linears that it changes."""
        return list(self.a)

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError unless every pair fits a linear of ``shapes`` (path -> (N, K))."""
        for path in self.paths:
            if path not in shapes:
                raise ValueError(f"{self.folder} changes {path}, which is no linear of the model")
            n, k = shapes[path]
            (rank, inputs), (outputs, rank_b) = self.a[path].shape, self.b[path].shape
            if (inputs, outputs, rank) != (k, n, rank_b):
                raise ValueError(
                    f"{self.folder}: A {rank}x{inputs} and B {outputs}x{rank_b} of {path} do not "
                    f"fit its weight {n}x{k}"
                )

    def delta(self, path: str) -> torch.Tensor:
        """``s B A`` [N, K] in fp32."""
        return (self.b[path].float() @ self.a[path].float()).mul_(self.scaling[path])

    def added_to(self, path: str, weight: torch.Tensor) -> torch.Tensor:
        """``weight + s B A`` in ``weight``'s dtype; ``weight`` itself if nothing is added."""
        if path not in self.a:
            return weight
        return (weight.float() + self.delta(path)).to(weight.dtype)


def read_adapter(folder: Path) -> Adapter:
    """The adapter in ``folder``.

    Raises:
        ValueError: it is not there, is no plain LoRA, is incomplete, or holds NaN or Inf.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no readable adapter in PEFT's format: {error}") from error
    _refuse_features(folder, config)
    found: dict[str, dict[str, torch.Tensor]] = {"lora_A": {}, "lora_B": {}}
    for name, tensor in tensors.items():
        path, part = _parse(folder, name)
        if not all_finite(tensor):
            raise ValueError(f"{folder}: {name} holds NaN or Inf; take an earlier checkpoint")
        found[part][path] = tensor
    unpaired = sorted(set(found["lora_A"]) ^ set(found["lora_B"]))
    if unpaired or not tensors:
        what = f"one matrix of the pair of {unpaired[0]}" if unpaired else "no tensors"
        raise ValueError(f"{folder}/{_WEIGHTS} holds {what}; it is not whole")
    ranks = {path: a.shape[0] for path, a in found["lora_A"].items()}
    scaling = {path: _scaling(config, path, rank) for path, rank in ranks.items()}
    return Adapter(folder, found["lora_A"], found["lora_B"], scaling)


def bind_adapter(adapter: Adapter, base: Path, fingerprint: str) -> None:
    """Copy ``adapter`` into the export ``base``, with the fingerprint of what it belongs to."""
    target = base / ADAPTER_FOLDER
    target.mkdir()
    for name in (_CONFIG, _WEIGHTS):
        shutil.copyfile(adapter.folder / name, target / name)
    write_binding(target, fingerprint)


def write_binding(folder: Path, fingerprint: str) -> None:
    """Write into an adapter's ``folder`` which base it was trained on."""
    (folder / BINDING).write_text(json.dumps({"base_fingerprint": fingerprint}, indent=2) + "\n")


def refuse_other_base(adapter: Adapter, *fingerprints: str) -> None:
    """Refuse an adapter that says it was trained on a base with none of ``fingerprints``.

    One that says nothing (of another tool, or of a run from before) is let through.

    Raises:
        AdapterMismatch: it was trained on another base.
    """
    if not (adapter.folder / BINDING).exists():
        return
    bound = bound_fingerprint(adapter.folder)
    if bound not in fingerprints:
        raise AdapterMismatch(
            f"{adapter.folder} was trained on another base (fingerprint {bound[:16]}...) than the "
            f"one that is exported ({fingerprints[0][:16]}...); export the model and recipe of its "
            "run"
        )


def bound_fingerprint(folder: Path) -> str:
    """The fingerprint of the base that the adapter in ``folder`` was trained on.

    Raises:
        AdapterMismatch: the adapter does not say.
    """
    try:
        fingerprint = json.loads((folder / BINDING).read_text("utf-8"))["base_fingerprint"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise AdapterMismatch(
            f"{folder} does not say which base it was trained on ({BINDING} is missing or "
            "damaged); export it again with npu-qat export"
        ) from error
    return str(fingerprint)


def check_adapter(base: Path, adapter: Path) -> None:
    """Refuse ``adapter`` unless it was trained on the quantised model in ``base``.

    The base's tensors are read and hashed, whatever its files say about themselves.

    Raises:
        AdapterMismatch: it was not, or it does not say.
        ValueError: ``base`` cannot be read.
    """
    from npu_qat.deploy.reader import open_export

    expected, found = bound_fingerprint(adapter), open_export(base).fingerprint()
    if expected != found:
        raise AdapterMismatch(
            f"{adapter} was trained on another base (fingerprint {expected[:16]}...) than {base} "
            f"({found[:16]}...); serve it on the base that was exported with it"
        )


def _refuse_features(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of type {config.get('peft_type')}, not LoRA")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise ValueError(f"{folder} uses {', '.join(used)}, which serving engines do not apply")


def _parse(folder: Path, name: str) -> tuple[str, str]:
    path, _, part = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
    if not name.startswith(_PREFIX) or part not in ("lora_A", "lora_B"):
        raise ValueError(f"{folder}/{_WEIGHTS}: {name} is no LoRA matrix of a linear")
    return path, part


def _scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (PEFT's ``LoraLayer``)."""
    if config.get("alpha_pattern") or config.get("rank_pattern"):
        raise ValueError(f"the adapter of {path} has rank or alpha patterns, which are not merged")
    return float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
