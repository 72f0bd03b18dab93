"""LoRA adapters beside a quantised base: read, bound to the base, checked, or merged.

An adapter was trained to correct the rounding of one particular base. On another one (a different
weight profile, a re-quantised or newer checkpoint) it loads without complaint and makes the model
worse. So an export writes the base's fingerprint beside the adapter, and ``check_adapter`` refuses
the pair if the tensors on disk have another one.

What an adapter adds also depends on a few words in its configuration: twice the ``lora_alpha`` is
twice the adapter, and no tensor shows it. So training, which knows them, writes the configuration
and a fingerprint of the matrices beside the adapter, too, and the export repeats them in its record
(``Adapter.content``); a change in one place then contradicts the other two.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch

from npu_qat.deploy.checkpoint import all_finite
from npu_qat.deploy.core import Fingerprint

ADAPTER_FOLDER = "adapter"
BINDING = "npu_qat_base.json"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _SUFFIX = "base_model.model.", ".weight"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Where the base lay, and who wrote the file: no part of what the adapter computes.
_ASIDE = ("base_model_name_or_path", "revision", "peft_version")
# Lists that PEFT holds as sets, and so writes in any order.
_SETS = ("target_modules", "exclude_modules")
# Features of PEFT that change what a linear computes beyond W + s B A, with one s.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
# Starts that take out of the base what the adapter begins with (PiSSA also as pissa_niter_N).
_STARTS_IN_THE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


class AdapterMismatch(ValueError):
    """The adapter was trained on another base, nothing says on which, or it was changed since."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in PEFT's format: ``W + s B A`` for some linears.

    Attributes:
        folder: where it came from.
        a, b: linear -> A [r, K] and B [N, r], as stored.
        scaling: linear -> s.
        config: ``adapter_config.json`` without the base's place and PEFT's version.
    """

    folder: Path
    a: Mapping[str, torch.Tensor]
    b: Mapping[str, torch.Tensor]
    scaling: Mapping[str, float]
    config: Mapping[str, Any]

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

    def fingerprint(self) -> str:
        """SHA-256 over matrices and scales, 64 hexadecimal digits."""
        found = Fingerprint()
        for path in self.paths:
            found.add(f"{path}.lora_A", self.a[path])
            found.add(f"{path}.lora_B", self.b[path])
            found.add(f"{path}.scaling", torch.tensor(self.scaling[path]))
        return found.hexdigest()

    def content(self) -> dict[str, Any]:
        """What to write down elsewhere, so that ``changes`` finds a change; for JSON."""
        return {"fingerprint": self.fingerprint(), "config": dict(self.config)}

    def changes(self, content: Mapping[str, Any]) -> list[str]:
        """In words, how this adapter differs from the one with that ``content``.

        What is off is null, false or empty in one version of PEFT and not there in another: these
        are the same.
        """
        try:
            then, fingerprint = dict(content["config"]), content["fingerprint"]
        except (KeyError, TypeError, ValueError):
            return ["the description is damaged"]
        now, keys = self.config, sorted({*self.config, *then}.difference(_ASIDE))
        changed = [k for k in keys if (now.get(k) or None) != (then.get(k) or None)]
        if changed:
            # Shortened: a list of targets may name every linear.
            return [f"{k} is {brief(now.get(k))}, not {brief(then.get(k))}" for k in changed]
        return [] if self.fingerprint() == fingerprint else ["its matrices are others"]

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
        ValueError: it is not there, is no plain LoRA, is incomplete, damaged, or holds NaN or Inf.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no readable adapter in PEFT's format ({_CONFIG} and {_WEIGHTS}): "
            f"{error}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/{_CONFIG} holds no settings; restore the file")
    _refuse_features(folder, config)
    for name in _ASIDE:
        config.pop(name, None)
    for name in _SETS:
        if isinstance(config.get(name), list):
            config[name].sort(key=str)
    found: dict[str, dict[str, torch.Tensor]] = {"lora_A": {}, "lora_B": {}}
    for name, tensor in tensors.items():
        path, part = _parse(folder, name)
        if tensor.ndim != 2 or 0 in tensor.shape or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{folder}: {name} holds {tensor.dtype} of shape {tuple(tensor.shape)}, no matrix "
                "of bf16, fp16 or fp32"
            )
        if not all_finite(tensor):
            raise ValueError(f"{folder}: {name} holds NaN or Inf; take an earlier checkpoint")
        found[part][path] = tensor
    unpaired = sorted(set(found["lora_A"]) ^ set(found["lora_B"]))
    if unpaired or not tensors:
        what = f"one matrix of the pair of {unpaired[0]}" if unpaired else "no tensors"
        raise ValueError(f"{folder}/{_WEIGHTS} holds {what}; it is not whole")
    ranks = {path: a.shape[0] for path, a in found["lora_A"].items()}
    scaling = {path: _scaling(folder, config, path, rank) for path, rank in ranks.items()}
    return Adapter(folder, found["lora_A"], found["lora_B"], scaling, config)


def bind_adapter(adapter: Adapter, base: Path, fingerprint: str) -> None:
    """Copy ``adapter`` into the export ``base``, with the fingerprint of what it belongs to."""
    target = base / ADAPTER_FOLDER
    target.mkdir()
    for name in (_CONFIG, _WEIGHTS):
        shutil.copyfile(adapter.folder / name, target / name)
    write_binding(target, fingerprint)


@dataclass(frozen=True)
class Binding:
    """What is written beside an adapter.

    Attributes:
        base: fingerprint of the base that it was trained on.
        content: its own, when that was written; None: written by an earlier version.
    """

    base: str
    content: Mapping[str, Any] | None


def write_binding(folder: Path, fingerprint: str) -> None:
    """Write into an adapter's ``folder`` which base it was trained on, and what it holds now."""
    binding = {"base_fingerprint": fingerprint, "content": read_adapter(folder).content()}
    (folder / BINDING).write_text(json.dumps(binding, indent=2) + "\n")


