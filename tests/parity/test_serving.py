"""The serving path: what it takes from the files, and who multiplies on a device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from npu_qat.backends import EmulationBackend, FusedBackend
from npu_qat.backends.base import EncodedInput, PackedWeight
from npu_qat.deploy.reader import open_export
from npu_qat.numerics import QuantizedTensor, dequantize, fake_quant, quantize
from npu_qat.parity.serving import computing, open_served, served_activations
from tests.deploy.models import NVFP4, W4A16, damage, export_tiny, save_adapter


def test_a_linear_computes_from_the_stored_bytes_alone(tmp_path: Path) -> None:
    folder = export_tiny(tmp_path).folder
    served = open_served(folder)
    path = "model.layers.0.self_attn.q_proj"
    entries = dict(open_export(folder).entries())
    weight, bias = entries[f"{path}.weight"], entries[f"{path}.bias"]
    assert isinstance(weight, QuantizedTensor) and isinstance(bias, torch.Tensor)
    x = torch.randn(2, 5, 64).bfloat16()
    expected = F.linear(
        fake_quant(x, "ascend950"), dequantize(weight, torch.bfloat16), bias.bfloat16()
    )
    assert torch.equal(served.layers[path](x), expected)
    with computing(served, "16 bits", adapter=True):
        plain = F.linear(x, dequantize(weight, torch.bfloat16), bias.bfloat16())
        assert torch.equal(served.layers[path](x), plain)
    assert torch.equal(served.layers[path](x), expected)


@pytest.mark.parametrize(
    ("format", "recipe", "found"),
    [
        ("ascend", None, "ascend950"),
        ("compressed-tensors", None, "compressed-tensors"),
        ("compressed-tensors", W4A16, "16 bits"),
        ("compressed-tensors", NVFP4, "16 bits"),
    ],
)
def test_activations_are_read_from_the_files(
    tmp_path: Path, format: str, recipe: Any, found: str
) -> None:
    assert served_activations(export_tiny(tmp_path, format, recipe).folder) == found


def test_eight_bit_activations_are_named_and_not_imitated(tmp_path: Path) -> None:
    folder = export_tiny(tmp_path).folder
    file = folder / "quant_model_description.json"
    file.write_text(json.dumps(json.loads(file.read_text().replace("W4A4_MXFP4", "W4A8_MXFP"))))
    served = open_served(folder)
    assert served.activations == "fp8 e4m3 in blocks of 32"
    with pytest.raises(ValueError, match="are not emulated"):
        served.layers["model.layers.0.mlp.up_proj"](torch.ones(1, 64).bfloat16())


def test_the_adapter_is_applied_and_can_be_left_out(tmp_path: Path) -> None:
    folder = export_tiny(tmp_path).folder
    adapter = save_adapter(tmp_path / "lora", size=0.3)
    ids = torch.arange(9)[None]
    base, adapted = open_served(folder), open_served(folder, adapter=adapter)
    with torch.no_grad():
        expected = base.model(ids).logits
        assert not torch.equal(adapted.model(ids).logits, expected)
        with computing(adapted, None, adapter=False):
            assert torch.equal(adapted.model(ids).logits, expected)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = export_tiny(tmp_path).folder
    damage(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"has no tensor model\.norm\.weight"):
        open_served(folder)


@dataclass
class Device(EmulationBackend):
    """A device that multiplies codes, in fp64, and counts how often."""

    calls: int = 0

    def check_fused(self, *arguments: Any) -> None: ...

    def encode_input(self, x: torch.Tensor, profile: str) -> EncodedInput:
        q = quantize(x, profile)
        return EncodedInput(q.codes, q.scales, x.shape, x.dtype, profile)

    def decode_input(self, encoded: EncodedInput) -> torch.Tensor:
        raise NotImplementedError

    def prepare_weight(self, weight: PackedWeight) -> torch.Tensor:
        return dequantize(weight.unpack()).double()

    def fused_linear(
        self, x: EncodedInput, weight: Any, bias: Any = None, out_dtype: Any = None
    ) -> torch.Tensor:
        self.calls += 1
        q = QuantizedTensor.from_packed(
            QuantizedTensor(
                x.codes, x.scales, quantize(torch.ones(1), x.profile).profile, 1
            ).packed,
            x.scales,
            shape=tuple(x.shape),
            profile=x.profile,
        )
        assert bias is None or bias.dtype == torch.float32
        y = F.linear(dequantize(q).double(), weight)
        return (y if bias is None else y + bias.double()).to(out_dtype)


def test_a_device_that_multiplies_codes_is_asked_to(tmp_path: Path) -> None:
    folder, device = export_tiny(tmp_path).folder, Device()
    assert isinstance(device, FusedBackend)
    fused, emulated = open_served(folder, backend=device), open_served(folder)
    x = torch.randn(7, 64).bfloat16()

    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj"):
        a, b = (model.layers[path](x).float() for model in (fused, emulated))
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)
    assert device.calls == 2
