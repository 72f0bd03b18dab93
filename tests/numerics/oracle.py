"""A slow, plain reference for every numerics profile, sharing nothing with the package.

NumPy on float64, where each fp32, bf16 or fp16 number, each power of two and each quotient by one
is exact. Exponents come from `frexp`, roundings from comparing with the midpoints of the grid,
scale rules from the inequalities of the profile table as they are written there. Where a profile
is defined by fp32 arithmetic (NVFP4, the earlier public code) the same IEEE operations are done
with `numpy.float32`.

`quantize(x, name, dtype)` works along the last axis and gives codes, scale bytes and fp32 values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GRID = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MIDPOINTS = (GRID[1:] + GRID[:-1]) / 2
F32 = np.float32


@dataclass(frozen=True)
class Spec:
    """One row of the profile table, written down a second time."""

    rule: str
    rounding: str
    block: int = 32
    flush: bool = False
    inf: str = "nan"


SPECS = {
    "ocp": Spec("floor", "even"),
    "ocp-even": Spec("even", "even"),
    "ocp-ceil": Spec("ceil", "even"),
    "ocp-rceil": Spec("rceil", "even"),
    "ascend950": Spec("floor", "away", flush=True),
    "ascend950-rint": Spec("floor", "even", flush=True),
    "ascend950-floor": Spec("floor", "down", flush=True),
    "ascend950-alg2": Spec("above 1.5", "away", flush=True),
    "ascend950-alg2-rint": Spec("above 1.5", "even", flush=True),
    "ascend950-alg2-floor": Spec("above 1.5", "down", flush=True),
    "ascend950-alg2-max7": Spec("above 1.75", "away", flush=True),
    "ascend950-alg2-max7-rint": Spec("above 1.75", "even", flush=True),
    "ascend950-alg2-max7-floor": Spec("above 1.75", "down", flush=True),
    "ascend950-mse": Spec("mse", "away", flush=True, inf="error"),
    "ascend950-dual": Spec("dual", "even", flush=True),
    "compressed-tensors": Spec("even, NaN on overflow", "even"),
    "torchao-rceil": Spec("rceil", "even", inf="saturate"),
    "msmodelslim-weight": Spec("msmodelslim", "away", inf="error"),
    "fork-mxfp4": Spec("floor", "away"),
    "fork-nvfp4-row": Spec("fork", "to smaller", block=16, inf="saturate"),
    "fork-nvfp4-column": Spec("fork", "to smaller", block=16, inf="saturate"),
    "quant-compute-mxfp4": Spec("quant_compute", "away", inf="saturate"),
    "quant-compute-nvf4": Spec("nvf4", "even", block=16, inf="saturate"),
    "nvfp4": Spec("two-level", "even", block=16),
    "nvfp4-one-level": Spec("one-level", "even", block=16),
}
FINITE_ONLY = [name for name, spec in SPECS.items() if spec.inf == "error"]


@dataclass(frozen=True)
class Result:
    """codes uint8 [..., n]; scales uint8 [..., blocks]; values fp32 [..., n]; tensor_scale fp32."""

    codes: np.ndarray
    scales: np.ndarray
    values: np.ndarray
    tensor_scale: np.floating | None = None


def quantize(x: np.ndarray, name: str, dtype: str, tensor_scale: float | None = None) -> Result:
    """Quantise float32 `x` [..., n]; its numbers are those of `dtype`: "bf16", "fp16", "fp32"."""
    with np.errstate(all="ignore"):
        return _quantize(np.asarray(x, F32), SPECS[name], dtype, tensor_scale)


def _quantize(x: np.ndarray, spec: Spec, dtype: str, tensor_scale: float | None) -> Result:
    n = x.shape[-1]
    level0 = None
    if spec.rule == "dual":
        x, level0 = _level0(x, dtype)
    padded = np.concatenate((x, np.zeros((*x.shape[:-1], -n % spec.block), F32)), -1)
    blocks = padded.reshape(*x.shape[:-1], -1, spec.block)
    amax = np.abs(blocks).max(-1, keepdims=True)  # NaN if there is one
    has_nan = np.isnan(amax)
    has_inf = np.isinf(amax)
    bad = has_nan if spec.inf == "saturate" else has_nan | has_inf

    g = None
    if spec.rule in ("two-level", "one-level", "nvf4", "fork"):
        if spec.rule == "two-level":
            finite = np.abs(x[np.isfinite(x)])
            largest = finite.max() if finite.size else F32(0)
            g = F32(largest / F32(2688)) if tensor_scale is None else F32(tensor_scale)
        scale, v, byte = _fp8_blocks(blocks, amax, spec.rule, g)
        byte = np.where(bad, 0xFF if spec.rule == "fork" else 0x7F, byte)
        scale = np.where(bad, np.nan, scale)
    else:
        byte = _e8m0_bytes(blocks, amax, spec, dtype)
        byte = np.where(bad, 255, byte)
        scale = np.where(byte == 255, np.nan, np.ldexp(1.0, byte - 127))
        bad = byte == 255
        v = np.abs(blocks.astype(np.float64)) / scale
        if spec.flush:
            v = np.where(byte == 0, 0.0, v)
        if spec.rounding == "down" and dtype == "bf16":
            v = np.where(v <= 2.0**-134, 0.0, v)  # the op's quotient is a bf16 number

    negative = np.signbit(blocks)
    index = _round(np.where(bad, 0.0, v), spec.rounding, negative)
    codes = np.where(bad, 0, index + 8 * negative).astype(np.uint8)
    element = np.where(negative, -GRID[index], GRID[index])
    if g is None or spec.rule != "two-level":
        values = (element * scale).astype(F32)
    else:
        values = element.astype(F32) * (scale.astype(F32) * g)
    values = np.where(bad, F32(np.nan), values).reshape(padded.shape)[..., :n]
    if level0 is not None:
        values = values * level0[..., :n]
    return Result(codes.reshape(padded.shape)[..., :n], byte[..., 0].astype(np.uint8), values, g)


def _round(v: np.ndarray, rounding: str, negative: np.ndarray) -> np.ndarray:
    """Grid indices of magnitudes v >= 0 (float64)."""
    v = np.minimum(v, 6.0)
    below = np.searchsorted(MIDPOINTS, v, "left")  # ties go to the smaller neighbour
    above = np.searchsorted(MIDPOINTS, v, "right")  # ties go to the larger neighbour
    if rounding == "away":
        return above
    if rounding == "to smaller":
        return below
    if rounding == "even":
        return np.where(below % 2 == 0, below, above)
    floor = np.searchsorted(GRID, v, "right") - 1
    ceil = np.searchsorted(GRID, v, "left")
    return np.where(negative, ceil, floor)


def _e8m0_bytes(blocks: np.ndarray, amax: np.ndarray, spec: Spec, dtype: str) -> np.ndarray:
    """Scale bytes [..., 1] of blocks; meaningless where the block holds NaN or Inf."""
    finite = np.where(np.isfinite(amax), amax, F32(1))
    big = finite.astype(np.float64)
    mantissa, exponent = np.frexp(big)  # 0.5 <= mantissa < 1
    m, e = mantissa * 2, exponent - 1
    up = {
        "floor": np.zeros_like(m, bool),
        "even": m >= 1.75,
        "even, NaN on overflow": m >= 1.75,
        "ceil": m > 1,
        "rceil": m > 1.5,
        "above 1.5": m > 1.5,
        "above 1.75": m > 1.75,
    }
    rule = "floor" if spec.rule == "dual" else spec.rule
    if rule in up:
        byte = np.clip(e + up[rule] - 2, -127, 127) + 127
        if rule == "even, NaN on overflow":
            byte = np.where(big >= 1.75 * 2.0**127, 255, byte)
        if spec.inf == "saturate":
            byte = np.where(np.isinf(amax), 254, byte)
        byte = np.where(big == 0, 0, byte)
        # The op flushes by the exponent after the bump: a bumped 2^-125 survives (golden vectors).
        return np.where(e + up[rule] < -124, 0, byte) if spec.flush else byte
    if rule == "quant_compute":
        _, exponent = np.frexp((finite + F32(9.6e-7)).astype(np.float64))
        byte = np.minimum(exponent - 1 - 2, 125) + 127
        return np.where(np.isinf(amax), 252, byte)
    if rule == "msmodelslim":
        step = _rounder(dtype)
        y = step(step(finite / F32(0.875)) + step(F32(9.6e-7)))
        log = step(np.log2(y.astype(np.float64)).astype(F32))
        return (np.clip(np.floor(log) - 2, -129, 125) + 127).astype(np.int64)
    assert rule == "mse"
    best, chosen = np.full(big.shape, np.inf), np.zeros(big.shape, np.int64)
    for candidate in (-1, 0, 1):
        byte = e - 2 + 127 + candidate
        scale = np.ldexp(1.0, byte - 127)
        v = blocks.astype(np.float64) / scale
        error = (v - np.sign(v) * GRID[_round(np.abs(v), "away", v < 0)]) * scale
        total = np.zeros(big.shape)
        for i in range(blocks.shape[-1]):
            total = total + error[..., i : i + 1] ** 2
        take = (byte >= 1) & (byte <= 254) & (total < best)
        best, chosen = np.where(take, total, best), np.where(take, byte, chosen)
    return np.where(big < 2.0**-124, 0, chosen)


def _fp8_blocks(
    blocks: np.ndarray, amax: np.ndarray, rule: str, g: np.floating | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scale, element magnitudes in scale units, scale byte) of formats with FP8 scales."""
    a = np.abs(blocks)
    if rule == "fork":
        raw = np.maximum(amax, F32(1e-10)) / F32(6)
        exponent = np.clip(np.frexp(np.where(np.isinf(raw), F32(2.0**100), raw))[1] - 1, -6, 8)
        mantissa = np.clip(
            np.rint(raw.astype(np.float64) / np.ldexp(1.0, exponent) * 8) / 8, 1, 1.875
        )
        scale = (mantissa * np.ldexp(1.0, exponent)).astype(F32)
        byte = (exponent + 7) * 8 + np.nan_to_num((mantissa - 1) * 8).astype(np.int64)
        return scale, (a / scale).astype(np.float64), byte
    if rule == "two-level":
        tiny = 0 < g < 2.0**-100  # same numbers, away from the edge of fp32
        lift = F32(2.0**64) if tiny else F32(1)
        raw = np.where(amax == 0, F32(0), amax * lift / (F32(6) * (g * lift)))  # Inf saturates
    else:
        raw = amax / F32(6)
    scale, byte = _to_e4m3(raw)
    if rule == "nvf4":
        v = np.where(scale > 0, a / scale, 0)
    elif rule == "one-level":
        v = np.where(scale > 0, a * (F32(1) / scale), 0)
    else:
        decode = F32(1) / (F32(1) / (g * lift))
        v = np.where((scale > 0) & (g > 0), (a * lift) * (F32(1) / (scale * decode)), 0)
    return scale, v.astype(np.float64), byte


