"""Each known trap of the operators, put back into the product's code: something must notice.

A trap is a way of calling that looks right, has been shipped by somebody, and is wrong. The tests
replace one piece of ``backends/npu`` by the trap and run the product. What notices is named: the
vendor's Meta kernel (so a compiled graph would fail), the CPU kernels (the operator's documents),
the backend's own trial, or the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_qat.backends import BackendUnavailable
from npu_qat.backends.base import PackedWeight
from npu_qat.backends.npu import NpuBackend
from npu_qat.backends.npu import backend as backend_module
from npu_qat.backends.npu import ops as contract
from npu_qat.numerics import dequantize, quantize
from npu_qat.parity.device import judge, measure, passed

pytestmark = pytest.mark.contract

M, N, K = 4, 16, 96  # K: an odd number of blocks


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, w, b = (torch.randn(s, generator=generator) for s in ((2, M // 2, K), (N, K), (N,)))
    return x.bfloat16(), w.bfloat16(), b.bfloat16()


def layer(backend: NpuBackend, profile: str = "ascend950", device: str = "cpu") -> Tensor:
    """[2, M/2, N]: the fused linear as the layers call it."""
    x, w, b = operands()
    x, b = x.to(device), b.to(device)
    weight = PackedWeight.of(quantize(w, profile))
    weight = replace(weight, packed=weight.packed.to(device), scales=weight.scales.to(device))
    encoded = backend.encode_input(x, profile)
    return backend.fused_linear(encoded, backend.prepare_weight(weight), b)


def exact(profile: str = "ascend950") -> Tensor:
    x, w, b = operands()
    values, weight = (dequantize(quantize(t, profile), torch.float32).double() for t in (x, w))
    return values @ weight.t() + b.double()


def close(y: Tensor, profile: str = "ascend950") -> bool:
    return torch.allclose(y.double(), exact(profile), rtol=2.0**-7, atol=1e-3)


def without(name: str) -> Callable[..., dict[str, Any]]:
    """``quant_matmul_arguments`` that forgets one."""
    original = contract.quant_matmul_arguments

    def forgetful(*arguments: Any) -> dict[str, Any]:
        return {k: v for k, v in original(*arguments).items() if k != name}

    return forgetful


def test_without_a_trap_all_is_well(npu_backend: NpuBackend) -> None:
    for profile in ("ascend950", "ascend950-rint", "ascend950-dual"):
        assert close(layer(npu_backend, profile), profile)
    assert layer(npu_backend, device="meta").shape == (2, M // 2, N)


# name -> (what is replaced, by what, whether Meta notices, the CPU kernels' message)
MATMUL_TRAPS: dict[str, tuple[str, Any, bool, str]] = {
    "a transpose that is made contiguous": (
        "as_transposed",
        lambda t: t.transpose(0, 1).contiguous(),
        True,
        "k dim of x1 and x2",
    ),
    "no transpose": ("as_transposed", lambda t: t, True, "k dim of x1 and x2"),
    "no group_sizes": (
        "quant_matmul_arguments",
        without("group_sizes"),
        True,
        "group_sizes",
    ),
    "groups of another size": ("GROUP_SIZES", (1, 1, 16), True, "group_sizes"),
    "no output_dtype, which means int8": (
        "quant_matmul_arguments",
        without("output_dtype"),
        False,
        "int8",
    ),
    "a bias in the layer's 16 bits": ("matmul_bias", lambda b: b, False, "bias must be float32"),
    "torch's number of FP4": ("DTYPE_E2M1", 45, True, "296"),
    "scales without a dtype": (
        "quant_matmul_arguments",
        without("scale_dtype"),
        False,
        "dtypes",
    ),
}


@pytest.mark.parametrize("name", MATMUL_TRAPS)
def test_a_trap_in_the_matmul_is_noticed(
    npu_backend: NpuBackend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    what, trap, by_meta, message = MATMUL_TRAPS[name]
    npu_backend.check_profile("ascend950")  # the trial is over
    monkeypatch.setattr(contract, what, trap)
    with pytest.raises(RuntimeError, match=message):
        layer(npu_backend)
    if by_meta:
        with pytest.raises(RuntimeError):
            layer(npu_backend, device="meta")


def test_a_transposed_scale_that_is_made_contiguous_is_noticed(
    npu_backend: NpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta lets it by, and the codes are right: only the scale's view is lost."""

    def trap(t: Tensor) -> Tensor:
        view = t.transpose(0, 1)
        return view.contiguous() if t.dim() == 3 else view

    monkeypatch.setattr(contract, "as_transposed", trap)
    with pytest.raises(RuntimeError, match="scale must be one too"):
        layer(npu_backend)


