"""The AscendC kernels on the host model give the bytes of `numerics`, for every input."""

from __future__ import annotations

import pytest
import torch

from npu_qat import numerics
from npu_qat.backends import BackendUnavailable
from npu_qat.backends.ascendc.rules import kernel_profiles, kernel_rule
from tests import adversarial
from tests.adversarial import ordinary
from tests.kernels_ascendc.host_model import HostKernels
from tests.numerics.compare import rms_norm, same, ulps

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROFILES = kernel_profiles()
# Whole blocks, odd tails, rows shorter than a block, more than one tile, one value.
SHAPES = ((4, 1536), (5, 33), (3, 31), (7, 1), (1, 20000), (2, 8197), (1, 32), (64,))


def check(kernels: HostKernels, x: torch.Tensor, profile: str) -> None:
    q = numerics.quantize(x, profile)
    assert same(kernels.fake_quant(x, profile), numerics.fake_quant(x, profile))
    codes, scales = kernels.pack(x, profile)
    assert same(codes, q.packed) and same(scales, q.scales)
    if x.dtype != torch.float32:
        values = kernels.dequant(codes, scales, x.shape[-1], x.dtype)
        assert same(values, numerics.dequantize(q, x.dtype))


def test_they_compute_the_profile_of_the_950():
    assert {"ascend950", "ascend950-rint", "ocp-even"} <= set(PROFILES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("profile", PROFILES)
def test_ordinary_numbers_of_all_shapes(kernels, profile, dtype):
    for shape in SHAPES:
        check(kernels, ordinary(shape, dtype), profile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("profile", PROFILES)
def test_ties_and_special_values(kernels, profile, dtype):
    check(kernels, adversarial.ties(dtype), profile)
    check(kernels, adversarial.special(dtype), profile)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_bf16_pattern_as_maximum_and_as_element(kernels, profile):
    fractions = [k / 32 * (-1) ** (k + 1) for k in range(1, 32)]
    check(kernels, adversarial.patterns_as_maximum(torch.bfloat16, fractions), profile)
    check(kernels, adversarial.patterns_anywhere_under_maxima(), profile)
    check(kernels, adversarial.patterns_under_maxima(torch.bfloat16, 32), profile)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_fp32_exponent_on_and_beside_ties(kernels, profile):
    check(kernels, adversarial.fp32_blocks(32), profile)


@pytest.mark.parametrize("profile", PROFILES)
def test_random_float_patterns(kernels, profile):
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (64, 1024), generator=generator, dtype=torch.int64)
    check(kernels, bits.to(torch.int32).view(torch.float32), profile)
    # All exponents alike, so that blocks are not ruled by one huge number.
    near_one = (bits.to(torch.int32) & -0x7F800001) | 0x3F800000
    check(kernels, near_one.view(torch.float32) * torch.rand(64, 1024), profile)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_code_under_every_scale_is_decoded(kernels, dtype):
    codes, scales = adversarial.every_code_and_scale()
    q = numerics.QuantizedTensor.from_packed(
        codes, scales, shape=(256, 512), profile=numerics.get_profile("ocp"), axis=-1
    )
    assert same(kernels.dequant(codes, scales, 512, dtype), numerics.dequantize(q, dtype))


@pytest.mark.parametrize("cores", [1, 2, 40, 1000])
def test_the_number_of_cores_does_not_matter(library, cores):
    kernels = HostKernels(library, cores)
    for shape in ((4, 1536), (5, 33), (1, 20000), (300, 3)):
        check(kernels, ordinary(shape, torch.bfloat16), "ascend950")


def test_a_large_tensor(kernels):
    check(kernels, ordinary((512, 8960), torch.bfloat16), "ascend950")


# --- RMSNorm --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("length", [32, 100, 896, 1536, 8192])
def test_norm_within_an_ulp_and_its_codes_exact(kernels, length, dtype):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(9, length, generator=generator).to(dtype)
    x[3] *= 100
    x[4] = 0
    gamma = (1 + 0.3 * torch.randn(length, generator=generator)).to(dtype)
    y, q = kernels.rms_norm_fake_quant(x, gamma, 1e-6, "ascend950")
    assert ulps(y, rms_norm(x, gamma, 1e-6)) <= 1
    assert same(q, numerics.fake_quant(y, "ascend950"))


def test_norm_does_not_depend_on_the_cores(library):
    x = ordinary((50, 896), torch.bfloat16)
    gamma = ordinary((896,), torch.bfloat16, seed=1)
    results = [
        HostKernels(library, cores).rms_norm_fake_quant(x, gamma, 1e-5, "ascend950")
        for cores in (1, 7, 40)
    ]
    for y, q in results[1:]:
        assert same(y, results[0][0]) and same(q, results[0][1])


# --- which profiles -------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["nvfp4", "ascend950-alg2", "ascend950-dual", "ascend950-mse"])
def test_other_profiles_are_refused_and_the_message_lists_what_there_is(profile):
    with pytest.raises(BackendUnavailable, match="ascend950-rint"):
        kernel_rule(profile)