def _all_e4m3() -> np.ndarray:
    """The 127 finite values of E4M3 (bias 7, 3 mantissa bits) from 0 to 448."""
    bits = np.arange(127)
    exponent, mantissa = bits >> 3, bits & 7
    return np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )


E4M3 = _all_e4m3()


def _to_e4m3(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(value fp32, byte) of the E4M3 number nearest to raw, ties to the even byte, at most 448."""
    v = np.nan_to_num(np.minimum(raw.astype(np.float64), 448.0))
    middle = (E4M3[1:] + E4M3[:-1]) / 2
    below, above = np.searchsorted(middle, v, "left"), np.searchsorted(middle, v, "right")
    byte = np.where(below % 2 == 0, below, above)
    return E4M3[byte].astype(F32), byte


def _level0(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """First level of the dual-level op: (quotients, level-0 scale of each element), both fp32."""
    n = x.shape[-1]
    group = min(n, 512)
    padded = np.concatenate((x, np.zeros((*x.shape[:-1], -n % group), F32)), -1)
    groups = padded.reshape(*x.shape[:-1], -1, group)
    amax = np.where(np.isfinite(groups), np.abs(groups), 0).max(-1, keepdims=True).astype(F32)
    scale = amax * F32(1 / 6)
    scale = np.where(scale < F32(2.0**-126), F32(0), scale)
    step = _rounder("fp16" if dtype == "fp16" else "bf16")
    t = np.where(groups == 0, groups, step(groups / scale)).reshape(padded.shape)[..., :n]
    return t, np.broadcast_to(scale, groups.shape).reshape(padded.shape)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to bf16 (ties to even), as float32."""
    bits = np.ascontiguousarray(x, F32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(F32)
    return np.where(np.isnan(x), F32(np.nan), rounded.reshape(np.shape(x)))


def to_fp16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to fp16, as float32."""
    return x.astype(np.float16).astype(F32)


def _rounder(dtype: str):
    return {"bf16": to_bf16, "fp16": to_fp16, "fp32": lambda x: x.astype(F32)}[dtype]
