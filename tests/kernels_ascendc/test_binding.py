"""The operators of the binding, run on CPU tensors: dispatch, shapes, gradients, messages.

`binding/ops.cpp` is compiled with its dispatch keys turned from the NPU's into the CPU's, with
three small headers in the place of torch_npu's, and with launches that run on the host model.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from npu_qat import numerics
from npu_qat.backends.ascendc import AscendcBackend
from npu_qat.backends.ascendc.rules import kernel_rule
from tests.adversarial import ordinary
from tests.kernels_ascendc.host_model import KERNELS
from tests.numerics.compare import rms_norm, same

pytestmark = pytest.mark.slow  # compiles against torch's headers

HEADERS = {
    "acl/acl_rt.h": """
#pragma once
#include <cstdint>
constexpr int ACL_SUCCESS = 0, ACL_DEV_ATTR_VECTOR_CORE_NUM = 0;
inline int aclrtGetDevice(int32_t *device) { *device = 0; return ACL_SUCCESS; }
inline int aclrtGetDeviceInfo(int32_t, int, int64_t *value) { *value = 5; return ACL_SUCCESS; }
""",
    "torch_npu/csrc/core/npu/NPUStream.h": """
#pragma once
namespace c10_npu {
struct NPUStream { void *stream(bool) const { return nullptr; } };
inline NPUStream getCurrentNPUStream() { return {}; }
}
""",
    "torch_npu/csrc/framework/OpCommand.h": """
