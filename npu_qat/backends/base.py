"""The contract between the quantised layers and whoever computes the 4-bit numbers.

Three calls are the numbers themselves, without gradients (the straight-through estimator lives in
``layers/``): ``fake_quant``, ``quantize``, ``dequantize``. Their results equal ``npu_qat.numerics``
code by code; a backend that cannot compute a profile says so and never substitutes another.

The matmul of a quantised layer comes in two modes:

* **emulated**: ``linear``, a 16-bit product with the weight that the packed codes stand for. Every
  backend has it; a fast one reads the 4 bits instead of a decoded copy.
* **fused**: the device multiplies the codes themselves (Ascend 950). The weight is brought into the
  device's layout once (``prepare_weight``), an input is encoded once for all layers that read it
  (``encode_input``), and ``fused_linear`` multiplies the two. Only a ``FusedBackend`` has it.

Both give the same products, which are exact in fp32; they differ in the order of fp32 summation and
in that the emulated operands pass through a 16-bit tensor (exact for MXFP4 above 2^-126).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from npu_qat.numerics import QuantizedTensor


class BackendUnavailable(ValueError):
    """A named device or a profile on it is not to be had here; the message says what to do."""


@dataclass(frozen=True)
class PackedWeight:
    """A frozen weight [N, K] as it is stored: two codes a byte, and its scales.

    Named and laid out as in ``QuantizedTensor`` (``packed``, ``scales``, ...), but nothing is
    unpacked until ``unpack`` is called.

    Attributes:
        packed: uint8, [N, ceil(K / 2)] for axis 1, [ceil(N / 2), K] for axis 0; the even element
            in the low nibble.
        scales: uint8, one a block along ``axis``.
        shape: (N, K).
        profile: name of the numerics profile.
        axis: the blocked axis, 0 or 1.
        tensor_scale: fp32 scalar, or None; None for a tensor-scaled profile stands for 1 (the layer
            then applies the scale to the result).
        level0_scales: fp32 [N, ceil(K / 512)] of dual-level profiles, or None.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int]
    profile: str
    axis: int = 1
    tensor_scale: torch.Tensor | None = None
    level0_scales: torch.Tensor | None = None

    @classmethod
    def of(cls, q: QuantizedTensor) -> PackedWeight:
        """``q`` [N, K] with its codes packed."""
        rows, columns = q.shape
        return cls(
            q.packed,
            q.scales,
            (rows, columns),
            q.profile.name,
            q.axis,
            q.tensor_scale,
            q.level0_scales,
        )

    def unpack(self) -> QuantizedTensor:
        """The same with one code a byte."""
        from npu_qat.numerics import QuantizedTensor, get_profile

        q = QuantizedTensor.from_packed(
            self.packed,
            self.scales,
            shape=self.shape,
            profile=replace(get_profile(self.profile), tensor_scale=False),
            axis=self.axis,
            level0_scales=self.level0_scales,
        )
        return replace(q, profile=get_profile(self.profile), tensor_scale=self.tensor_scale)


class Backend(Protocol):
    """Computes 4-bit numbers, and products with them, for tensors on one kind of device.

    Attributes:
        name: what runs and reports call it.
    """

    name: str

    def describe(self) -> dict[str, str]:
        """What computes, for the record of a run: ``name``, and versions or variants of it."""
        ...

    def check_profile(self, profile: str) -> None:
        """Raise ``BackendUnavailable`` that lists what it computes, if not ``profile``."""
        ...

    def fake_quant(
        self,
        x: torch.Tensor,
        profile: str,
        axis: int = -1,
        *,
        tensor_scale: torch.Tensor | None = None,
        apply_tensor_scale: bool = True,
    ) -> torch.Tensor:
        """``decode(encode(x))`` in the shape and dtype of ``x``.

        With ``apply_tensor_scale=False`` a tensor-scaled profile gives element x block scale, which
        is exact in bf16; the layer applies the tensor scale to the result of the matmul.
        """
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

    def dequantize(self, q: QuantizedTensor | PackedWeight, dtype: torch.dtype) -> torch.Tensor:
        """The values that ``q`` stands for, in ``dtype``."""
        ...

    def linear(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """``x W^T + b``, without a gradient.

        Args:
            x: [.., K] in 16 or 32 bits, as it enters the matmul (quantised before, or not).
            weight: [N, K]. Its values are those of ``dequantize`` in ``x``'s dtype.
            bias: [N] or None.
            out_dtype: of the result; default ``x``'s.

        Returns [.., N], equal to ``F.linear`` on these values up to the order of fp32 summation.
        """
        ...


@dataclass(frozen=True)
class EncodedInput:
    """An activation in the form that a fused matmul reads; made by ``encode_input``.

    Attributes:
        codes, scales: whatever the device takes; opaque outside the backend.
        shape: of the tensor that was encoded.
        dtype: of that tensor.
        profile: name of the numerics profile.
        level0_scales: fp32 scales of dual-level profiles, or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    profile: str
    level0_scales: torch.Tensor | None = None


@runtime_checkable
class FusedBackend(Backend, Protocol):
    """A backend whose device multiplies 4-bit codes."""

    def check_fused(
        self, weight_profile: str, activation_profile: str, in_features: int, out_features: int
    ) -> None:
        """Raise ``BackendUnavailable`` if the device has no such product [.., K] x [N, K]."""
        ...

    def encode_input(self, x: torch.Tensor, profile: str) -> EncodedInput:
        """Codes and scales of ``x`` [.., K] along K, in the device's layout."""
        ...

    def decode_input(self, encoded: EncodedInput) -> torch.Tensor:
        """The values that ``encoded`` stands for, in the shape and dtype of the input."""
        ...

    def prepare_weight(self, weight: PackedWeight, *, resident: bool = False) -> object:
        """``weight`` [N, K], blocked along K, in the layout that ``fused_linear`` reads.

        ``resident``: time matters more than memory.
        """
        ...

    def fused_linear(
        self,
        x: EncodedInput,
        weight: object,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """``x W^T + b`` [.., N] by the device's 4-bit matmul, in ``out_dtype`` (default: of the
        tensor that was encoded), without a gradient."""
        ...


@runtime_checkable
class FusedOnRequest(Backend, Protocol):
    """A backend whose device multiplies codes, but adds the products up with fewer bits than fp32
    and unlike any serving stack: ``matmul: fused`` takes it, ``auto`` does not."""

    def fused(self) -> FusedBackend:
        """The same backend with the matmul of codes."""
        ...