def test_a_square_weight_does_not_hide_the_contiguous_transpose(
    npu_backend: NpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With N = K/2 the copied matrix has the right shape; only its strides tell."""
    w = torch.randn(K // 2, K).bfloat16()
    weight = npu_backend.prepare_weight(PackedWeight.of(quantize(w, "ascend950")))
    encoded = npu_backend.encode_input(operands()[0], "ascend950")
    npu_backend.fused_linear(encoded, weight)
    monkeypatch.setattr(contract, "as_transposed", lambda t: t.transpose(0, 1).contiguous())
    with pytest.raises(RuntimeError, match="k dim"):
        npu_backend.fused_linear(encoded, weight)


def test_a_3d_input_is_noticed(npu_backend: NpuBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "flatten_rows", lambda x: x)
    with pytest.raises(RuntimeError, match="flatten x to 2-D"):
        layer(npu_backend)


def test_scales_of_an_odd_number_of_blocks_without_their_pad_are_noticed(
    npu_backend: NpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm-ascend PR #12201: K = 96 has 3 blocks, and the operator reads pairs."""

    def trap(scales: Tensor, axis: int) -> Tensor:
        even = scales[..., : scales.shape[-1] // 2 * 2]
        return even.unflatten(axis, (-1, 2)).contiguous()

    monkeypatch.setattr(backend_module, "pair_scales", trap)
    with pytest.raises(RuntimeError, match="shape"):
        layer(npu_backend)


def test_an_odd_number_of_inputs_is_refused_with_a_reason(npu_backend: NpuBackend) -> None:
    with pytest.raises(ValueError, match="must be even"):
        npu_backend.quantize(torch.zeros(4, 33).bfloat16(), "ascend950")
    with pytest.raises(BackendUnavailable, match="even number of inputs"):
        npu_backend.check_fused("ascend950", "ascend950", 33, 16)


@pytest.mark.parametrize(
    ("what", "trap", "message"),
    [
        ("to_fractal_nz", lambda self, codes: codes.view(torch.int8), "not in FRACTAL_NZ"),
        ("to_fractal_nz", lambda self, codes: codes, "viewed as int8"),
    ],
)
def test_the_dual_level_weight_s_format_is_noticed(
    npu_backend: NpuBackend, monkeypatch: pytest.MonkeyPatch, what: str, trap: Any, message: str
) -> None:
    monkeypatch.setattr(contract.NpuOps, what, trap)
    with pytest.raises(RuntimeError, match=message):
        layer(npu_backend, "ascend950-dual")


# --- numbers: a device accepts the call, and the codes are not the profile's ----------------------


def swap(name: str, value: Any) -> Callable[[Any], Callable[..., Any]]:
    """A quantiser that is told something else than the product meant."""

    def around(original: Any) -> Callable[..., Any]:
        def trapped(x: Tensor, **arguments: Any) -> Any:
            return original(x, **{**arguments, name: value})

        return trapped

    return around


NUMBER_TRAPS = {
    "the default round mode": ("ascend950", swap("round_mode", "rint")),
    "another scale rule": ("ascend950", swap("scale_alg", 2)),
    "an old CANN that ignores scale_alg 2": ("ascend950-alg2", swap("scale_alg", 0)),
    "an old CANN that drops dst_type_max": ("ascend950-alg2-max7", swap("dst_type_max", 0.0)),
}


@pytest.mark.parametrize("name", NUMBER_TRAPS)
def test_a_device_that_computes_another_profile_is_refused_and_shown(
    npu_backend: NpuBackend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The backend's trial refuses it before the first use; the kit says what differs."""
    profile, around = NUMBER_TRAPS[name]
    original = npu_backend.ops.api.npu_dynamic_mx_quant
    trapped = around(original)
    if name.startswith("an old CANN"):

        def trapped(x: Tensor, **arguments: Any) -> Any:
            kept = {k: v for k, v in arguments.items() if k != "dst_type_max"}
            if "scale_alg" in name:
                return original(x, **{**kept, "scale_alg": 0})
            return original(x, **kept)

    monkeypatch.setattr(npu_backend.ops.api, "npu_dynamic_mx_quant", trapped)
    with pytest.raises(BackendUnavailable, match="other numbers than profile"):
        npu_backend.quantize(operands()[0], profile)
    recording = measure(
        npu_backend.without_trials(),
        torch.device("cpu"),
        profiles=[profile],
        wanted=lambda n: n == "ties",
    )
    (verdict,) = judge(recording)
    assert not passed([verdict]) and verdict.mismatches.total > 20


def test_codes_packed_high_nibble_first_are_noticed(
    npu_backend: NpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = npu_backend.ops.api.npu_dynamic_mx_quant

    def trapped(x: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        codes, scales = original(x, **arguments)
        return (codes << 4) | (codes >> 4), scales

    monkeypatch.setattr(npu_backend.ops.api, "npu_dynamic_mx_quant", trapped)
    with pytest.raises(BackendUnavailable, match="codes of a trial differ"):
        layer(npu_backend)
