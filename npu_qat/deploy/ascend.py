"""AscendV1: what vllm-ascend and SGLang read on an Ascend 950.

    X.weight        uint8 [N, K/2]    two E2M1 codes a byte along K, the even index low
    X.weight_scale  uint8 [N, K/32]   E8M0, exponent + 127, row-major
    X.bias          float32 [N]       of quantised linears, as msmodelslim writes it

and ``quant_model_description.json``, which names the type of every tensor. Its presence selects the
reader, and the reader refuses a second signature, so ``config.json`` has no
``quantization_config``. W4A8_MXFP is the same bytes under another type string: 4-bit weights with
8-bit activations. Sources: msmodelslim 26.1.0 ``save/ascendv1.py``, vllm-ascend 0.23.0
``quantization/methods/w4a4_mxfp4.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from npu_qat.config import Recipe
from npu_qat.deploy.checkpoint import ASCEND_SIGNATURE, tied_names
from npu_qat.deploy.core import INPUT_SCALE, PackedCore, Value
from npu_qat.deploy.formats import Activations, check_shards, trained_activations
from npu_qat.layers.plan import PlannedLinear
from npu_qat.numerics import QuantizedTensor
from npu_qat.numerics.profiles import Profile

SCHEMES = ("W4A4_MXFP4", "W4A8_MXFP")
FLOAT = "FLOAT"
GROUP_SIZE = 32
# vllm-ascend views the scales as [N, K/64, 2]; the releases up to 0.24 do not pad.
K_MULTIPLE = 64
VERSION = "1.0.0"


class AscendWriter:
    """Writes AscendV1.

    Args:
        scheme: ``W4A4_MXFP4`` or ``W4A8_MXFP``.
        tensor_parallel: devices that the model will be cut over.
    """

    format = "ascend"
    stem = "quant_model_weights"

    def __init__(self, scheme: str = "W4A4_MXFP4", tensor_parallel: int = 1) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"unknown Ascend scheme {scheme!r}; choose {' or '.join(SCHEMES)}")
        self.scheme, self.tensor_parallel = scheme, tensor_parallel

    def check(self, core: PackedCore) -> None:
        """Raise ValueError for a format or shape that vllm-ascend does not take."""
        self.check_linears(core.plan, core.profile)

    def check_linears(self, plan: Iterable[PlannedLinear], profile: Profile) -> None:
        """``check`` without a checkpoint: of linears ``plan`` in weight profile ``profile``."""
        if profile.scale_format != "e8m0" or profile.block_size != GROUP_SIZE:
            raise ValueError(
                f"quant.weight_profile {profile.name!r} is not MXFP4, the 4-bit format of the NPU; "
                "train with 'ascend950', or use --format compressed-tensors"
            )
        check_shards(plan, K_MULTIPLE, self.tensor_parallel, "vllm-ascend needs")

    def tensors(self, core: PackedCore, name: str, value: Value) -> dict[str, torch.Tensor]:
        """Packed weight and scale; bias of a quantised linear in fp32; else as it is."""
        if isinstance(value, QuantizedTensor):
            return {name: value.packed, f"{name}_scale": value.scales}
        path, _, kind = name.rpartition(".")
        if kind == INPUT_SCALE:
            return {}
        if kind == "bias" and path in core.quantized:
            return {name: value.float()}
        return {name: value}

    def activations(self, recipe: Recipe) -> Activations:
        """The NPU's own rule in W4A4 (npu_dynamic_mx_quant, round mode "round")."""
        served = "ascend950" if self.scheme == "W4A4_MXFP4" else "fp8 e4m3 in blocks of 32"
        return Activations(trained_activations(recipe), served)

    def sign(
        self, folder: Path, core: PackedCore, config: dict[str, Any], owner: Mapping[str, str]
    ) -> dict[str, Any]:
        """Write the description; a tied lm_head is listed and has no tensor."""
        weights = {f"{path}.weight" for path in core.quantized}
        types = {
            stored: self.scheme if entry in weights else FLOAT for stored, entry in owner.items()
        }
        types |= dict.fromkeys(sorted(tied_names(core.checkpoint.model)), FLOAT)
        description = {
            **types,
            "version": VERSION,
            "model_quant_type": self.scheme,
            "metadata": {},
            "group_size": GROUP_SIZE,
            "optional": {},
        }
        (folder / ASCEND_SIGNATURE).write_text(json.dumps(description, indent=4) + "\n")
        return config
