"""The twin through code that is not ours: transformers with the compressed-tensors library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from npu_qat.config import Recipe
from npu_qat.deploy import open_export
from npu_qat.deploy.core import divisor
from npu_qat.numerics import QuantizedTensor, dequantize, e2m1
from tests.deploy.models import NVFP4, W4A16, export_tiny

pytestmark = pytest.mark.contract
# Widths that are multiples of the block and of nothing larger, an odd vocabulary.
ODD = {
    "hidden_size": 160,
    "intermediate_size": 224,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "vocab_size": 131,
}


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip(
        "compressed_tensors", reason="needs the compressed-tensors package (the parity extra)"
    )


def load(folder: Path) -> Any:
    """The model as transformers decodes it."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = CompressedTensorsConfig(run_compressed=False)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16
    )


def values_of_reader(q: QuantizedTensor) -> torch.Tensor:
    """What the library makes of NVFP4: element * (block scale / divisor), in this order."""
    assert q.tensor_scale is not None
    scales = q.scales.view(torch.float8_e4m3fn).float() / divisor(q.tensor_scale)
    return e2m1.values_from_codes(q.codes) * scales.repeat_interleave(16, -1)


@pytest.mark.parametrize(
    "shape",
    [{"family": "qwen2"}, {"family": "qwen3"}, {"family": "llama"}, ODD],
    ids=["qwen2", "qwen3", "llama", "odd"],
)
@pytest.mark.parametrize("recipe", [Recipe(), W4A16, NVFP4], ids=["w4a4", "w4a16", "nvfp4"])
def test_the_library_decodes_our_weights_bit_for_bit(
    tmp_path: Path, shape: dict[str, Any], recipe: Recipe
) -> None:
    exported = export_tiny(tmp_path, "compressed-tensors", recipe, **shape)
    model = load(exported.folder)
    state = model.state_dict()
    compared = 0
    for name, value in open_export(exported.folder).entries():
        ours = value
        if isinstance(value, QuantizedTensor):
            compared += 1
            ours = dequantize(value, torch.bfloat16)
            if recipe is NVFP4:
                # Both orders of the two products are right to the last bit of bf16.
                torch.testing.assert_close(state[name], ours, rtol=2**-7, atol=0)
                ours = values_of_reader(value).bfloat16()
        assert torch.equal(state[name].view(torch.int16), ours.view(torch.int16)), name
    assert compared == 14
    assert model(torch.arange(8)[None]).logits.isfinite().all()
