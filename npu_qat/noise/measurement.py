"""Proof that the weights carry the noise that was asked for, from the weights themselves.

Three rules, each of which earlier public code broke without noticing:

1. If the draw changes some weight, the weights read back from the modules have changed.
2. Each element differs from its clean value by the drawn noise, up to rounding: the sum ``w + z``
   is rounded to fp32 and then to the norm's dtype, both to nearest, so it moves by at most
   ``(u_fp32 + u_dtype)(|w| + |z|)`` with ``u`` the unit roundoff, half of ``torch.finfo.eps``.
3. The standard deviation of the differences, each over its multiplier, is sigma. That of ``n``
   draws scatters by ``sigma / sqrt(2 n)``, of which 6 are allowed: 2e-9 of honest draws lie
   further off. Rounding moves it by at most the root mean square of rule 2's bounds (triangle
   inequality). In fp32 that term is nearly 0; in bf16 it makes the rule as loose as bf16 is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_qat.noise.norms import NoiseError

SAMPLING_BOUND = 6.0
"""Standard errors that the measured sigma may lie off."""

INERT_BELOW = 0.05
"""Noise that changes a smaller share of the elements than this is inert."""


@dataclass(frozen=True)
class Change:
    """One norm with noise. Tensors on the CPU, of one shape ``[hidden]``.

    ``clean`` and ``noisy`` have the norm's dtype, ``noise`` is fp32 with the multiplier in it.
    """

    path: str
    multiplier: float
    clean: Tensor
    noise: Tensor
    noisy: Tensor

    @property
    def difference(self) -> Tensor:
        """What really changed, in float64."""
        return self.noisy.double() - self.clean.double()

    @property
    def rounding_bound(self) -> Tensor:
        """How far ``difference`` may lie from ``noise``, in float64 (rule 2)."""
        info = torch.finfo(self.clean.dtype)
        # 1.01 covers the product of both roundoffs; the last term covers subnormal results.
        roundoff = 1.01 * 0.5 * (info.eps + torch.finfo(torch.float32).eps)
        size = self.clean.double().abs() + self.noise.double().abs()
        return roundoff * size + info.smallest_normal * info.eps


@dataclass(frozen=True)
class Measured:
    """Statistics of several changes, pooled over the norms with a multiplier above 0.

    ``sigma`` is the standard deviation of the differences over multipliers, ``rounding`` the root
    mean square of their rounding bounds; ``rms`` and ``rms_multiplier`` are plain root mean squares
    of the differences and of the multipliers, over elements.
    """

    norms: int
    norms_changed: int
    elements: int
    changed_fraction: float
    sigma: float
    rounding: float
    rms: float
    rms_multiplier: float

    @property
    def inert(self) -> bool:
        return self.changed_fraction < INERT_BELOW


def measure(changes: Sequence[Change]) -> Measured:
    """Pool ``changes``, of which at least one has a multiplier above 0."""
    noisy = [change for change in changes if change.multiplier > 0.0]
    raw = torch.cat([change.difference for change in noisy])
    scaled = torch.cat([change.difference / change.multiplier for change in noisy])
    bounds = torch.cat([change.rounding_bound / change.multiplier for change in noisy])
    multipliers = torch.cat([torch.full_like(c.difference, c.multiplier) for c in noisy])
    return Measured(
        norms=len(noisy),
        norms_changed=sum(bool(change.difference.any()) for change in changes),
        elements=raw.numel(),
        changed_fraction=float((raw != 0).double().mean()),
        sigma=float(scaled.std(correction=0)),
        rounding=_rms(bounds),
        rms=_rms(raw),
        rms_multiplier=_rms(multipliers),
    )


def verify(step: int, sigma: float, planned: Sequence[Change], found: Sequence[Change]) -> Measured:
    """Measure ``found``, read back from the modules, against the draw ``planned`` and ``sigma``.

    Raises ``NoiseError`` if one of the three rules of this module is broken.
    """
    measured = measure(found)
    if measured.norms_changed == 0 and measure(planned).norms_changed > 0:
        raise NoiseError(
            f"step {step}: sigma is {sigma:g}, but 0 of {measured.norms} norms changed; the "
            "weights that the modules hold are not the ones that were written"
        )
    for change in found:
        error = (change.difference - change.noise.double()).abs()
        if bool((error > change.rounding_bound).any()):
            raise NoiseError(
                f"step {step}: the weight of norm {change.path} is up to {float(error.max()):.3g} "
                "off from clean weight plus noise, more than rounding explains; does another "
                "module share this weight?"
            )
    sampling = SAMPLING_BOUND * sigma / math.sqrt(2 * measured.elements)
    if abs(measured.sigma - sigma) > sampling + measured.rounding:
        raise NoiseError(
            f"step {step}: the noise on the weights has a standard deviation of "
            f"{measured.sigma:.6g}, but the schedule says {sigma:.6g} "
            f"(+- {sampling + measured.rounding:.2g} for {measured.elements} elements)"
        )
    return measured


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
