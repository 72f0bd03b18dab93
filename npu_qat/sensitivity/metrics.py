"""How far a 4-bit tensor is from what it stands for, in numbers that no few huge values decide.

Language models have *massive activations*: a handful of tokens whose hidden state is hundreds of
times larger than that of all others, and *outlier channels* which are large in every token. A
ratio of sums over the whole tensor, ``sum(x^2) / sum(e^2)``, is then a statement about one token:
the published scans reported one constant signal level over seventeen layers for that reason. So:

* **SQNR by row.** For each token (each output channel of a weight) ``10 log10(|x|^2 / |e|^2)``,
  and the quantiles of that over all rows. One number a row is all that is kept. The pooled ratio
  is reported beside it, with the share of the energy that lies in the largest row.
* **Cosine by row**, likewise.
* **Dead zone**: the share of non-zero elements that become zero, and how much of the tensor's
  energy they held.
* **Saturation**: the share of elements above the largest number that their block can hold
  (``6 x scale``), which are clipped to it.
* **Relative error by element**, ``mean(|e| / |x|)``, because the published thresholds use it. Each
  dead element counts as 1 however small it is, so the number mostly counts dead elements: a block
  rotation that improves the SQNR by 4 dB can multiply it by ten. It is marked *misleading* where
  most of it comes from dead elements that hold almost no energy.
* **Outlier channels**: input channels whose root mean square is many times the median channel's.

Shapes: a tensor is seen as rows [R, K], K the last axis (the contraction axis of a linear).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from npu_qat.numerics import QuantizedTensor, dequantize

QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}

EXACT_DB = 150.0
"""Stands for rows without any error: fp32 resolves less."""

OUTLIER_RATIO = 8.0
"""A channel with this many times the root mean square of the median channel is an outlier."""

MISLEADING_SHARE = 0.5
MISLEADING_ENERGY = 0.05
"""The elementwise error misleads if more than this share of it comes from elements rounded to zero
that hold less than this share of the energy."""

_LARGEST_CODE = 7  # E2M1 magnitude 6
_PUBLISHED_EPSILON = 1e-10  # of the published relative error


@dataclass(frozen=True)
class ErrorSummary:
    """Distance of two tensors, by row. ``sqnr_db`` and ``cosine`` map quantile names to values.

    Attributes:
        rows: rows with a non-zero value.
        sqnr_db: quantiles of the rows' signal-to-error ratio, in dB.
        sqnr_db_pooled: the ratio of the sums over all rows, in dB.
        cosine: quantiles of the rows' cosine similarity.
        relative_error: of the median row, ``|e| / |x|`` by Euclidean norms.
        largest_row_energy: share of ``sum(x^2)`` in the largest row.
    """

    rows: int
    sqnr_db: dict[str, float]
    sqnr_db_pooled: float
    cosine: dict[str, float]
    relative_error: float
    largest_row_energy: float


@dataclass(frozen=True)
class Outlier:
    """A channel and its root mean square over that of the median channel."""

    channel: int
    ratio: float


@dataclass(frozen=True)
class QuantizationSummary(ErrorSummary):
    """``ErrorSummary`` of a tensor and its quantised image, with what the format did to it.

    Attributes:
        dead_zone: share of the non-zero elements that became zero.
        dead_zone_energy: share of ``sum(x^2)`` that they held.
        saturation: share of the elements that were clipped.
        relative_error_elementwise: ``mean(|e| / |x|)`` over the non-zero elements.
        relative_error_misleading: whether that number mostly counts elements without energy.
        outlier_channels: the largest first.
    """

    dead_zone: float
    dead_zone_energy: float
    saturation: float
    relative_error_elementwise: float
    relative_error_misleading: bool
    outlier_channels: list[Outlier] = field(default_factory=list)


class RowErrors:
    """Collects ``ErrorSummary`` over many pairs of tensors, keeping two numbers a row."""

    def __init__(self) -> None:
        self._sqnr: list[Tensor] = []
        self._cosine: list[Tensor] = []
        self._signal = self._error = self._largest = 0.0

    def add(self, exact: Tensor, approximate: Tensor) -> None:
        """Compare two tensors [..., K] of one shape, any floating dtype.

        Raises ``ValueError`` for NaN or Inf, of which nothing can be said.
        """
        x = exact.detach().reshape(-1, exact.shape[-1]).float()
        y = approximate.detach().reshape(-1, exact.shape[-1]).float()
        signal = x.square().sum(-1, dtype=torch.float64)
        error = (x - y).square().sum(-1, dtype=torch.float64)
        other = y.square().sum(-1, dtype=torch.float64)
        if wrong := int((~(signal.isfinite() & error.isfinite())).sum()):
            raise ValueError(f"there is NaN or Inf in {wrong} of {len(signal)} rows")
        kept = signal > 0
        signal, error, other = signal[kept], error[kept], other[kept]
        cosine = (x * y).sum(-1, dtype=torch.float64)[kept] / (signal * other).sqrt()
        sqnr = (10.0 * (signal / error).log10()).clamp(max=EXACT_DB)
        self._sqnr.append(sqnr.float().cpu())
        self._cosine.append(
            cosine.nan_to_num(0.0).float().cpu()
        )  # an image of zeros points nowhere
        self._signal += float(signal.sum())
        self._error += float(error.sum())
        self._largest = max(self._largest, float(signal.max()) if len(signal) else 0.0)

    def summary(self) -> ErrorSummary:
        """Raises ``ValueError`` if no row with a non-zero value was seen."""
        sqnr, cosine = torch.cat(self._sqnr or [torch.empty(0)]), torch.cat(self._cosine or [])
        if not len(sqnr):
            raise ValueError("there is nothing to measure: every row is zero")
        quantiles = _quantiles(sqnr)
        return ErrorSummary(
            rows=len(sqnr),
            sqnr_db=quantiles,
            sqnr_db_pooled=decibel(self._signal, self._error),
            cosine=_quantiles(cosine),
            relative_error=10 ** (-quantiles["p50"] / 20),
            largest_row_energy=self._largest / self._signal,
        )


class QuantizationErrors:
    """Collects ``QuantizationSummary`` over tensors and their codes."""

    def __init__(self) -> None:
        self._rows = RowErrors()
        self._elements = self._nonzero = self._dead = self._clipped = 0
        self._signal = self._dead_signal = self._relative = 0.0
        self._channels: Tensor | None = None

    def add(self, x: Tensor, q: QuantizedTensor) -> None:
        """``x`` [..., K] and its codes ``q``, blocked along any axis."""
        x = x.detach().float()
        image = dequantize(q, torch.float32)
        size, error = x.abs(), (x - image).abs()
        nonzero = size > 0
        dead = nonzero & (image == 0)
        top = (q.codes & _LARGEST_CODE) == _LARGEST_CODE
        energy = x.square()
        self._rows.add(x, image)
        self._elements += x.numel()
        self._nonzero += int(nonzero.sum())
        self._dead += int(dead.sum())
        self._clipped += int((top & (size > image.abs())).sum())
        self._signal += float(energy.sum(dtype=torch.float64))
        self._dead_signal += float(energy[dead].sum(dtype=torch.float64))
        self._relative += float((error / (size + _PUBLISHED_EPSILON))[nonzero].double().sum())
        channels = energy.reshape(-1, x.shape[-1]).sum(0, dtype=torch.float64).cpu()
        self._channels = channels if self._channels is None else self._channels + channels

    def summary(self) -> QuantizationSummary:
        """Raises ``ValueError`` if nothing but zeros was seen."""
        rows = self._rows.summary()
        dead, relative = self._dead / self._nonzero, self._relative / self._nonzero
        dead_energy = self._dead_signal / self._signal
        return QuantizationSummary(
            **rows.__dict__,
            dead_zone=dead,
            dead_zone_energy=dead_energy,
            saturation=self._clipped / self._elements,
            relative_error_elementwise=relative,
            # A dead element's relative error is 1: their part of the mean is `dead`.
            relative_error_misleading=(
                dead > MISLEADING_SHARE * relative and dead_energy < MISLEADING_ENERGY
            ),
            outlier_channels=self._outliers(),
        )

    def _outliers(self) -> list[Outlier]:
        assert self._channels is not None
        rms = self._channels.sqrt()
        typical = float(rms.median())
        if typical == 0.0:
            return []
        ratios = rms / typical
        found = [Outlier(int(i), float(ratios[i])) for i in (ratios >= OUTLIER_RATIO).nonzero()]
        return sorted(found, key=lambda outlier: -outlier.ratio)


def decibel(signal: float, error: float) -> float:
    """``10 log10(signal / error)`` of two sums of squares, at most ``EXACT_DB``."""
    if error <= 0.0 or signal <= 0.0:
        return EXACT_DB if signal > 0.0 else 0.0
    return min(10.0 * math.log10(signal / error), EXACT_DB)


def _quantiles(values: Tensor) -> dict[str, float]:
    """By sorting: ``torch.quantile`` refuses more than 16 million values."""
    ordered = values.double().sort().values
    last = len(ordered) - 1
    result = {}
    for name, share in QUANTILES.items():
        below = math.floor(share * last)
        above = min(below + 1, last)
        weight = share * last - below
        result[name] = float(ordered[below] * (1 - weight) + ordered[above] * weight)
    return result
