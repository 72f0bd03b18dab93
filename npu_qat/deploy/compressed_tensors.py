"""compressed-tensors: what transformers and vLLM read on a GPU or a CPU.

    mxfp4-pack-quantized   X.weight_packed uint8 [N, K/2], X.weight_scale uint8 [N, K/32] (E8M0)
    nvfp4-pack-quantized   X.weight_packed uint8 [N, K/2], X.weight_scale float8_e4m3fn [N, K/16],
                           X.weight_global_scale fp32 [1], X.input_global_scale fp32 [1]

The MXFP4 bytes are those of AscendV1. Global scales are divisors, the reciprocals of our tensor
scales, and equal within q, k, v and within gate, up, because vLLM fuses them and takes the largest.
What the readers make of activations is theirs: MXFP4 inputs get the even scale rule and ties to
even (profile ``compressed-tensors``), whatever training used. Sources: compressed-tensors 0.20.0
``compressors/{mxfp4,nvfp4}``, its presets MXFP4 and NVFP4.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npu_qat.config import Recipe
from npu_qat.deploy.core import INPUT_SCALE, PackedCore, Value, divisor
from npu_qat.deploy.formats import Activations, check_shards, trained_activations
from npu_qat.numerics import QuantizedTensor
from npu_qat.numerics.profiles import Profile, get_profile

MXFP4, NVFP4 = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
# The layout is what these releases of the library write and read.
LIBRARY_VERSION = "0.20.0"


class CompressedTensorsWriter:
    """Writes compressed-tensors; MXFP4 or NVFP4 as the weight profile says.

    Args:
        tensor_parallel: devices that the model will be cut over.
    """

    format = "compressed-tensors"
    stem = "model"
    scheme = "pack-quantized"

    def __init__(self, tensor_parallel: int = 1) -> None:
        self.tensor_parallel = tensor_parallel

    def check(self, core: PackedCore) -> None:
        """Raise ValueError for a shape or a scale that the readers do not take."""
        size = core.profile.block_size
        check_shards(core.plan, size, self.tensor_parallel, "is the size of a block")
        if self._static_inputs(core):
            missing = [path for path in core.quantized if path not in core.input_scales]
            if missing:
                raise ValueError(
                    f"{missing[0]}: NVFP4 activations need a calibrated scale, and none was given"
                )

    def tensors(self, core: PackedCore, name: str, value: Value) -> dict[str, torch.Tensor]:
        """Packed weight and its scales; everything else as it is."""
        path, _, kind = name.rpartition(".")
        if kind == INPUT_SCALE:
            assert isinstance(value, torch.Tensor)
            return {f"{path}.input_global_scale": divisor(value)}
        if not isinstance(value, QuantizedTensor):
            return {name: value}
        scales = value.scales
        if value.profile.scale_format == "e4m3":
            scales = scales.view(torch.float8_e4m3fn)
        stored = {f"{name}_packed": value.packed, f"{name}_scale": scales}
        if value.tensor_scale is not None:
            stored[f"{name}_global_scale"] = divisor(value.tensor_scale)
        return stored

    def activations(self, recipe: Recipe) -> Activations:
        """The readers' own rule for the format."""
        served = "16 bits"
        if recipe.quantizes_input:
            mx = _format(get_profile(recipe.weight_profile)) == MXFP4
            served = "compressed-tensors" if mx else "nvfp4"
        return Activations(trained_activations(recipe), served)

    def sign(
        self, folder: Path, core: PackedCore, config: dict[str, Any], owner: Mapping[str, str]
    ) -> dict[str, Any]:
        """``config.json`` with a ``quantization_config``."""
        kept = set(core.quantized)
        linears = (p for p, m in core.checkpoint.model.named_modules() if isinstance(m, nn.Linear))
        group = {
            "targets": ["Linear"],
            "weights": _arguments(core, dynamic=False, observer="memoryless_minmax"),
            "input_activations": self._input_arguments(core),
            "output_activations": None,
            "format": _format(core.profile),
        }
        settings = {
            "quant_method": "compressed-tensors",
            "format": _format(core.profile),
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [path for path in linears if path not in kept],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": LIBRARY_VERSION,
        }
        return {**config, "quantization_config": settings}

    def _static_inputs(self, core: PackedCore) -> bool:
        return core.recipe.quantizes_input and _format(core.profile) == NVFP4

    def _input_arguments(self, core: PackedCore) -> dict[str, Any] | None:
        if not core.recipe.quantizes_input:
            return None
        if _format(core.profile) == NVFP4:
            return _arguments(core, dynamic="local", observer="static_minmax")
        return _arguments(core, dynamic=True, observer=None)


def _format(weights: Profile) -> str:
    return MXFP4 if weights.scale_format == "e8m0" else NVFP4


def _arguments(core: PackedCore, *, dynamic: bool | str, observer: str | None) -> dict[str, Any]:
    mx = _format(core.profile) == MXFP4
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "group_size": core.profile.block_size,
        "strategy": "group" if mx else "tensor_group",
        "dynamic": dynamic,
        "scale_dtype": "torch.uint8" if mx else "torch.float8_e4m3fn",
        "observer": observer,
    }
