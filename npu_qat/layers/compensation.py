"""Starting an adapter where quantisation left an error, instead of at zero.

A fresh adapter adds nothing (``B = 0``), so training first has to find out what rounding broke. But
what it broke can be computed: on calibration inputs ``x`` a quantised linear misses

    d = W x - Q_w(W) Q_a(x)

and the adapter, which stays in 16 bits and reads the 16-bit ``x``, can add ``M x`` of rank ``r``.
The best such ``M``, least squares over the inputs, is known in closed form (reduced-rank
regression; Izenman 1975, J. Multivariate Anal. 5):

    C = E[x x^T] = L L^T,   G = E[d x^T],   G L^-T = U S V^T,   M_r = U_r S_r V_r^T L^-1

With 16-bit inputs ``d = (W - Q(W)) x`` and this is QERA's solution (arXiv 2410.06040), which weighs
the weight's error by what is fed to it; one round of LoftQ (arXiv 2310.08659) is the case
``C = I``. In W4A4 it does more: a channel that shares its block with an outlier is often rounded to
zero whatever it carries, so ``d`` holds ``W x`` of that channel, and a rank a channel gives it
back.

The frozen base is unchanged and the adapter is an ordinary one, so every server that serves
adapters serves this. What is given up: a pass over calibration data, and ranks that training then
moves away from instead of finding its own.

Shapes: T tokens, K = in_features, N = out_features, r = rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from npu_qat.layers.audit import Check
from npu_qat.layers.lora import ADAPTER, QatLoraLinear
from npu_qat.layers.quant_linear import QuantLinear

# Added to the diagonal of C, relative to it: few tokens must not decide what a rare channel does.
RIDGE = 0.01
# Statistics kept at a time, or one linear's if that is larger; a larger model takes several passes
# over the calibration data.
BUDGET_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Compensation:
    """What the start of one adapter does on the calibration inputs.

    Attributes:
        path: of the linear.
        before: squared error of its output without the adapter, over the squared output.
        after: the same with it.
    """

    path: str
    before: float
    after: float


class _Statistics:
    """Sums over calibration tokens for one linear: fp32 products, summed in float64."""

    def __init__(self, layer: QuantLinear, device: torch.device) -> None:
        n, k = layer.out_features, layer.in_features
        self.layer = layer

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.xx, self.dx = zeros(k, k), zeros(n, k)
        # Tensors, so that the host need not wait for the device at every linear.
        self._error, self._output = zeros(), zeros()

    @staticmethod
    def bytes_of(layer: QuantLinear) -> int:
        return 8 * layer.in_features * (layer.in_features + layer.out_features)

    def see(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add tokens: the 16-bit linear gave ``y`` [..., N] for ``x`` [..., K]."""
        d = (y.float() - self.layer(x).float()).flatten(0, -2)
        rows = x.float().flatten(0, -2)
        self.xx += rows.T @ rows
        self.dx += d.T @ rows
        self._error += d.square().sum()
        self._output += y.float().square().sum()

    def relative_error(self, factors: tuple[torch.Tensor, torch.Tensor] | None = None) -> float:
        """Squared error over squared output, with the adapter ``B A`` if ``factors`` are given.

        E|d - BAx|^2 = E|d|^2 - 2 <BA, G> + <BA C, BA>.
        """
        error = self._error
        if factors is not None:
            ba = factors[1].double() @ factors[0].double()
            error = error - 2 * (ba * self.dx).sum() + ((ba @ self.xx) * ba).sum()
        return float(error / self._output)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [r, K], B [N, r]) in fp32, of equal norm.

        Raises:
            ValueError: no token was seen, or only zeros.
        """
        if float(self._output) == 0.0:
            raise ValueError(f"{self.layer.path}: the calibration fed it nothing but zeros")
        diagonal = self.xx.diagonal()
        # A channel that was always zero says nothing; any positive number keeps C regular.
        floor = diagonal.max() * 1e-12
        c = self.xx + torch.diag(RIDGE * diagonal + floor)
        lower = torch.linalg.cholesky(c)
        p = torch.linalg.solve_triangular(lower, self.dx.T, upper=False).T  # G L^-T
        u, s, vt = _leading_singular(p, rank)
        root = s.sqrt()
        a = torch.linalg.solve_triangular(lower.T, (vt * root[:, None]).T, upper=True).T
        return a.float(), (u * root).float()


def _leading_singular(
    p: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [N, r], S [r], V^T [r, K]) of ``p`` [N, K]; a rank above min(N, K) is filled with zeros.

    By the eigenvectors of the smaller Gram matrix, which is many times faster than a full
    decomposition and exact enough for the leading ones.
    """
    wide = p.shape[0] <= p.shape[1]
    values, vectors = torch.linalg.eigh(p @ p.T if wide else p.T @ p)
    kept = min(rank, values.numel())
    s = values.flip(0)[:kept].clamp_min(0.0).sqrt()
    one = vectors.flip(1)[:, :kept]
    inverse = torch.where(s > 1e-9 * s[0], 1.0 / s, 0.0)
    other = (p.T @ one if wide else p @ one) * inverse
    u, v = (one, other) if wide else (other, one)
    missing = rank - kept
    pad = nn.functional.pad
    return pad(u, (0, missing)), pad(s, (0, missing)), pad(v, (0, missing)).T


