"""Fake-quantisers of other libraries by their public interfaces, as far as they are installed.

Nothing is installed for this; a peer that is absent is named and left out. They do unequal work:
those that make packed bytes are asked to decode them again, so that every one maps a bf16 tensor to
a bf16 tensor of MXFP4 numbers (NVFP4 where the name says so) along the last axis.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Quantizer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FakeQuantizer:
    """A peer's quantise-and-dequantise of a 16-bit tensor along its last axis."""

    name: str
    call: Quantizer


def fake_quantizers(note: Callable[[str], None]) -> Iterator[FakeQuantizer]:
    """The installed ones; ``note`` hears why another is left out."""
    for name, make in PEERS.items():
        try:
            yield FakeQuantizer(name, make())
        except (ImportError, AttributeError) as error:
            note(f"{name}: left out, {str(error).splitlines()[0]}")


def _torchao() -> Quantizer:
    mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")

    def call(x: torch.Tensor) -> torch.Tensor:
        made = mx.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, block_size=32)
        result: torch.Tensor = made.dequantize(x.dtype)
        return result

    return call


def _microxcaling() -> Quantizer:
    mx = importlib.import_module("mx.mx_ops")
    specs = importlib.import_module("mx.specs").MxSpecs()
    options = {"scale_bits": 8, "w_elem_format": "fp4_e2m1", "block_size": 32, "round": "even"}
    for key, value in options.items():
        specs[key] = value

    def call(x: torch.Tensor) -> torch.Tensor:
        # In bf16 its logarithm picks wrong scales; fp32 makes it exact.
        made = mx.quantize_mx_op(x.float(), specs, elem_format="fp4_e2m1", axes=[-1], round="even")
        result: torch.Tensor = made.to(x.dtype)
        return result

    return call


def _compressed_tensors() -> Quantizer:
    quantization = importlib.import_module("compressed_tensors.quantization")
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    helpers = importlib.import_module("compressed_tensors.quantization.utils")
    arguments = quantization.QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        symmetric=True,
        dynamic=True,
        scale_dtype=torch.uint8,
    )

    def call(x: torch.Tensor) -> torch.Tensor:
        scale, zero_point = helpers.compute_dynamic_scales_and_zp(x, arguments, torch.nn.Module())
        result: torch.Tensor = forward.fake_quantize(x, scale, zero_point, arguments)
        return result

    return call


def _modelopt() -> Quantizer:
    tensors = importlib.import_module("modelopt.torch.quantization.qtensor.mxfp4_tensor")

    def call(x: torch.Tensor) -> torch.Tensor:
        made, scales = tensors.MXFP4QTensor.quantize(x, 32)
        result: torch.Tensor = made.dequantize(dtype=x.dtype, scale=scales, block_sizes=[32])
        return result

    return call


PEERS: dict[str, Callable[[], Any]] = {
    "torchao": _torchao,
    "microxcaling": _microxcaling,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
}
