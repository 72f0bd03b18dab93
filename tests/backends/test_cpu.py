"""The compiled CPU kernels equal the reference bit for bit, in every profile and dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba", reason="the compiled CPU backend needs numba")

from npu_qat import numerics
from npu_qat.backends import BackendUnavailable, select
from npu_qat.backends.base import PackedWeight
from npu_qat.backends.cpu import CpuBackend
from npu_qat.numerics import get_profile, profile_names
from tests import adversarial
from tests.numerics.compare import DTYPES, bits

BACKEND = CpuBackend()


def assert_as_reference(x: Tensor, name: str, axis: int = -1, scale: float | None = None) -> None:
    """Numbers, codes, scale bytes and both decodings of ``x`` equal the reference's."""
    if get_profile(name).nan == "error":
        x = torch.where(x.isfinite(), x, 0.0)
    forced = get_profile(name).forced_axis
    if forced == -2 and axis == -1:
        x, axis = x.unsqueeze(-1), -2
    elif forced is not None and forced != axis:
        pytest.skip(f"{name} has its blocks along axis {forced}")
    tensor_scale = None if scale is None else torch.tensor(scale)
    q = BACKEND.quantize(x, name, axis, tensor_scale=tensor_scale)
    want = numerics.quantize(x, name, axis, tensor_scale=tensor_scale)
    assert torch.equal(q.scales, want.scales)
    assert torch.equal(q.codes, want.codes)
    assert (q.axis, q.profile, q.shape) == (want.axis, want.profile, want.shape)
    for made, expected in (
        (q.tensor_scale, want.tensor_scale),
        (q.level0_scales, want.level0_scales),
    ):
        assert (made is None) == (expected is None)
        assert made is None or torch.equal(made, expected)
    fake = BACKEND.fake_quant(x, name, axis, tensor_scale=tensor_scale)
    assert_same(fake, numerics.fake_quant(x, name, axis, tensor_scale=tensor_scale))
    for dtype in (x.dtype, torch.float32):
        assert_same(BACKEND.dequantize(want, dtype), numerics.dequantize(want, dtype))
    bare = numerics.dequantize(want, x.dtype, apply_tensor_scale=False)
    assert_same(BACKEND.dequantize(want, x.dtype, apply_tensor_scale=False), bare)
    if tensor_scale is not None:
        given = {"tensor_scale": tensor_scale, "apply_tensor_scale": False}
        assert_same(BACKEND.fake_quant(x, name, axis, **given), bare)


def assert_same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
    assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", profile_names())
def test_every_16_bit_pattern_as_maximum_and_as_element(name: str, dtype: str) -> None:
    block = get_profile(name).block_size
    for scale in adversarial.TENSOR_SCALES.get(name, (None,)):
        assert_as_reference(adversarial.patterns_as_maximum(DTYPES[dtype]), name, scale=scale)
        x = adversarial.patterns_under_maxima(DTYPES[dtype], block)
        assert_as_reference(x, name, scale=scale)


@pytest.mark.parametrize("name", profile_names())
def test_fp32_on_and_beside_ties_and_random_bits(name: str) -> None:
    for x in (adversarial.fp32_sweep(), *adversarial.fp32_random_bits()):
        for scale in adversarial.TENSOR_SCALES.get(name, (None,)):
            assert_as_reference(x, name, scale=scale)
            assert_as_reference(x[:, :40], name, scale=scale)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(1,), (33,), (5, 31), (3, 4, 2049), (2, 4096), (70, 1536 + 8)])
@pytest.mark.parametrize("name", profile_names())
def test_odd_shapes_and_both_axes(name: str, shape: tuple[int, ...], dtype: str) -> None:
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 3).to(DTYPES[dtype])
    assert_as_reference(x, name)
    if len(shape) > 1 and get_profile(name).forced_axis in (None, -2):
        assert_as_reference(x, name, axis=-2)


def test_several_threads_make_the_same_bits() -> None:
    x = torch.randn(257, 1536, generator=torch.Generator().manual_seed(4)).bfloat16()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name in ("ascend950", "nvfp4", "ascend950-dual"):
                assert_as_reference(x, name)
    finally:
        torch.set_num_threads(before)


def test_memory_layout_does_not_matter() -> None:
    x = torch.randn(64, 96).bfloat16()
    for view in (x.t(), x[::2], x[:, 3:70], x.expand(2, 64, 96)):
        assert_as_reference(view, "ascend950")


def test_nothing_is_written_beyond_the_tensor() -> None:
    room = torch.full((4, 100), 7.0)
    x = torch.randn(4, 100)
    kept = x.clone()
    BACKEND.fake_quant(x, "ascend950")
    BACKEND.quantize(room, "nvfp4")
    assert torch.equal(x, kept) and torch.equal(room, torch.full((4, 100), 7.0))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(48, 96), (33, 65), (64, 2080)])
