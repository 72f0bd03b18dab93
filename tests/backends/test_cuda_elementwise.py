"""The CUDA kernels give the bytes of ``numerics``: on a GPU, or interpreted on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the CUDA backend needs Triton")
from npu_qat.backends.base import PackedWeight
from npu_qat.backends.cuda import elementwise
from npu_qat.layers.rotation import INPUT_FACTOR, rotate_input
from npu_qat.numerics import PROFILES, Profile, dequantize, fake_quant, quantize
from npu_qat.numerics.scales import largest_finite, nvfp4_tensor_scale
from tests import adversarial
from tests.backends.kernels import DEVICE, INTERPRETED, needs_kernels
from tests.numerics.compare import bits

pytestmark = needs_kernels
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
# What the interpreter has time for: one profile of each rule and each rounding.
QUICK = [
    "ocp",
    "ocp-rceil",
    "ascend950",
    "ascend950-floor",
    "ascend950-mse",
    "ascend950-dual",
    "compressed-tensors",
    "torchao-rceil",
    "msmodelslim-weight",
    "fork-nvfp4-column",
    "quant-compute-mxfp4",
    "quant-compute-nvf4",
    "nvfp4",
]


def check(
    x: Tensor, profile: Profile, axis: int | None = None, *, packed: bool = True, scales: int = 4
) -> None:
    """All four kernels on ``x`` against the reference on a CPU, under several tensor scales."""
    if axis is None:
        axis = -1 if profile.forced_axis is None else profile.forced_axis
    axis %= x.dim()
    if profile.nan == "error":
        x = torch.where(x.isfinite(), x, 0.0)
    tensor_scales: list[Tensor | None] = [None]
    if profile.tensor_scale:
        own = nvfp4_tensor_scale(largest_finite(x))
        tensor_scales = [own, torch.tensor(0.0012345), torch.tensor(3e-33), torch.tensor(1.7e30)]
    for scale in tensor_scales[:scales]:
        there = x.to(DEVICE)
        if not x.is_contiguous():  # .to() keeps strides of dense tensors only
            there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
            there.copy_(x)
        scale_there = None if scale is None else scale.to(DEVICE)
        want = fake_quant(x, profile, axis, tensor_scale=scale)
        got = elementwise.fake_quant(there, profile, axis, scale_there)
        assert torch.equal(bits(got.cpu()), bits(want))
        q = quantize(x, profile, axis, tensor_scale=scale)
        for pack in (True, False) if packed else (False,):
            codes, scale_bytes, level0 = elementwise.quantize(
                there, profile, axis, scale_there, pack=pack
            )
            assert torch.equal(scale_bytes.cpu(), q.scales)
            assert torch.equal(codes.cpu(), q.packed if pack else q.codes)
            value = elementwise.dequantize(
                codes,
                scale_bytes,
                tuple(x.shape),
                profile,
                axis,
                x.dtype,
                scale_there,
                level0,
                packed=pack,
            )
            assert torch.equal(bits(value.cpu()), bits(dequantize(q, x.dtype)))


def each(names: list[str]) -> list[tuple[str, torch.dtype]]:
    """Every name with one dtype, bf16 with those of most use."""
    return [(name, FLOATS[i % 3] if i > 3 else FLOATS[0]) for i, name in enumerate(names)]


@pytest.mark.parametrize(("name", "dtype"), each(QUICK), ids=str)
@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU, which runs more than this")
def test_interpreted_kernels_give_the_reference_bytes(name: str, dtype: torch.dtype) -> None:
    profile = PROFILES[name]
    check(adversarial.anything(dtype, (9, 64)), profile, scales=1)
    if profile.forced_axis is None:
        check(adversarial.anything(dtype, (6, 37, 3)), profile, 1, scales=1, packed=False)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", PROFILES)
class TestOnGpu:
    def test_every_layout(self, name: str, dtype: torch.dtype) -> None:
        profile = PROFILES[name]
        x = adversarial.anything(dtype, (96, 544))
        check(x, profile)
        check(x[:, :401], profile)  # a tail, and rows further apart than they are long
        if profile.forced_axis is None:
            check(x.t(), profile)
            check(x.view(3, 32, 544)[:, :31].contiguous(), profile, 1)

    def test_a_rotation_first(self, name: str, dtype: torch.dtype) -> None:
        profile = PROFILES[name]
        if profile.level0_block or profile.forced_axis == -2 or profile.nan == "error":
            pytest.skip("not defined for this profile")
        x = torch.randn(64, 544, generator=torch.Generator().manual_seed(0)).to(dtype)
        scale = torch.tensor(0.01) if profile.tensor_scale else None
        want = fake_quant(rotate_input(x), profile, tensor_scale=scale)
        scale = None if scale is None else scale.to(DEVICE)
        got = elementwise.fake_quant(x.to(DEVICE), profile, 1, scale, rotation=INPUT_FACTOR)
        assert torch.equal(bits(got.cpu()), bits(want))

    def test_every_pattern(self, name: str, dtype: torch.dtype) -> None:
        profile = PROFILES[name]
        if dtype == torch.float32:
            x = adversarial.fp32_blocks(profile.block_size)
        else:
            x = adversarial.patterns_under_maxima(dtype, profile.block_size)
        check(x.unsqueeze(-1) if profile.forced_axis == -2 else x, profile, packed=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_under_every_scale(dtype: torch.dtype) -> None:
    """Two codes and a scale are 2^16 cases; bf16 has a kernel of its own on a GPU."""
    weight = PackedWeight(*adversarial.every_code_and_scale(), (256, 512), "ocp")
    found = elementwise.dequantize(
        weight.packed.to(DEVICE),
        weight.scales.to(DEVICE),
        (256, 512),
        PROFILES["ocp"],
        1,
        dtype,
        packed=True,
    )
    assert torch.equal(bits(found.cpu()), bits(dequantize(weight.unpack(), dtype)))