def refuse_other_base(adapter: Adapter, *fingerprints: str) -> None:
    """Refuse an adapter that says it was trained on a base with none of ``fingerprints``.

    One that says nothing (of another tool, or of a run from before) is let through.

    Raises:
        AdapterMismatch: it was trained on another base.
    """
    if not (adapter.folder / BINDING).exists():
        return
    binding = read_binding(adapter.folder)
    if binding.base not in fingerprints:
        raise AdapterMismatch(
            f"{adapter.folder} was trained on another base (fingerprint {binding.base[:16]}...) "
            f"than the one that is exported ({fingerprints[0][:16]}...); export the model and "
            "recipe of its run"
        )


def refuse_changed(adapter: Adapter) -> None:
    """Refuse an adapter that is not what was written beside it; one without that is let through.

    Raises:
        AdapterMismatch: it was changed.
    """
    if not (adapter.folder / BINDING).exists():
        return
    content = read_binding(adapter.folder).content
    if changes := [] if content is None else adapter.changes(content):
        raise AdapterMismatch(
            f"{adapter.folder} was changed after {BINDING} was written there: "
            f"{'; '.join(changes)}. Restore it; or, if it is meant, remove {BINDING} and export it "
            "again with npu-qat export"
        )


def read_binding(folder: Path) -> Binding:
    """What is written beside the adapter in ``folder``.

    Raises:
        AdapterMismatch: nothing that could be read.
    """
    try:
        found = json.loads((folder / BINDING).read_text("utf-8"))
        return Binding(str(found["base_fingerprint"]), found.get("content"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterMismatch(
            f"{folder} does not say which base it was trained on ({BINDING} is missing or "
            "damaged); export it again with npu-qat export"
        ) from error


def check_adapter(base: Path, adapter: Path) -> None:
    """Refuse ``adapter`` unless it was trained on the quantised model in ``base``, and is what it
    was then.

    The tensors of both are read and hashed, whatever their files say about themselves.

    Raises:
        AdapterMismatch: it was not, or it does not say, or it was changed.
        ValueError: ``base`` or ``adapter`` cannot be read.
    """
    from npu_qat.deploy.reader import open_export

    binding, found = read_binding(adapter), open_export(base).fingerprint()
    if binding.base != found:
        raise AdapterMismatch(
            f"{adapter} was trained on another base (fingerprint {binding.base[:16]}...) than "
            f"{base} ({found[:16]}...); serve it on the base that was exported with it"
        )
    refuse_changed(read_adapter(adapter))


def _refuse_features(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of type {config.get('peft_type')}, not LoRA")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise ValueError(f"{folder} uses {', '.join(used)}, which serving engines do not apply")
    start = str(config.get("init_lora_weights"))
    if start.startswith(_STARTS_IN_THE_BASE):
        raise ValueError(
            f"{folder} began with init_lora_weights: {start}, which took out of the base what the "
            "adapter began with, and engines do not. Convert it with PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )


def _parse(folder: Path, name: str) -> tuple[str, str]:
    path, _, part = name.removeprefix(_PREFIX).removesuffix(_SUFFIX).rpartition(".")
    whole = name.startswith(_PREFIX) and name.endswith(_SUFFIX)
    if not whole or part not in ("lora_A", "lora_B"):
        raise ValueError(f"{folder}/{_WEIGHTS}: {name} is no LoRA matrix of a linear")
    return path, part


def _scaling(folder: Path, config: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (PEFT's ``LoraLayer``)."""
    alpha = config.get("lora_alpha")
    if config.get("r") != rank:
        raise ValueError(
            f"{folder}/{_CONFIG} says r {config.get('r')} and lora_alpha {alpha}, by which engines "
            f"scale, but the matrices of {path} have rank {rank}; restore the file"
        )
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(
            f"{folder}/{_CONFIG} says lora_alpha {alpha!r}, by which engines scale: that is no "
            "number; restore the file"
        )
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
