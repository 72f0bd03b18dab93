"""The same bytes under another type string: 4-bit weights with 8-bit activations."""

from __future__ import annotations

from pathlib import Path

import torch

from npu_qat.deploy import AscendWriter
from npu_qat.deploy.export import export
from tests.contract_vllm.stack import poisoned, serve
from tests.contract_vllm.training_side import difficult, engine_module, part_sizes, trained
from tests.deploy.models import core_of, save


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] rounded to E4M3 in blocks of 32, fp32; written apart from the kernel."""
    blocks = x.double().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(amax.clamp(min=2.0**-119))) - 8)
    elements = (blocks / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return (elements.double() * scale).flatten(-2).float()


def test_the_export_is_served_with_the_weights_of_training(tmp_path: Path) -> None:
    source = save(tmp_path / "source", intermediate_size=320)
    writer = AscendWriter("W4A8_MXFP")
    exported = export(core_of(source), writer, tmp_path / "served", any_activations=True)
    served, training = serve(exported.folder), trained(source)
    assert poisoned(served) == []
    compared = 0
    for path, layer in training.layers.items():
        module_path, part = engine_module(path)
        scheme = served.module(module_path).quant_method.quant_method
        assert type(scheme).__name__ == "AscendW4A8MXFPDynamicLinearMethod"
        x = difficult(16, layer.in_features)
        found = served.linear(module_path, x).split(part_sizes(training.model, path), -1)[part]
        exact = to_fp8(x) @ layer.weight.float().t()
        if layer.bias is not None:
            exact = exact + layer.bias.float()
        # One ulp of bf16: the sums of 8-bit elements depend on their order.
        torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=2**-100)
        compared += 1
    assert compared == 14