#pragma once
namespace at_npu::native {
struct OpCommand {
    template <typename F> static void RunOpApiV2(const char *, F f) { f(); }
};
}
""",
}
LAUNCHES = """
#define LAUNCHES(s) \\
    void launch_mxfp4_fake_quant_##s(uint32_t cores, void *, uint8_t *x, uint8_t *y, \\
                                     const npu_qat::Mxfp4Tiling &t) { \\
        npu_qat_host::Launch(cores, [&] { mxfp4_fake_quant_##s(x, y, t); }); } \\
    void launch_mxfp4_pack_##s(uint32_t cores, void *, uint8_t *x, uint8_t *c, uint8_t *b, \\
                               const npu_qat::Mxfp4Tiling &t) { \\
        npu_qat_host::Launch(cores, [&] { mxfp4_pack_##s(x, c, b, t); }); }
#define LAUNCHES_16(s) \\
    void launch_mxfp4_dequant_##s(uint32_t cores, void *, uint8_t *c, uint8_t *b, uint8_t *y, \\
                                  const npu_qat::Mxfp4Tiling &t) { \\
        npu_qat_host::Launch(cores, [&] { mxfp4_dequant_##s(c, b, y, t); }); } \\
    void launch_rms_norm_mxfp4_fake_quant_##s(uint32_t cores, void *, uint8_t *x, uint8_t *g, \\
            uint8_t *y, uint8_t *q, const npu_qat::Mxfp4Tiling &t, float e) { \\
        npu_qat_host::Launch(cores, [&] { rms_norm_mxfp4_fake_quant_##s(x, g, y, q, t, e); }); }
#include "npu_qat/launch.h"
#include "../src/entries.h"
LAUNCHES(bf16) LAUNCHES(fp16) LAUNCHES(fp32) LAUNCHES_16(bf16) LAUNCHES_16(fp16)
"""
PROFILE = "ascend950"


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler (g++ or clang++)")
    folder = tmp_path_factory.mktemp("binding")
    for name, text in HEADERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    binding = (KERNELS / "binding" / "ops.cpp").read_text()
    assert binding.count("PrivateUse1, m") == 2
    (folder / "ops.cpp").write_text(binding.replace("PrivateUse1, m", "CPU, m"))
    (folder / "launches.cpp").write_text(LAUNCHES)
    torch_home = Path(torch.__file__).parent
    include = [folder, KERNELS / "include", KERNELS / "host", torch_home / "include"]
    include.append(torch_home / "include/torch/csrc/api/include")
    command = [compiler, "-std=c++20", "-O0", "-ffp-contract=off", "-shared", "-fPIC"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    command += [f"-I{path}" for path in include]
    command += [str(folder / "ops.cpp"), str(folder / "launches.cpp")]
    command += ["-o", str(folder / "ops.so"), f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=KERNELS / "binding")
    assert done.returncode == 0, done.stderr[-3000:]
    torch.ops.load_library(str(folder / "ops.so"))
    return torch.ops.npu_qat


def rule() -> list[int]:
    known = kernel_rule(PROFILE)
    return [known.bump, known.nan_above, known.tiny_scale, known.nudge]


def test_the_backend_on_these_operators_computes_what_numerics_does(ops):
    backend = AscendcBackend(ops, "ops.so")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = ordinary((3, 5, 70), dtype)
        assert same(backend.fake_quant(x, PROFILE), numerics.fake_quant(x, PROFILE))
        q, expected = backend.quantize(x, PROFILE), numerics.quantize(x, PROFILE)
        assert same(q.codes, expected.codes) and same(q.scales, expected.scales)
        turned = x.transpose(0, 1)  # not contiguous
        assert same(backend.fake_quant(turned, PROFILE), numerics.fake_quant(turned, PROFILE))


def test_dequant_of_what_was_packed(ops):
    x = ordinary((4, 2, 33), torch.bfloat16)
    codes, scales = ops.mxfp4_pack(x, rule())
    values = ops.mxfp4_dequant(codes, scales, 33, torch.bfloat16)
    assert same(values, numerics.fake_quant(x, PROFILE))


def test_the_gradient_goes_straight_through(ops):
    x = ordinary((4, 64), torch.bfloat16).requires_grad_()
    grad = ordinary((4, 64), torch.bfloat16, seed=1)
    ops.mxfp4_fake_quant(x, rule()).backward(grad)
    assert same(x.grad, grad)


@pytest.mark.parametrize("through", [(0,), (1,), (0, 1)], ids=["y", "q", "both"])
def test_the_gradient_of_the_norm(ops, through):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 96, generator=generator)
    weight = 1 + 0.1 * torch.randn(96, generator=generator)
    upstream = torch.randn(2, 6, 96, generator=generator).bfloat16()
    x, gamma = (t.bfloat16().requires_grad_() for t in (values, weight))
    outputs = ops.rms_norm_mxfp4_fake_quant(x, gamma, 1e-6, rule())
    sum((upstream[i] * outputs[i]).float().sum() for i in through).backward()
    wide, wide_gamma = (t.detach().double().requires_grad_() for t in (x, gamma))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * wide_gamma
    (upstream[list(through)].double().sum(0) * normed).sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0.02, atol=0.02)
    torch.testing.assert_close(gamma.grad.double(), wide_gamma.grad, rtol=0.02, atol=0.02)


def test_shapes_without_data(ops):
    x = torch.empty(3, 33, dtype=torch.bfloat16, device="meta")
    codes, scales = ops.mxfp4_pack(x, rule())
    assert codes.shape == (3, 17) and scales.shape == (3, 2) and codes.device.type == "meta"
    assert ops.mxfp4_dequant(codes, scales, 33, torch.float16).shape == (3, 33)
    gamma = torch.empty(33, dtype=torch.bfloat16, device="meta")
    y, q = ops.rms_norm_mxfp4_fake_quant(x, gamma, 1e-6, rule())
    assert y.shape == q.shape == x.shape


def test_an_empty_tensor(ops):
    assert ops.mxfp4_fake_quant(torch.empty(0, 32), rule()).shape == (0, 32)
    assert ops.mxfp4_fake_quant(torch.empty(4, 0), rule()).shape == (4, 0)


def test_wrong_arguments_are_named(ops):
    with pytest.raises(RuntimeError, match="must be bf16, fp16 or fp32"):
        ops.mxfp4_fake_quant(torch.ones(2, 32, dtype=torch.int32), rule())
    with pytest.raises(RuntimeError, match="a rule has 4 numbers"):
        ops.mxfp4_fake_quant(torch.ones(2, 32), [1, 2])
    with pytest.raises(RuntimeError, match="17 bytes of codes"):
        ops.mxfp4_dequant(
            torch.zeros(2, 16, dtype=torch.uint8),
            torch.zeros(2, 2, dtype=torch.uint8),
            33,
            torch.bfloat16,
        )
    with pytest.raises(RuntimeError, match="rows of at most 8192"):
        x = torch.ones(1, 8224, dtype=torch.bfloat16)
        ops.rms_norm_mxfp4_fake_quant(x, x[0], 1e-6, rule())


def test_the_norm_is_that_of_the_reference(ops):
    x, gamma = ordinary((4, 64), torch.float16), ordinary((64,), torch.float16, seed=2)
    y, q = ops.rms_norm_mxfp4_fake_quant(x, gamma, 1e-5, rule())
    torch.testing.assert_close(y, rms_norm(x, gamma, 1e-5), rtol=2e-3, atol=1e-6)
    assert same(q, numerics.fake_quant(y, PROFILE))
