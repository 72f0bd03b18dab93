"""Block rotation of a linear's input: spread an outlier over its block before 4 bits see it.

One scale serves a block of 32 channels, so one channel that is much larger than its neighbours
pushes them towards zero. Multiplying each block by a Hadamard matrix ``H`` (entries +-1,
``H H = 32 I``) mixes its channels evenly and costs additions only. The product is the same,

    x W^T = (x H / 4) (W H / 8)^T          because H H^T / 32 = I

so the rotated weight is folded once, before it is quantised, and the input is rotated whenever the
layer runs (a trade: 5 additions an element, online). With factors that are powers of two the only
rounding is that of the rotated tensor to its own dtype. LoRA reads the input as it came.

What is given up: the serving stack must rotate the input too. Stock vllm-ascend does not, so such a
model is not exported. A rotation of whole rows could be folded into the norms of a model and serve
anywhere, but it mixes blocks, which is what MXFP4's block scales live by (arXiv 2511.04214 finds
that it fails there and that the block rotation repairs it).

The order of the sums is fixed (five butterfly stages in fp32, distance 1, 2, 4, 8, 16), so that
every device gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch

ROTATION_BLOCK = 32
INPUT_FACTOR = 0.25
WEIGHT_FACTOR = 0.125


def rotate_blocks(x: torch.Tensor, factor: float) -> torch.Tensor:
    """``factor * (x H)`` for each block of 32 along the last axis, in the dtype of ``x``.

    ``H`` is Sylvester's Hadamard matrix, ``H[i, j] = (-1)^popcount(i & j)``. Computed in fp32, no
    gradient.

    Args:
        x: [..., K], fp32 or 16 bits.
        factor: a power of two, so that it rounds nothing.

    Raises:
        ValueError: K is not a multiple of 32.
    """
    k = x.shape[-1]
    if k % ROTATION_BLOCK:
        raise ValueError(
            f"quant.rotation: hadamard32 needs inputs that are a multiple of {ROTATION_BLOCK} "
            f"long, not {k}; exclude such linears, or set rotation: none"
        )
    with torch.no_grad():
        now = x.detach().to(torch.float32, copy=True).reshape(-1)
        after = torch.empty_like(now)
        distance = 1
        while distance < ROTATION_BLOCK:
            # [pairs, 2, distance]: partners are `distance` apart.
            pairs, out = (t.view(-1, 2, distance) for t in (now, after))
            torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
            torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
            now, after = after, now
            distance *= 2
        return now.mul_(factor).view(x.shape).to(x.dtype)


@runtime_checkable
class RotatingBackend(Protocol):
    """A backend that rotates blocks in the pass that quantises them."""

    def rotates(self, x: torch.Tensor, profile: str) -> bool:
        """Whether the two calls below take ``x``."""
        ...

    def quantize_rotated(self, x: torch.Tensor, profile: str, factor: float) -> torch.Tensor:
        """``fake_quant(rotate_blocks(x, factor), profile)``."""
        ...

    def rotate(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        """``rotate_blocks(x, factor)``."""
        ...


class _QuantizeRotated(torch.autograd.Function):
    """``quantizer(x)`` of a quantiser that rotates first; straight-through for its rounding."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        quantizer: Callable[[torch.Tensor], torch.Tensor],
        rotate: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.rotate = rotate
        return quantizer(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.rotate(grads[0]), None, None


def quantize_rotated_input(x: torch.Tensor, profile: str, backend: RotatingBackend) -> torch.Tensor:
    """``Q(x H / 4)`` [..., K] in one pass, with the straight-through gradient."""
    result: torch.Tensor = _QuantizeRotated.apply(
        x,
        lambda t: backend.quantize_rotated(t, profile, INPUT_FACTOR),
        lambda grad: backend.rotate(grad, INPUT_FACTOR),
    )
    return result


class _RotateInput(torch.autograd.Function):
    """``x H / 4``; H is symmetric, so the gradient is the same map."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return rotate_blocks(x, INPUT_FACTOR)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return rotate_blocks(grads[0], INPUT_FACTOR)


def rotate_input(x: torch.Tensor) -> torch.Tensor:
    """``x H / 4`` [..., K] with its gradient, in the dtype of ``x``."""
    rotated: torch.Tensor = _RotateInput.apply(x)
    return rotated


def rotate_weight(weight: torch.Tensor) -> torch.Tensor:
    """``W H / 8`` [N, K]: what meets ``rotate_input(x)`` to give ``x W^T``."""
    return rotate_blocks(weight, WEIGHT_FACTOR)
