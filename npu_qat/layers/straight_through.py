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
from torch.nn import functional as F

Quantizer = Callable[[torch.Tensor], torch.Tensor]


class StraightThrough(torch.autograd.Function):
    """``y = quantizer(x)``, ``dx = slope * dy``; the slope is 1 unless the quantiser rescales."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, quantizer: Quantizer, slope: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.slope = slope
        return quantizer(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grads[0]
        return grad if ctx.slope is None else (grad * ctx.slope).to(grad.dtype), None, None


class ZeroGradient(torch.autograd.Function):
    """``y = quantizer(x)``, ``dx = 0``: the true derivative of rounding.

    Not ``detach``: the graph stays connected, so that the failure that this reproduces shows as
    gradients that are exactly zero and not as parameters that were never reached.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, quantizer: Quantizer, slope: torch.Tensor | None
    ) -> torch.Tensor:
        return quantizer(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.zeros_like(grads[0]), None, None


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
        quantizer: maps ``x`` to a tensor of the same shape and dtype.
        use_ste: straight-through (True) or zero gradient (False).
        slope: fp32 scalar ``dQ/dx`` if the quantiser returns a rescaled tensor (NVFP4 returns
            ``x`` over its tensor scale); None means 1.
    """
    function = StraightThrough if use_ste else ZeroGradient
    return function.apply(x, quantizer, slope)


class FrozenLinear(torch.autograd.Function):
    """``y = x W^T + b`` where ``weight()`` gives the 16-bit ``W`` [out, in] when it is needed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        weight: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        grad_x = grads[0] @ ctx.weight() if ctx.needs_input_grad[0] else None
        return grad_x, None, None