@pytest.mark.parametrize("name", ["ascend950", "ocp-even", "nvfp4", "quant-compute-nvf4"])
def test_packed_bytes_decode_as_their_codes(name: str, shape: tuple[int, int], axis: int) -> None:
    q = numerics.quantize(torch.randn(*shape), name, axis)
    for apply in (True, False):
        made = BACKEND.dequantize(PackedWeight.of(q), torch.bfloat16, apply_tensor_scale=apply)
        assert_same(made, numerics.dequantize(q, torch.bfloat16, apply_tensor_scale=apply))


def test_a_packed_dual_level_weight_decodes() -> None:
    for columns in (512, 600, 1024, 100):
        q = numerics.quantize(torch.randn(8, columns).bfloat16(), "ascend950-dual")
        made = BACKEND.dequantize(PackedWeight.of(q), torch.float32)
        assert_same(made, numerics.dequantize(q, torch.float32))


def test_linear_reads_packed_weights() -> None:
    weight = numerics.quantize(torch.randn(48, 64).bfloat16(), "ascend950")
    x, bias = torch.randn(5, 64).bfloat16(), torch.randn(48).bfloat16()
    want = torch.nn.functional.linear(x, numerics.dequantize(weight, x.dtype), bias)
    assert torch.equal(BACKEND.linear(x, PackedWeight.of(weight), bias), want)
    wide = BACKEND.linear(x, PackedWeight.of(weight), bias, out_dtype=torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide, want.float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BACKEND.fake_quant(torch.ones(4), "mxfp4"), "unknown numerics profile"),
        (lambda: BACKEND.fake_quant(torch.ones(4).double(), "ocp"), "float64"),
        (lambda: BACKEND.fake_quant(torch.tensor(1.0), "ocp"), "0-dimensional"),
        (lambda: BACKEND.fake_quant(torch.ones(4, 4), "ocp", 2), "axis 2 does not exist"),
        (lambda: BACKEND.fake_quant(torch.ones(4, 4), "fork-mxfp4", 0), "axis -1 only"),
        (lambda: BACKEND.quantize(torch.ones(4, 4), "fork-nvfp4-column"), "axis -2 only"),
        (lambda: BACKEND.quantize(torch.tensor([1.0, torch.nan]), "ascend950-mse"), "NaN or Inf"),
        (lambda: BACKEND.fake_quant(torch.ones(4), "ocp", tensor_scale=torch.ones(())), "leave"),
        (lambda: BACKEND.fake_quant(torch.ones(4), "nvfp4", tensor_scale=torch.ones(2)), "one num"),
        (
            lambda: BACKEND.fake_quant(torch.ones(4), "nvfp4", tensor_scale=torch.tensor(-1.0)),
            "not negative",
        ),
        (lambda: BACKEND.fake_quant(torch.ones(4, device="meta"), "ocp"), "meta"),
    ],
)
def test_errors_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(0,), (0, 32), (3, 0)])
def test_empty_tensors_stay_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert BACKEND.fake_quant(x, "ascend950").shape == shape
    assert BACKEND.dequantize(BACKEND.quantize(x, "ascend950"), torch.float32).shape == shape


def test_the_record_names_the_compiler() -> None:
    assert BACKEND.describe()["name"] == "cpu"
    assert BACKEND.describe()["compiler"].startswith("numba ")


def test_it_is_chosen_on_a_cpu_and_the_reference_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert select("cpu").backend.name == "cpu"
    assert select("cpu", "reference").backend.name == "emulation"
    monkeypatch.setitem(sys.modules, "npu_qat.backends.cpu_kernels", None)
    chosen = select("cpu")
    assert chosen.backend.name == "emulation" and "not cpu: compiled kernels need" in chosen.reason
    with pytest.raises(BackendUnavailable, match="pip install numba"):
        select("cpu", "cpu")


@pytest.mark.slow
def test_compiled_code_is_kept_on_disk(tmp_path: Path) -> None:
    script = (
        "import torch; from npu_qat.backends import cpu, cpu_kernels; torch.set_num_threads(2);"
        "cpu.CpuBackend().fake_quant(torch.ones(512, 512), 'ocp');"
        "print(sum(cpu_kernels.quantize.stats.cache_hits.values()))"
    )
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=variables
        )
        for _ in range(2)
    ]
    assert [run.stdout.strip() for run in hits] == ["0", "1"], [run.stderr for run in hits]


@pytest.mark.slow
def test_a_machine_without_a_writable_folder_compiles_anew(tmp_path: Path) -> None:
    script = (
        "from numba.core import caching; caching.CacheImpl._locator_classes = [];"
        "import torch; from npu_qat.backends import cpu, cpu_kernels;"
        "print(cpu.CpuBackend().fake_quant(torch.tensor([5.1, 1.2]), 'ocp').tolist(),"
        "cpu_kernels.quantize.stats.cache_path)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "[6.0, 1.0] None", run.stderr
