"""Starting kernels cheaply.

Triton's own ``kernel[grid](...)`` looks at every argument to find the compiled variant, which costs
more host time than a small kernel needs on the device. ``CachedLaunch`` keeps the compiled kernel
of one set of compile-time constants and calls its launcher directly. That is sound where the
variant depends on nothing else: integers are declared ``do_not_specialize`` and pointers are
multiples of 16 bytes, which the caller checks (PyTorch's allocator gives 512; a view may not).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

INT32_LIMIT = 1 << 31
# The compiler must not merge products and sums that the reference rounds one by one.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


# Triton itself decides when it is imported.
_INTERPRETED = bool(triton.knobs.runtime.interpret)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return _INTERPRETED


def _hooked() -> bool:
    """Whether a profiler hooks into launches, which Triton's own way of launching calls."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))  # a chain of hooks since Triton 3.5


def launch(kernel: Any, grid: tuple[int, int, int], args: Sequence[Any], **constants: Any) -> None:
    """Start ``kernel`` by Triton's own way, on the device of the first tensor in ``args``."""
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    with _current(device.index if device.type == "cuda" else None):
        kernel[grid](*args, **constants, **OPTIONS)


def _current(device: int | None) -> AbstractContextManager[Any]:
    """Make ``device`` the current one, which costs time only where it is not."""
    if device is None or torch._C._cuda_getDevice() == device:
        return nullcontext()
    return torch.cuda.device(device)


class CachedLaunch:
    """One kernel with its compile-time constants; compiled at the first call, on one device."""

    def __init__(
        self, kernel: Any, constants: Mapping[str, Any], *, cached: bool = True, **options: Any
    ) -> None:
        # Off for pointers that are not multiples of 16: Triton then looks at every launch.
        self._cached = cached
        self._kernel, self.constants = kernel, dict(constants)
        self._options = {**OPTIONS, **options}
        # The launcher takes the compile-time constants too, and ignores them.
        self._ordered = tuple(self.constants.values())
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], args: Sequence[Any], device: int) -> None:
        """Launch with ``args``, the run-time arguments in the order of the kernel's signature."""
        if not _INTERPRETED and torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                self(grid, args, device)
            return
        compiled = self._compiled
        if not compiled or not self._cached or _hooked():
            self._compiled = self._kernel[grid](*args, **self.constants, **self._options)
            return
        # An address in place of a tensor spares the launcher a look at the tensor.
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
        compiled.run(
            *grid,
            torch._C._cuda_getCurrentRawStream(device),
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *values,
            *self._ordered,
        )
