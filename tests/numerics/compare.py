"""Compare results bit for bit: with the oracle, or with each other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from npu_qat.numerics import dequantize, fake_quant, quantize
from tests.numerics import oracle

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def bits(x: Tensor) -> Tensor:
    """The bit patterns of a float tensor, every NaN as one pattern."""
    integer = torch.int32 if x.dtype == torch.float32 else torch.int16
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view(integer)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit, where a NaN is equal to any NaN; shapes and dtypes must be equal."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return torch.equal(bits(a), bits(b)) if a.dtype.is_floating_point else torch.equal(a, b)


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest distance of floats of the same sign, in units of the last place."""
    assert a.dtype == b.dtype
    return int((bits(a).long() - bits(b).long()).abs().max())


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As transformers' decoders compute it: fp32 inside, rounded before and after the weight."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)
    return (weight * h.to(x.dtype)).to(x.dtype)


def assert_as_oracle(x: Tensor, name: str, tensor_scale: float | None = None) -> None:
    """Codes, scale bytes, decoded values and fake-quantised values of `x` equal the oracle's.

    Blocks run along the last dimension of `x` here, whatever axis the profile prescribes.
    """
    dtype = next(key for key, value in DTYPES.items() if value == x.dtype)
    want = oracle.quantize(x.float().numpy(), name, dtype, tensor_scale)
    given = x.unsqueeze(-1) if name == "fork-nvfp4-column" else x
    scale = None if tensor_scale is None else torch.tensor(tensor_scale)
    q = quantize(given, name, tensor_scale=scale)
    fake = fake_quant(given, name, tensor_scale=scale)

    scales = q.scales.reshape(want.scales.shape).numpy()
    codes = q.codes.reshape(x.shape).numpy()
    _assert_equal(scales, want.scales, x, name, "scale byte", oracle.SPECS[name].block)
    _assert_equal(codes, want.codes, x, name, "code", 1)
    values = torch.from_numpy(np.array(want.values))
    for what, got, expected in (
        ("decoded value", dequantize(q).reshape(x.shape), values),
        ("fake-quantised value", fake.reshape(x.shape), values.to(x.dtype)),
    ):
        _assert_equal(bits(got).numpy(), bits(expected).numpy(), x, name, what, 1)


def _assert_equal(
    got: np.ndarray, want: np.ndarray, x: Tensor, name: str, what: str, block: int
) -> None:
    """Arrays are equal, or an error that shows the first difference with its input."""
    if np.array_equal(got, want):
        return
    index = tuple(np.argwhere(got != want)[0])
    start = index[-1] * block // oracle.SPECS[name].block * oracle.SPECS[name].block
    row = x[index[:-1]][start : start + oracle.SPECS[name].block].float()
    raise AssertionError(
        f"{name}, {x.dtype}: {np.sum(got != want)} of {got.size} {what}s differ; the first at "
        f"{index}: {got[index]} instead of {want[index]}, x = {x[index[:-1]][index[-1] * block]}, "
        f"block = {row.tolist()}"
    )
