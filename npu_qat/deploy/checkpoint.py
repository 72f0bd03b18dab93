"""A 16-bit checkpoint on disk: its tensors one at a time, and its architecture without data.

Nothing here holds more than the tensors that were asked for. A safetensors file is mapped into
memory, and the pages that were touched stay resident as long as the mapping does; so each request
opens the file anew (a header of some kilobytes) and the pages go with the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npu_qat.config import ModelConfig
from npu_qat.layers.base_model import DTYPES, model_source

INDEX_SUFFIX = ".safetensors.index.json"
# A folder with one of these was quantised already.
ASCEND_SIGNATURE = "quant_model_description.json"
PIECE = 1 << 22  # elements that are looked at in one go
_FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a 16-bit model.

    Attributes:
        folder: where it is.
        files: tensor name -> the safetensors file that holds it.
        shapes: tensor name -> shape.
        dtype: of every tensor that is read (the run's computation dtype).
        model: the architecture on the meta device, tied as its configuration says.
        config: the content of ``config.json``.
    """

    folder: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    model: nn.Module
    config: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the tensors that the model has, in module order; tied ones once."""
        return list(expected_shapes(self.model))

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors ``names`` on the CPU, in ``dtype``.

        Raises:
            ValueError: one of them holds NaN or Inf.
        """
        found = {}
        for name in names:
            tensor = read_tensor(self.files[name], name)
            if not all_finite(tensor):
                raise ValueError(f"{name} in {self.files[name]} holds NaN or Inf; it is damaged")
            found[name] = tensor.to(self.dtype)
        return found


def open_checkpoint(config: ModelConfig) -> Checkpoint:
    """The checkpoint that ``config.path`` names, checked against its own architecture.

    Raises:
        ValueError: it is not there, is no safetensors checkpoint, was quantised already, or its
            tensors are not those of its architecture.
    """
    folder = _folder(config)
    settings = read_config(folder)
    refuse_quantized(folder, settings)
    model = architecture(folder, DTYPES[config.dtype], trust_remote_code=config.trust_remote_code)
    files, shapes = _tensors(folder)
    expected = expected_shapes(model)
    missing = sorted(set(expected) - set(files))
    # A checkpoint may store a tied weight twice; the model has it once.
    extra = sorted(set(files) - set(expected) - tied_names(model))
    wrong = [n for n in expected if n in shapes and shapes[n] != expected[n]]
    for names, what in ((missing, "lacks"), (extra, "has"), (wrong, "has another shape of")):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise ValueError(
                f"{folder} {what} {shown}, unlike the {type(model).__name__} of its config.json"
            )
    return Checkpoint(folder, files, shapes, DTYPES[config.dtype], model, settings)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``. Raises ValueError if it is not there or not readable."""
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no model folder: it has no config.json") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder}/config.json holds no JSON object")
    return content


def refuse_quantized(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if the folder carries the signature of a quantised model."""
    nested = settings.get("text_config") or {}
    signature = None
    if (folder / ASCEND_SIGNATURE).exists():
        signature = ASCEND_SIGNATURE
    elif "quantization_config" in settings or "quantization_config" in nested:
        signature = "quantization_config in config.json"
    if signature is not None:
        raise ValueError(f"{folder} is quantised already ({signature}); give the 16-bit checkpoint")


def architecture(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model of ``folder/config.json`` on the meta device.

    A ``quantization_config`` is left out: it would make transformers build other modules.

    Raises:
        ValueError: transformers does not know the architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        for part in (config, getattr(config, "text_config", None)):
            if part is not None and getattr(part, "quantization_config", None) is not None:
                del part.quantization_config
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the model of {folder}/config.json cannot be built: {error}") from error
    return model


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a saved ``model``, in module order; tied ones once."""
    tied = tied_names(model)
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}


def tied_names(model: nn.Module) -> set[str]:
    """Names of the tensors that are another one's second name (``lm_head.weight``, if tied)."""
    first: dict[int, str] = {}
    tied = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied.add(name)
    return tied


def safetensors_files(folder: Path) -> list[Path]:
    """Every safetensors file in ``folder``: what serving engines load, by this same pattern."""
    return sorted(folder.glob("*.safetensors"))


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor, on the CPU, as stored."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
    return tensor


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or Inf; in pieces, so that no copy of an embedding is made."""
    pieces = tensor.reshape(-1).split(PIECE)
    return not any(bool(torch.isfinite(piece).logical_not_().any()) for piece in pieces)


def _folder(config: ModelConfig) -> Path:
    source = Path(model_source(config))
    if source.is_dir():
        return source
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(config.path, revision=config.revision, allow_patterns=list(_FETCHED))
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path {config.path!r} is no folder and cannot be had from the hub: {error}"
        ) from error


def _tensors(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """File and shape of each tensor, from the headers; of several copies, the index decides."""
    from safetensors import SafetensorError, safe_open

    candidates = safetensors_files(folder)
    index = folder / f"model{INDEX_SUFFIX}"
    if index.exists():
        listed = json.loads(index.read_text("utf-8"))["weight_map"].values()
        candidates = sorted({folder / name for name in listed})
    elif (folder / "model.safetensors").exists():
        candidates = [folder / "model.safetensors"]
    if not candidates:
        raise ValueError(
            f"{folder} has no safetensors file; convert it with model.save_pretrained(folder)"
        )
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in candidates:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (a method of the library, not a dict)
                    if name in files:
                        raise ValueError(f"{name} is in {files[name].name} and in {file.name}")
                    files[name] = file
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read, is it whole? {error}") from error
    return files, shapes
