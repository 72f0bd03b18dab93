"""An exported folder, read back into the entries of a core, whatever its format.

Used to compare an export with training, to recompute its fingerprint, and by ``validate`` once the
folder is known to be in order. It reads what the serving engines read and nothing else: codes,
scales and float tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from npu_qat.deploy.checkpoint import (
    ASCEND_SIGNATURE,
    read_config,
    read_tensor,
    safetensors_files,
)
from npu_qat.deploy.core import INPUT_SCALE, Fingerprint, Value
from npu_qat.numerics import QuantizedTensor

# The profiles that decode a file's bytes; how they were rounded is not in the file.
_MXFP4, _NVFP4 = "ocp", "nvfp4"


@dataclass(frozen=True)
class ExportedModel:
    """A quantised checkpoint on disk.

    Attributes:
        folder: where it is.
        format: "ascend" or "compressed-tensors".
        files: stored tensor -> file.
    """

    folder: Path
    format: str
    files: dict[str, Path]

    def names(self) -> list[str]:
        """Names of the entries, sorted."""
        return sorted({_entry(name) for name in self.files})

    def read(self, name: str) -> Value:
        """One entry: codes and scales, or a float tensor as stored.

        A ``QuantizedTensor`` decodes to the right numbers; its profile names the format only
        (``ocp`` for MXFP4, ``nvfp4``), since files do not say how they were rounded.
        """
        path, _, kind = name.rpartition(".")
        if kind == INPUT_SCALE:
            return self._get(f"{path}.input_global_scale").reciprocal().reshape(())
        scale = f"{name}_scale"
        if scale not in self.files:
            return self._get(name)
        packed = self._get(name if self.format == "ascend" else f"{name}_packed")
        scales, tensor_scale = self._get(scale), None
        nvfp4 = scales.dtype == torch.float8_e4m3fn
        if nvfp4:
            tensor_scale = self._get(f"{name}_global_scale").reciprocal().reshape(())
        return QuantizedTensor.from_packed(
            packed,
            scales.view(torch.uint8),
            shape=(packed.shape[0], 2 * packed.shape[1]),
            profile=_NVFP4 if nvfp4 else _MXFP4,
            tensor_scale=tensor_scale,
        )

    def entries(self) -> Iterator[tuple[str, Value]]:
        """(name, value) of all entries, one at a time."""
        return ((name, self.read(name)) for name in self.names())

    def fingerprint(self) -> str:
        """The base's fingerprint, from its tensors."""
        fingerprint = Fingerprint()
        for name, value in self.entries():
            fingerprint.add(name, value)
        return fingerprint.hexdigest()

    def _get(self, stored: str) -> torch.Tensor:
        return read_tensor(self.files[stored], stored)


def open_export(folder: Path) -> ExportedModel:
    """The quantised checkpoint in ``folder``.

    Raises:
        ValueError: it carries no signature or two, or a file cannot be read.
    """
    signatures = find_signatures(folder)
    if len(signatures) != 1:
        found = " and ".join(signatures) or "none"
        raise ValueError(f"{folder} must carry one signature of a quantised model, found {found}")
    return ExportedModel(folder, signatures[0], stored_files(folder))


def find_signatures(folder: Path) -> list[str]:
    """Formats whose readers would take ``folder`` for theirs."""
    found = ["ascend"] if (folder / ASCEND_SIGNATURE).exists() else []
    config = read_config(folder)
    if config.get("quantization_config") or (config.get("text_config") or {}).get(
        "quantization_config"
    ):
        found.append("compressed-tensors")
    return found


def stored_files(folder: Path) -> dict[str, Path]:
    """Stored tensor -> file, over every safetensors file of ``folder``."""
    from safetensors import SafetensorError, safe_open

    files: dict[str, Path] = {}
    for file in safetensors_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                files |= dict.fromkeys(handle.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read, is it whole? {error}") from error
    return files


def _entry(stored: str) -> str:
    path, _, kind = stored.rpartition(".")
    if kind == "input_global_scale":
        return f"{path}.{INPUT_SCALE}"
    if kind in ("weight_packed", "weight_scale", "weight_global_scale"):
        return f"{path}.weight"
    return stored
