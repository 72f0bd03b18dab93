"""An independent statement of what a quantised linear computes, for the tests of this room.

Written with numpy in fp64 and by search over the eight magnitudes instead of bit operations, so
that it shares no code and no trick with ``npu_qat.numerics``. Only the two profiles that the layers
are tested with, only for finite values of ordinary size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

GRID = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _blocks(x: np.ndarray, size: int) -> np.ndarray:
    tail = -x.shape[-1] % size
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, tail)])
    return padded.reshape(*x.shape[:-1], -1, size)


def _nearest(magnitude: np.ndarray, *, ties_away: bool) -> np.ndarray:
    """The nearest of ``GRID``; ties to the larger one, or to the even code."""
    distance = np.abs(magnitude[..., None] - GRID)
    lower = distance.argmin(-1)
    upper = 7 - distance[..., ::-1].argmin(-1)
    return GRID[upper if ties_away else np.where(lower % 2 == 0, lower, upper)]


def mxfp4(x: torch.Tensor) -> torch.Tensor:
    """``ascend950`` along the last axis: floor scale, ties away from zero. Same dtype as ``x``."""
    blocks = _blocks(x.detach().double().numpy(), 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    exponent = np.frexp(np.where(amax == 0, 1.0, amax))[1] - 1
    scale = np.ldexp(1.0, exponent - 2)
    values = np.sign(blocks) * _nearest(np.abs(blocks) / scale, ties_away=True) * scale
    return torch.from_numpy(values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]).to(x.dtype)


def tensor_scale(amax: float) -> np.float32:
    """NVFP4's: the largest magnitude maps to 6 * 448."""
    return np.float32(amax) / np.float32(2688.0)


def nvfp4(x: torch.Tensor, amax: float) -> torch.Tensor:
    """``nvfp4`` along the last axis for a tensor whose largest magnitude is ``amax``; fp64."""
    blocks = _blocks(x.detach().double().numpy(), 16)
    top = np.abs(blocks).max(-1, keepdims=True).astype(np.float32)
    whole = tensor_scale(amax)
    wanted = torch.from_numpy(np.asarray(top / np.float32(6.0) / whole)).clamp(max=448.0)
    scale = wanted.to(torch.float8_e4m3fn).double().numpy()
    # The profile multiplies by the fp32 reciprocal: it decides where a quotient is nearly a tie.
    inverse = np.float32(1.0) / (np.where(scale == 0, 1.0, scale).astype(np.float32) * whole)
    quotient = (np.abs(blocks).astype(np.float32) * inverse).astype(np.float64)
    values = np.sign(blocks) * _nearest(quotient, ties_away=False) * scale * whole
    return torch.from_numpy(values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]])


class ReferenceLinear(nn.Module):
    """``Q_a(x) Q_w(W)^T + b`` spelt out; every part can be left out."""

    def __init__(self, linear: nn.Linear, injection_point: str, axis: int = -1) -> None:
        super().__init__()
        self.point = injection_point
        weight = linear.weight.detach()
        if injection_point in ("weight", "both", "weight_output"):
            weight = mxfp4(weight) if axis == -1 else mxfp4(weight.T.contiguous()).T.contiguous()
        self.weight, self.bias = weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(mxfp4(x) if self.point in ("input", "both") else x, self.weight, self.bias)
        return mxfp4(y) if self.point in ("output", "weight_output") else y


def reference_model(model: nn.Module, injection_point: str, *, axis: int = -1) -> nn.Module:
    """Replace, in place, every linear of the decoder layers by a ``ReferenceLinear``."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in path:
            parent, _, name = path.rpartition(".")
            replaced = ReferenceLinear(module, injection_point, axis)
            setattr(model.get_submodule(parent), name, replaced)
    return model
