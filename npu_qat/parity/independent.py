"""A second opinion: files and numbers of an export, in numpy, sharing no code with the rest.

A reader that was written together with the writer agrees with it whatever both do. So everything
here starts again from the published layouts and from the rules of the operators: safetensors by
the format's own description, packed codes and scale bytes by the layout of AscendV1 and
compressed-tensors, and the encoders that the serving engines apply to the inputs of a linear. It
imports nothing of ``numerics`` or ``deploy`` and no torch; comparisons in exact float64 replace the
bit tricks that make the fast path fast.

    ascend950           s = 2^(floor(log2 amax) - 2), a byte of 0 flushes the block, ties away
    compressed-tensors  one binade more if amax >= 1.75 * 2^floor(log2 amax), ties to even
    nvfp4               s = E4M3(amax / (6 g)) under a calibrated g, ties to even, in fp32

Sources: npu_dynamic_mx_quant of CANN ops-nn (arch35, scale_alg 0, round mode "round"),
compressed-tensors 0.20.0 (``mxfp4``, ``nvfp4``), the README of safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# Halfway between neighbouring magnitudes, and whether the even one of the two is the upper.
_MIDDLES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_UP_ON_TIE = np.array([False, True, False, True, False, True, False])
_NUMPY_TYPES = {"U8": "u1", "I8": "i1", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}


# --- files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedWeight:
    """A quantised weight [N, K] as stored.

    Attributes:
        packed: uint8 [N, K/2], the even element in the low nibble.
        scales: uint8 [N, blocks]: E8M0, or E4M3 where ``divisor`` is given.
        divisor: of NVFP4, the fp32 number that scales are divided by; else None.
    """

    packed: Bytes
    scales: Bytes
    divisor: np.float32 | None

    @property
    def codes(self) -> Bytes:
        """One code a byte [N, K]."""
        both = np.stack((self.packed & 15, self.packed >> 4), axis=-1)
        return both.reshape(self.packed.shape[0], -1)

    @property
    def values(self) -> Floats:
        """What the codes stand for, exactly, [N, K]; without the tensor scale of NVFP4."""
        codes = self.codes
        scale = e8m0(self.scales) if self.divisor is None else e4m3(self.scales)
        return VALUES[codes] * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)


class ExportFiles:
    """The tensors of an exported folder by name.

    Args:
        folder: AscendV1 or compressed-tensors.

    Raises:
        ValueError: a file is no safetensors file, or is cut.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ascend = (folder / "quant_model_description.json").exists()
        self._places: dict[str, tuple[Path, str, list[int], int, int]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, place in _header(file).items():
                self._places[name] = place

    def weights(self) -> Iterator[tuple[str, PackedWeight]]:
        """(path of the linear, its weight) of every quantised linear, by name."""
        suffix = ".weight" if self.ascend else ".weight_packed"
        for name in sorted(self._places):
            path = name.removesuffix(suffix)
            if path == name or f"{path}.weight_scale" not in self._places:
                continue
            divisor = None
            if f"{path}.weight_global_scale" in self._places:
                divisor = np.float32(self.floats(f"{path}.weight_global_scale")[0])
            packed, scales = self._raw(name), self._raw(f"{path}.weight_scale")
            yield path, PackedWeight(packed, scales, divisor)

    def float_names(self) -> list[str]:
        """Names of the tensors that are stored as numbers."""
        kinds = ("F32", "F16", "BF16")
        return sorted(n for n, (_, kind, *_rest) in self._places.items() if kind in kinds)

    def floats(self, name: str) -> Floats:
        """A float tensor, exactly."""
        raw, kind = self._raw(name), self._places[name][1]
        if kind == "BF16":  # the upper half of an fp32 pattern
            return (raw.astype("<u4") << 16).view("<f4").astype(np.float64)
        return raw.astype(np.float64)

    def _raw(self, name: str) -> Any:
        file, kind, shape, start, end = self._places[name]
        with open(file, "rb") as handle:
            handle.seek(start)
            data = handle.read(end - start)
        return np.frombuffer(data, dtype=_NUMPY_TYPES[kind]).reshape(shape)


def _header(file: Path) -> dict[str, tuple[Path, str, list[int], int, int]]:
    """Tensor -> (file, type, shape, first byte, last byte)."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{file} is no safetensors file: its header is longer than the file")
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(f"{file} is cut: {name} ends at byte {end}, the file at {size}")
        places[name] = (file, entry["dtype"], entry["shape"], start, end)
    return places


# --- scales -----------------------------------------------------------------------------------


def e8m0(scales: Bytes) -> Floats:
    """2^(byte - 127); NaN for 0xFF."""
    return np.where(scales == 255, np.nan, np.ldexp(1.0, scales.astype(np.int32) - 127))


def e4m3(scales: Bytes) -> Floats:
    """OCP E4M3 without infinities; NaN for 0x7F and 0xFF."""
    byte = scales.astype(np.int32)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    value = np.where(byte & 0x80, -magnitude, magnitude)
    return np.where(byte & 0x7F == 0x7F, np.nan, value)


def _to_e4m3(x: npt.NDArray[np.float32]) -> Bytes:
    """Bytes of non-negative numbers in E4M3: nearest, ties to even, at most 448; NaN for NaN."""
    _, exponent = np.frexp(np.where(x > 0, x, 1.0))
    step = np.ldexp(1.0, np.maximum(exponent - 1, -6) - 3)  # three mantissa bits, subnormals below
    value = np.minimum(np.rint(x.astype(np.float64) / step) * step, 448.0)
    mantissa, exponent = np.frexp(np.where(value > 0, value, 1.0))
    subnormal = value < 2.0**-6
    normal_byte = ((exponent - 1 + 7) << 3) + np.rint((mantissa * 2 - 1) * 8).astype(np.int64)
    byte = np.where(subnormal, np.rint(np.nan_to_num(value) * 2**9), normal_byte)
    return np.where(np.isnan(x), 0x7F, byte).astype(np.uint8)


# --- encoders ---------------------------------------------------------------------------------


def encode(
    x: Floats, profile: str, divisor: np.float32 | None = None
) -> tuple[Bytes, Bytes] | None:
    """Codes [M, K] and scale bytes [M, ceil(K / block)] of ``x`` [M, K] by a served profile.

    Args:
        x: the input of a linear, exact.
        profile: ``ascend950``, ``compressed-tensors`` or ``nvfp4``.
        divisor: of ``nvfp4``, the fp32 number that is stored beside the weight.

    Returns None for a profile that no serving engine applies to activations.
    """
    if profile == "nvfp4":
        assert divisor is not None, "nvfp4 has a calibrated scale"
        return _encode_nvfp4(x, divisor)
    if profile not in ("ascend950", "compressed-tensors"):
        return None
    blocks = _blocks(x, 32)
    with np.errstate(invalid="ignore"):
        amax = np.abs(blocks).max(-1)
    finite = np.isfinite(amax)
    _, exponent = np.frexp(np.where(finite & (amax > 0), amax, 1.0))
    power = np.where(amax > 0, exponent - 1, -200)  # floor(log2 amax)
    if profile == "compressed-tensors":
        power = power + (np.where(finite, amax, 0.0) >= np.ldexp(1.75, power))
        finite &= power < 128
    byte = np.where(finite, np.clip(power + 125, 0, 254), 255)
    units = np.abs(blocks) / np.ldexp(1.0, np.where(finite, byte, 254) - 127)[..., None]
    if profile == "ascend950":
        units = np.where((byte == 0)[..., None], 0.0, units)
    codes = _round(units, away=profile == "ascend950") | _signs(blocks)
    codes = np.where(finite[..., None], codes, 0).astype(np.uint8)
    return _unblocked(codes, x.shape[-1]), byte.astype(np.uint8)


def _encode_nvfp4(x: Floats, divisor: np.float32) -> tuple[Bytes, Bytes]:
    """In fp32, step by step, as the reference of the serving kernels does it."""
    one = np.float32(1.0)
    blocks = _blocks(x, 16).astype(np.float32)
    scale = one / divisor
    with np.errstate(all="ignore"):
        amax = np.abs(blocks).max(-1)
        byte = _to_e4m3(amax / (scale * np.float32(6.0)))
        byte = np.where(np.isfinite(amax), byte, 0x7F).astype(np.uint8)
        stored = e4m3(byte).astype(np.float32)
        factor = one / (stored * (one / (one / scale)))
        units = np.abs(blocks) * np.where(stored > 0, factor, np.float32(0.0))[..., None]
    codes = _round(np.nan_to_num(units.astype(np.float64)), away=False) | _signs(blocks)
    codes = np.where((byte == 0x7F)[..., None], 0, codes).astype(np.uint8)
    return _unblocked(codes, x.shape[-1]), byte


def _blocks(x: Any, size: int) -> Any:
    padded = np.pad(x, ((0, 0), (0, -x.shape[-1] % size)))
    return padded.reshape(x.shape[0], -1, size)


def _unblocked(codes: Any, length: int) -> Any:
    return codes.reshape(codes.shape[0], -1)[:, :length]


def _round(units: Floats, *, away: bool) -> npt.NDArray[np.int64]:
    """Indices 0..7 into the magnitudes: how many middles lie below, or at a tie that goes up."""
    below = np.zeros(units.shape, np.int64)
    for middle, up in zip(_MIDDLES, _UP_ON_TIE, strict=True):
        below += (units >= middle) if away or up else (units > middle)
    return below


def _signs(x: Any) -> npt.NDArray[np.int64]:
    return np.where(np.signbit(x), 8, 0)
