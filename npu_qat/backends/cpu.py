"""The CPU backend: the numbers of ``numerics/`` by machine code that Numba compiles on first use.

The code (``cpu_kernels``) is kept on disk, so that a second process starts at once, and no C++
compiler is needed. Blocks along the last axis take one pass over memory; blocks along another axis
go through a transposed copy. Every registered profile is computed here, those included that only a
frozen weight needs, so there is one path to test.

Results equal ``numerics`` bit for bit; tables and constants come from there.
"""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from npu_qat import numerics
from npu_qat.backends.base import BackendUnavailable, PackedWeight
from npu_qat.numerics import QuantizedTensor, get_profile, nvfp4_tensor_scale, scales
from npu_qat.numerics.profiles import Profile

# Elements for each thread below which a second thread costs more than it saves.
GRAIN = 1 << 15
_NO_TENSOR_SCALE = -1.0


class CpuBackend:
    """Compiled kernels on CPU tensors, in as many threads as PyTorch uses.

    Raises:
        BackendUnavailable: Numba is not installed, or does not work here.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._parallel = _share_openmp()
        self._kernels = _kernels()
        k = self._kernels
        self._dtypes = {torch.bfloat16: k.BF16, torch.float16: k.FP16, torch.float32: k.FP32}

    def describe(self) -> dict[str, str]:
        threads = "as torch" if self._parallel else "1 (torch's OpenMP library was not found)"
        return {"name": self.name, "compiler": f"numba {version('numba')}", "threads": threads}

    def check_profile(self, profile: str) -> None:
        get_profile(profile)  # it computes all there are

    def fake_quant(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
        apply_tensor_scale: bool = True,
    ) -> torch.Tensor:
        record = _record(profile)
        if not self._takes(x, record):
            return numerics.fake_quant(x, profile, axis, tensor_scale=tensor_scale)
        if not record.moves(x, axis):
            return self._fake_quant_last(x, record, tensor_scale, apply_tensor_scale)
        moved = x.movedim(axis, -1)
        out = self._fake_quant_last(moved, record, tensor_scale, apply_tensor_scale)
        return out.movedim(-1, axis).contiguous()

    def quantize(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
    ) -> QuantizedTensor:
        record = _record(profile)
        if not self._takes(x, record):
            return numerics.quantize(x, profile, axis, tensor_scale=tensor_scale)
        if record.moves(x, axis):
            q = self._quantize_last(x.movedim(axis, -1), record, tensor_scale)
            return QuantizedTensor(
                q.codes.movedim(-1, axis).contiguous(),
                q.scales.movedim(-1, axis).contiguous(),
                q.profile,
                axis % x.dim(),
                q.tensor_scale,
                q.level0_scales,
            )
        return self._quantize_last(x, record, tensor_scale)

    def dequantize(
        self,
        q: QuantizedTensor | PackedWeight,
        dtype: torch.dtype,
        *,
        apply_tensor_scale: bool = True,
    ) -> torch.Tensor:
        rank = len(q.shape)
        if isinstance(q, PackedWeight):
            if q.axis != rank - 1:
                return self.dequantize(q.unpack(), dtype, apply_tensor_scale=apply_tensor_scale)
            codes, profile = q.packed, get_profile(q.profile)
        else:
            codes, profile = q.codes, q.profile
        if dtype not in self._dtypes or codes.numel() == 0:
            unpacked = q.unpack() if isinstance(q, PackedWeight) else q
            return numerics.dequantize(unpacked, dtype, apply_tensor_scale=apply_tensor_scale)
        _check_on_cpu(codes)
        moved = q.axis != rank - 1
        scale_bytes = q.scales
        if moved:
            codes, scale_bytes = codes.movedim(q.axis, -1), scale_bytes.movedim(q.axis, -1)
        codes, scale_bytes = codes.contiguous(), scale_bytes.contiguous()
        shape = list(codes.shape)
        shape[-1] = q.shape[q.axis]
        out = torch.empty(shape, dtype=dtype)
        values = _values_of_bytes(profile.scale_format)
        if q.tensor_scale is not None and apply_tensor_scale:
            values = values * q.tensor_scale
        level0 = None if q.level0_scales is None else q.level0_scales.contiguous()
        rows, n = _rows(out, 2 * max(profile.block_size, profile.level0_block))
        self._kernels.dequantize(
            codes.data_ptr(),
            int(isinstance(q, PackedWeight)),
            out.data_ptr(),
            self._dtypes[dtype],
            rows,
            n,
            profile.block_size,
            scale_bytes.data_ptr(),
            values.data_ptr(),
            0 if level0 is None else level0.data_ptr(),
            0 if level0 is None else profile.level0_block,
            *self._crew("dequantize", out.numel()),
        )
        return out.movedim(-1, q.axis).contiguous() if moved else out

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        y = F.linear(x, self.dequantize(weight, x.dtype), bias)
        return y if out_dtype is None else y.to(out_dtype)

    # --- calls of the kernels ---------------------------------------------------------------

    def _takes(self, x: torch.Tensor, record: _Record) -> bool:
        """Whether the kernels compute this; the reference computes the rest, or explains it."""
        if x.dtype not in self._dtypes or x.dim() == 0 or x.numel() == 0:
            return False
        _check_on_cpu(x)
        return not record.finite_only or bool(torch.isfinite(x).all())

    def _crew(self, kernel: str, elements: int) -> tuple[int, int]:
        """Who works on a tensor of this size: the address of the worker, and its threads."""
        if elements < 2 * GRAIN or not self._parallel:
            return 0, 1
        threads = min(torch.get_num_threads(), elements // GRAIN)
        return (self._kernels.worker(kernel), threads) if threads > 1 else (0, 1)

    def _fake_quant_last(
        self,
        x: torch.Tensor,
        record: _Record,
        tensor_scale: torch.Tensor | None,
        apply_tensor_scale: bool,
    ) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x, requires_grad=False)
        number, _ = _tensor_scale(x, record.profile, tensor_scale)
        applied = number if number >= 0 and apply_tensor_scale else 1.0
        self._quantize(x, out, self._kernels.NUMBERS, record, number, applied)
        return out

    def _quantize_last(
        self, x: torch.Tensor, record: _Record, tensor_scale: torch.Tensor | None
    ) -> QuantizedTensor:
        x = x.detach().contiguous()
        profile = record.profile
        codes = torch.empty_like(x, dtype=torch.uint8)
        blocks = [*x.shape[:-1], -(-x.shape[-1] // profile.block_size)]
        scale_bytes = torch.empty(blocks, dtype=torch.uint8)
        level0 = None
        if profile.level0_block:
            level0 = torch.empty([*x.shape[:-1], -(-x.shape[-1] // profile.level0_block)])
        number, used_scale = _tensor_scale(x, profile, tensor_scale)
        self._quantize(x, codes, self._kernels.CODES, record, number, 1.0, scale_bytes, level0)
        return QuantizedTensor(codes, scale_bytes, profile, x.dim() - 1, used_scale, level0)

    def _quantize(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        mode: int,
        record: _Record,
        tensor_scale: float,
        applied_scale: float,
        scale_bytes: torch.Tensor | None = None,
        level0: torch.Tensor | None = None,
    ) -> None:
        """Run the kernel on contiguous ``x`` along its last axis, into ``out``."""
        rows, n = _rows(x, record.unit)
        dtype = self._dtypes[x.dtype]
        if record.profile.level0_block and level0 is None:
            level0 = torch.empty(rows * -(-n // record.profile.level0_block))
        if record.profile.scale_rule == "msmodelslim":
            given = self._msmodelslim_bytes(x, rows, n, record.profile)
            scale_bytes = (
                given if scale_bytes is None else scale_bytes.copy_(given.view_as(scale_bytes))
            )
        self._kernels.quantize(
            x.data_ptr(),
            dtype,
            out.data_ptr(),
            mode,
            rows,
            n,
            record.address,
            0 if scale_bytes is None else scale_bytes.data_ptr(),
            0 if level0 is None else level0.data_ptr(),
            tensor_scale,
            applied_scale,
            *self._crew("quantize", rows * n),
        )

    def _msmodelslim_bytes(
        self, x: torch.Tensor, rows: int, n: int, profile: Profile
    ) -> torch.Tensor:
        """Scale bytes of that exporter, whose logarithm only PyTorch itself repeats bit for bit."""
        amax_bits = torch.empty(rows * -(-n // profile.block_size), dtype=torch.int32)
        self._kernels.block_maxima(
            x.data_ptr(), self._dtypes[x.dtype], amax_bits.data_ptr(), rows, n, profile.block_size
        )
        return scales.msmodelslim_bytes(amax_bits, x.dtype).to(torch.uint8)


def load(device: torch.device) -> CpuBackend:
    """The backend for ``device``, a CPU."""
    return CpuBackend()


@dataclass(frozen=True)
class _Record:
    """What the kernels must know of a profile: an int64 array, and the tables that it points to."""

    profile: Profile
    fields: np.ndarray[Any, np.dtype[np.int64]]
    tables: tuple[torch.Tensor, ...]
    unit: int  # rows of a multiple of it may be joined
    address: int
    finite_only: bool

    def moves(self, x: torch.Tensor, axis: int) -> bool:
        """Whether the blocked axis is not the last one. ValueError if there is no such axis."""
        rank, forced = x.dim(), self.profile.forced_axis
        if not -rank <= axis < rank:
            raise ValueError(f"axis {axis} does not exist in a tensor of {rank} dimension(s)")
        if forced is not None and axis % rank != forced % rank:
            raise ValueError(
                f"profile {self.profile.name!r} runs its blocks along axis {forced} only, "
                f"not {axis}"
            )
        return axis % rank != rank - 1


@lru_cache(maxsize=64)
def _record(name: str) -> _Record:
    k = _kernels()
    profile = get_profile(name)
    rules = {
        "quant_compute": k.QUANT_COMPUTE,
        "msmodelslim": k.GIVEN,
        "mse": k.MSE,
        "e4m3": k.E4M3,
        "e4m3_clamped_carry": k.CLAMPED_CARRY,
    }
    roundings = {
        "half_even": k.NEAREST,
        "half_away": k.NEAREST if profile.scale_format == "e8m0" else k.HALF_AWAY,
        "half_down": k.HALF_DOWN,
        "toward_zero": k.TOWARD_ZERO,
        "toward_minus_inf": k.TOWARD_MINUS_INF,
    }
    tables: tuple[torch.Tensor, ...] = ()
    if profile.scale_format == "e8m0":
        tables = scales.e8m0_tables(profile, torch.device("cpu"))
    fields = np.zeros(k.P_FIELDS, np.int64)
    fields[k.P_BLOCK] = profile.block_size
    fields[k.P_RULE] = rules.get(profile.scale_rule, k.BINADE)
    fields[k.P_BUMP] = scales.BUMPS.get(profile.scale_rule, 0)
    fields[k.P_INF_SATURATES] = profile.inf == "saturate"
    fields[k.P_ROUNDING] = roundings[profile.rounding]
    fields[k.P_CUT] = profile.scale_format == "e8m0" and profile.rounding == "half_away"
    fields[k.P_DIVIDES] = (
        profile.quotient == "division" or profile.scale_rule == "e4m3_clamped_carry"
    )
    fields[k.P_LEVEL0] = profile.level0_block
    for field, table in zip((k.P_FACTORS, k.P_VALUES, k.P_BYTES), tables, strict=False):
        fields[field] = table.data_ptr()
    return _Record(
        profile,
        fields,
        tables,
        unit=max(profile.block_size, profile.level0_block),
        address=fields.ctypes.data,
        finite_only=profile.nan == "error",
    )


@lru_cache(maxsize=4)
def _values_of_bytes(scale_format: str) -> torch.Tensor:
    """fp32 [256]: what each scale byte stands for."""
    profile = next(p for p in numerics.PROFILES.values() if p.scale_format == scale_format)
    return scales.values_from_bytes(torch.arange(256).to(torch.uint8), profile)


def _tensor_scale(
    x: torch.Tensor, profile: Profile, given: torch.Tensor | None
) -> tuple[float, torch.Tensor | None]:
    """The tensor scale as a number (-1: the profile has none) and as an fp32 scalar.

    Raises ValueError if the given one is not one finite number >= 0, or is not wanted.
    """
    if not profile.tensor_scale:
        if given is not None:
            raise ValueError(f"profile {profile.name!r} has no tensor scale; leave it out")
        return _NO_TENSOR_SCALE, None
    if given is None:
        scale = nvfp4_tensor_scale(scales.largest_finite(x))
    elif given.numel() != 1:
        raise ValueError(f"tensor_scale must be one number, not shape {tuple(given.shape)}")
    else:
        scale = given.detach().to(device=x.device, dtype=torch.float32).reshape(())
    number = scale.item()
    if not 0 <= number < float("inf"):
        raise ValueError(f"tensor_scale must be finite and not negative, not {number}")
    return number, scale


def _rows(x: torch.Tensor, unit: int) -> tuple[int, int]:
    """Contiguous ``x`` as rows of n elements; rows of whole units are joined to one."""
    n = x.shape[-1]
    return (1, x.numel()) if n % unit == 0 else (x.numel() // n, n)


def _check_on_cpu(x: torch.Tensor) -> None:
    if not x.is_cpu:
        raise ValueError(
            f"the cpu backend got a tensor on {x.device}; choose the backend of that device"
        )


def _kernels() -> Any:
    """The module of the compiled kernels, imported when it is first needed."""
    try:
        return importlib.import_module("npu_qat.backends.cpu_kernels")
    except ImportError as error:
        raise BackendUnavailable(
            f"compiled kernels need Numba ({error}); pip install numba, or use --backend reference"
        ) from None


def _share_openmp() -> bool:
    """Tell LLVM where the OpenMP functions are that PyTorch itself runs on.

    A symbol that is looked up through ``libtorch_cpu`` is found in the library that it was linked
    with: two OpenMP libraries in one process would be two pools. Returns whether there is one; if
    not, the names still need an address, but nothing calls it.
    """
    try:
        llvm = importlib.import_module("llvmlite.binding")
    except ImportError:
        return False  # `_kernels` says so
    found = {}
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"):
            found[name] = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except (OSError, AttributeError):
        found = {}
    unused = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
    llvm.add_symbol("npu_qat_gomp_parallel", found.get("GOMP_parallel", unused))
    llvm.add_symbol("npu_qat_omp_get_thread_num", found.get("omp_get_thread_num", unused))
    llvm.add_symbol("npu_qat_omp_get_num_threads", found.get("omp_get_num_threads", unused))
    return bool(found)
