"""The two gradients that a frozen 4-bit base needs.

Rounding has derivative zero almost everywhere, so a network behind a quantiser learns nothing. The
straight-through estimator (Bengio et al., arXiv 1308.3432) pretends in the backward pass that the
quantiser was the identity: ``y = Q(x)``, ``dx = dy``. It is the identity for saturated elements
too: the largest magnitude of nearly every block saturates or rounds, and cutting those gradients
would cut the ones that matter most.

The frozen weight needs no gradient, so its linear saves no activation, and ``FrozenLinear`` asks
for the weight once more in the backward pass instead of keeping what the forward pass used: the
16-bit image of packed codes, or a weight that ZeRO-3 had gathered. What LoRA training keeps in
memory is then what 16-bit LoRA training keeps, or less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Quantizer = Callable[[torch.Tensor], torch.Tensor]


class StraightThrough(torch.autograd.Function):
    """``y = quantizer(x)``, ``dx = slope * dy``; the slope is 1 unless the quantiser rescales."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, quantizer: Quantizer, slope: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.slope, ctx.dtype = slope, x.dtype
        return quantizer(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grads[0]
        return (grad if ctx.slope is None else grad * ctx.slope).to(ctx.dtype), None, None


class ZeroGradient(torch.autograd.Function):
    """``y = quantizer(x)``, ``dx = 0``: the true derivative of rounding.

    Not ``detach``: the graph stays connected, so that the failure that this reproduces shows as
    gradients that are exactly zero and not as parameters that were never reached.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, quantizer: Quantizer, slope: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.dtype = x.dtype
        return quantizer(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.zeros_like(grads[0], dtype=ctx.dtype), None, None


def quantize_activation(
    x: torch.Tensor,
    quantizer: Quantizer,
    *,
    use_ste: bool,
    slope: torch.Tensor | None = None,
) -> torch.Tensor:
    """``quantizer(x)`` with the straight-through gradient, or with the zero gradient.

    Args:
        x: any shape, any floating dtype.
        quantizer: maps ``x`` to a tensor of the same shape, in ``x``'s dtype or a wider one.
        use_ste: straight-through (True) or zero gradient (False).
        slope: fp32 scalar ``dQ/dx`` if the quantiser returns a rescaled tensor (NVFP4 returns
            ``x`` over its tensor scale); None means 1.
    """
    function = StraightThrough if use_ste else ZeroGradient
    return function.apply(x, quantizer, slope)


class FrozenLinear(torch.autograd.Function):
    """``y = product(x)``, ``dx = dy W`` where ``weight()`` gives the 16-bit ``W`` [out, in].

    ``product`` computes ``x W^T + b`` by any means, differentiable or not: a 16-bit matmul, a
    kernel that reads packed codes, or an NPU's matmul of 4-bit codes. In the last case ``product``
    quantises ``x`` too, and ``dx`` is the straight-through gradient of both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        product: Callable[[torch.Tensor], torch.Tensor],
        weight: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return product(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        weight = ctx.weight()
        return (grads[0].to(weight.dtype) @ weight).to(ctx.dtype), None, None
