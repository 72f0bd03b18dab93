"""The kernels on the host model: built with the C++ compiler once, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from kernels_ascendc.build import build_host
from kernels_ascendc.roofline import Tiling
from npu_qat.backends.ascendc.rules import kernel_rule

KERNELS = Path(__file__).parents[2] / "kernels_ascendc"
SUFFIX = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def build(target: Path, folder: Path = KERNELS) -> Path:
    """The library of the kernels in `folder`; the test is skipped without a C++ compiler.

    This checkout's kernels are compiled once a process: that is the slow part of their tests.
    """
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler (g++ or clang++)")
    if folder != KERNELS:
        return build_host(target, folder)
    return Path(shutil.copy2(Path(_compiled().name) / "kernels.so", target))


@functools.cache
def _compiled() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="npu-qat-kernels-")
    build_host(Path(folder.name) / "kernels.so")
    return folder


class HostKernels:
    """The launches, on torch tensors; `cores`: how many cores the launch has."""

    def __init__(self, library: Path, cores: int = 3) -> None:
        self.library = ctypes.CDLL(str(library))
        self.cores = cores

    def fake_quant(self, x: torch.Tensor, profile: str) -> torch.Tensor:
        y = torch.full_like(x, float("nan"))
        self._call(f"mxfp4_fake_quant_{SUFFIX[x.dtype]}", x, profile, x, y)
        return y

    def pack(self, x: torch.Tensor, profile: str) -> tuple[torch.Tensor, torch.Tensor]:
        *rows, length = x.shape
        codes = torch.full((*rows, -(-length // 2)), 0xEE, dtype=torch.uint8)
        scales = torch.full((*rows, -(-length // 32)), 0xEE, dtype=torch.uint8)
        self._call(f"mxfp4_pack_{SUFFIX[x.dtype]}", x, profile, x, codes, scales)
        return codes, scales

    def dequant(
        self, codes: torch.Tensor, scales: torch.Tensor, length: int, dtype: torch.dtype
    ) -> torch.Tensor:
        y = torch.full((*codes.shape[:-1], length), float("nan"), dtype=dtype)
        self._call(f"mxfp4_dequant_{SUFFIX[dtype]}", y, "ascend950", codes, scales, y)
        return y

    def rms_norm_fake_quant(
        self, x: torch.Tensor, gamma: torch.Tensor, epsilon: float, profile: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, q = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
        name = f"rms_norm_mxfp4_fake_quant_{SUFFIX[x.dtype]}"
        self._call(name, x, profile, x, gamma, y, q, last=(ctypes.c_float(epsilon),))
        return y, q

    def _call(
        self,
        name: str,
        shape_of: torch.Tensor,
        profile: str,
        *tensors: torch.Tensor,
        last: tuple[ctypes.c_float, ...] = (),
    ) -> None:
        assert all(t.is_contiguous() for t in tensors)
        rule = kernel_rule(profile)
        length = shape_of.shape[-1]
        tiling = Tiling(shape_of.numel() // length, length, *astuple(rule))
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        launch = getattr(self.library, f"launch_{name}")
        launch(ctypes.c_int64(self.cores), *pointers, ctypes.byref(tiling), *last)