@torch.no_grad()
def compensate(
    model: nn.Module, reference: nn.Module, run: Callable[[nn.Module], object]
) -> list[Compensation]:
    """Start the adapters of ``model`` from the error of its quantised linears.

    Args:
        model: a prepared model with fresh adapters, calibrated, in phase ``evaluation``.
        reference: the 16-bit model that it was prepared from, on the same device.
        run: feeds the calibration data to a model; called once or more with ``reference``.

    Returns:
        What was achieved, for each adapted quantised linear.

    Raises:
        ValueError: no adapted linear is quantised, or the data never reach one.
    """
    adapted = {
        m.get_base_layer().path: m
        for m in model.modules()
        if isinstance(m, QatLoraLinear) and isinstance(m.get_base_layer(), QuantLinear)
    }
    if not adapted:
        raise ValueError("lora.init: quantisation_error finds no adapter on a quantised linear")
    found = []
    for group in _groups(adapted):
        for path, statistics in _collect(group, reference, run).items():
            found.append(_start(group[path], path, statistics))
    return found


def _groups(adapted: Mapping[str, QatLoraLinear]) -> Iterator[dict[str, QatLoraLinear]]:
    """``adapted`` in parts whose statistics fit the budget."""
    part: dict[str, QatLoraLinear] = {}
    used = 0
    for path, layer in adapted.items():
        size = _Statistics.bytes_of(layer.get_base_layer())
        if part and used + size > BUDGET_BYTES:
            yield part
            part, used = {}, 0
        part[path] = layer
        used += size
    yield part


def _collect(
    group: Mapping[str, QatLoraLinear], reference: nn.Module, run: Callable[[nn.Module], object]
) -> dict[str, _Statistics]:
    device = next(reference.parameters()).device
    found = {path: _Statistics(m.get_base_layer(), device) for path, m in group.items()}
    with ExitStack() as hooks:
        for path, statistics in found.items():
            # A linear's only positional argument is its input.
            def see(_: nn.Module, args: Any, y: torch.Tensor, to: _Statistics = statistics) -> None:
                to.see(args[0], y)

            hooks.callback(reference.get_submodule(path).register_forward_hook(see).remove)
        run(reference)
    return found


def _start(layer: QatLoraLinear, path: str, statistics: _Statistics) -> Compensation:
    a, b = (part[ADAPTER].weight for part in (layer.lora_A, layer.lora_B))
    factors = statistics.factors(a.shape[0])
    a.copy_(factors[0])
    b.copy_(factors[1] / layer.scaling[ADAPTER])
    return Compensation(path, statistics.relative_error(), statistics.relative_error(factors))


def compensation_check(found: list[Compensation]) -> Check:
    """Whether every adapter started by taking error away."""
    better = [c for c in found if c.after < c.before]
    mean = [sum(getattr(c, kind) for c in found) / len(found) for kind in ("before", "after")]
    return Check(
        "adapters start from the quantisation error",
        f"less error in all of {len(found)} linears",
        f"less in {len(better)}; squared error over squared output, mean of the linears, "
        f"{mean[0]:.4f} without and {mean[1]:.4f} with the adapter",
        len(better) == len(found),
    )
