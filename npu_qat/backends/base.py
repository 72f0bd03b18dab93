"""The contract between the quantised layers and whoever computes the 4-bit numbers.

A backend answers three calls, all without gradients (the straight-through estimator lives in
``layers/``). Its results equal ``npu_qat.numerics`` code by code; a backend that cannot compute a
profile says so and never substitutes another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from npu_qat.numerics import QuantizedTensor


class BackendUnavailable(ValueError):
    """A named device or a profile on it is not to be had here; the message says what to do."""


class Backend(Protocol):
    """Computes encode, decode and fake-quant for tensors on one kind of device."""

    name: str

    def fake_quant(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``decode(encode(x))`` in the shape and dtype of ``x``."""
        ...

    def quantize(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
    ) -> QuantizedTensor:
        """Codes and scale bytes of ``x``."""
        ...

    def dequantize(self, q: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The values that ``q`` stands for, in ``dtype``."""
        ...
