"""Who multiplies: the device's own 4-bit matmul, or a 16-bit matmul on the decoded values.

Decided once for a model, before its layers are made, from the recipe, the backend and the shapes of
all layers; the decision and its reason are in the audit. A model is never mixed: one layer that the
device cannot multiply puts all of them into emulation (``matmul: auto``) or is an error
(``matmul: fused``), because a run half of whose layers were emulated is hard to compare with
anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from npu_qat.backends import Backend, BackendUnavailable, FusedBackend, FusedOnRequest
from npu_qat.config import Recipe
from npu_qat.layers.plan import PlannedLinear


@dataclass(frozen=True)
class MatmulMode:
    """How the quantised layers of a model multiply.

    Attributes:
        reason: why, for the audit.
        backend: the backend whose device multiplies codes; None for emulation.
    """

    reason: str
    backend: FusedBackend | None = None

    @property
    def fused(self) -> bool:
        return self.backend is not None

    @property
    def name(self) -> str:
        return "fused" if self.fused else "emulated"


EMULATED = MatmulMode("no backend was asked")


def choose_matmul(recipe: Recipe, backend: Backend, plan: Iterable[PlannedLinear]) -> MatmulMode:
    """The mode of ``recipe.matmul`` for the planned layers on ``backend``.

    Raises:
        BackendUnavailable: ``matmul: fused`` where it is impossible; the message says why.
    """
    if recipe.matmul == "emulated":
        return MatmulMode("matmul: emulated was asked for")
    if recipe.matmul == "fused" and isinstance(backend, FusedOnRequest):
        backend = backend.fused()
    reason = _obstacle(recipe, backend, plan)
    if reason is None:
        assert isinstance(backend, FusedBackend)
        return MatmulMode(f"matmul: {recipe.matmul}, and {backend.name} multiplies codes", backend)
    if recipe.matmul == "fused":
        raise BackendUnavailable(f"quant.matmul: fused is not possible: {reason}. Use auto")
    return MatmulMode(f"matmul: auto, and {reason}")


def _obstacle(recipe: Recipe, backend: Backend, plan: Iterable[PlannedLinear]) -> str | None:
    """What stands against the fused matmul, or None."""
    if not isinstance(backend, FusedBackend):
        if isinstance(backend, FusedOnRequest):
            return f"backend {backend.name!r} multiplies codes on request only (matmul: fused)"
        return f"backend {backend.name!r} has no matmul of 4-bit codes"
    if recipe.injection_point != "both":
        return (
            f"injection_point {recipe.injection_point!r} leaves an operand of the matmul in 16 bits"
        )
    if recipe.rotates:
        return f"rotation {recipe.rotation!r}: the device's quantiser does not rotate its input"
    if recipe.block_axis != "row":
        return "the device contracts along the blocks, but block_axis is column"
    for planned in plan:
        if not planned.quantized:
            continue
        try:
            backend.check_fused(
                recipe.weight_profile,
                recipe.activation_profile,
                planned.in_features,
                planned.out_features,
            )
        except BackendUnavailable as error:
            return f"{planned.path}: {error}"
    return None
