"""Two quantisations of one tensor, compared code by code; each difference gets a cause.

A tolerance is the wrong tool for codes: one wrong block scale moves 32 numbers by a factor of two
and hides in any average. So codes and scale bytes are compared for equality, and what differs is
sorted by what an implementer would look for first:

    scale off by one   the block's scale byte is its neighbour: another scale rule, or a logarithm
                       that was rounded across a power of two
    tie                the number lies halfway between two codes, and the two sides disagree
    clip               the number lies beyond the largest code (6 scales)
    sign of zero       0 against -0
    flush              a block or element below the format's range: zero on one side only
    other              anything else, above all another rounding mode or a damaged byte

An element in a block whose scale differs is counted under the scale's cause: its code follows from
the scale. Ties and clips can be told only with the tensor that was quantised.

A block whose scale is NaN on both sides decodes to NaN whatever its codes are, so they are not
compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npu_qat.numerics import QuantizedTensor, e2m1
from npu_qat.numerics.scales import values_from_bytes

SCALE_OFF_BY_ONE = "scale off by one"
TIE = "tie"
CLIP = "clip"
SIGN_OF_ZERO = "sign of zero"
FLUSH = "flush"
OTHER = "other"
KINDS = (SCALE_OFF_BY_ONE, TIE, CLIP, SIGN_OF_ZERO, FLUSH, OTHER)

# A quotient this close to a tie, relative to it, is one: E4M3 scales make it an fp32 quotient.
_TIE_WIDTH = 2.0**-20
_MAGNITUDE, _SIGN = 0x07, 0x08


@dataclass(frozen=True)
class Example:
    """One difference, for people to look at.

    Attributes:
        where: the name given to ``compare_codes``.
        index: the element, or the first element of the block if only the scale differs.
        block: which block along the blocked axis.
        kind: one of ``KINDS``.
        source: the number that was quantised, if it was given.
        expected, found: E2M1 codes.
        expected_scale, found_scale: scale bytes.
    """

    where: str
    index: tuple[int, ...]
    block: int
    kind: str
    source: float | None
    expected: int
    found: int
    expected_scale: int
    found_scale: int

    def __str__(self) -> str:
        source = "" if self.source is None else f" of {self.source:.9g}"
        return (
            f"{self.where} {list(self.index)}, block {self.block}{source}: code {self.expected:#x} "
            f"under scale {self.expected_scale:#04x} expected, {self.found:#x} under "
            f"{self.found_scale:#04x} found ({self.kind})"
        )


@dataclass(frozen=True)
class Mismatches:
    """What differs between two quantisations, or between many pairs of them (``a + b``).

    Attributes:
        elements, blocks: how many were compared.
        codes: kind -> elements whose code differs; kinds that did not occur are left out.
        scales: kind -> blocks whose scale byte differs, likewise; a tensor scale that differs
            counts as one block of kind ``other``.
        first: the first difference in the order of comparison.
    """

    elements: int = 0
    blocks: int = 0
    codes: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[str, int] = field(default_factory=dict)
    first: Example | None = None

    @property
    def total(self) -> int:
        """Differing codes and scales together; 0 means equal bit for bit."""
        return sum(self.codes.values()) + sum(self.scales.values())

    def __add__(self, other: Mismatches) -> Mismatches:
        return Mismatches(
            self.elements + other.elements,
            self.blocks + other.blocks,
            _added(self.codes, other.codes),
            _added(self.scales, other.scales),
            self.first or other.first,
        )

    def __str__(self) -> str:
        if not self.total:
            return f"0 of {self.elements} codes and {self.blocks} scales differ"
        parts = [f"{n} codes: {kind}" for kind, n in self.codes.items()]
        parts += [f"{n} scales: {kind}" for kind, n in self.scales.items()]
        return (
            f"{sum(self.codes.values())} of {self.elements} codes and "
            f"{sum(self.scales.values())} of {self.blocks} scales differ ({'; '.join(parts)})"
            + (f"; first {self.first}" if self.first else "")
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "elements": self.elements,
            "blocks": self.blocks,
            "codes": dict(self.codes),
            "scales": dict(self.scales),
            "first": None if self.first is None else str(self.first),
        }


def compare_codes(
    expected: QuantizedTensor,
    found: QuantizedTensor,
    source: Tensor | None = None,
    *,
    where: str = "",
) -> Mismatches:
    """Compare two quantisations of one tensor.

    Args:
        expected: what the reference made, of any shape and blocked axis.
        found: what is to be judged; its profile may have another name, but must have the same
            block size and scale format (files do not say how they were rounded).
        source: the tensor that was quantised, in any floating dtype, to tell ties and clips.
        where: a name for messages (a layer, a case).

    Raises:
        ValueError: the two do not have the same shape or format.
    """
    _check_comparable(expected, found, where)
    blocks = expected.scales.numel()
    if _equal(expected, found):
        return Mismatches(expected.codes.numel(), blocks)
    a, b = _Side.of(expected), _Side.of(found)
    scale_kind = _classify_scales(a, b)
    element_kind = _classify_elements(a, b, scale_kind, _last(source, expected.axis))
    scales = _counted(scale_kind)
    if not _same_tensor_scale(expected, found):
        scales = _added(scales, {OTHER: 1})
    first = _first(where, expected.axis, (a, b), element_kind, scale_kind, source)
    return Mismatches(expected.codes.numel(), blocks, _counted(element_kind), scales, first)


@dataclass(frozen=True)
class _Side:
    """One quantisation with the blocked axis last, scales repeated for every element."""

    codes: Tensor
    scales: Tensor  # [..., blocks], as int32
    spread: Tensor  # [..., n], as int32
    values: Tensor  # [..., n] float64: what one element unit is worth
    nan_byte: Tensor  # [..., n] bool
    block_size: int

    @classmethod
    def of(cls, q: QuantizedTensor) -> _Side:
        scales, codes = q.scales.movedim(q.axis, -1), q.codes.movedim(q.axis, -1)
        size, n = q.profile.block_size, codes.shape[-1]
        values = values_from_bytes(scales.contiguous(), q.profile).double()
        if q.tensor_scale is not None:
            values = values * q.tensor_scale.double()
        spread = [t.repeat_interleave(size, -1)[..., :n] for t in (scales.int(), values)]
        return cls(codes, scales.int(), spread[0], spread[1], spread[1].isnan(), size)


def _classify_scales(a: _Side, b: _Side) -> Tensor:
    """Index into ``KINDS`` for each block whose scale differs, -1 for the others."""
    kind = torch.full_like(a.scales, -1)
    differ = a.scales != b.scales
    nan = _any_in_blocks(a.nan_byte, a.block_size) | _any_in_blocks(b.nan_byte, b.block_size)
    kind[differ] = KINDS.index(OTHER)
    empty = [~_any_in_blocks(s.codes & _MAGNITUDE > 0, s.block_size) for s in (a, b)]
    lost = ((a.scales == 0) & empty[0]) | ((b.scales == 0) & empty[1])
    kind[differ & ~nan & lost] = KINDS.index(FLUSH)
    kind[differ & ~nan & ((a.scales - b.scales).abs() == 1)] = KINDS.index(SCALE_OFF_BY_ONE)
    return kind


def _classify_elements(a: _Side, b: _Side, scale_kind: Tensor, source: Tensor | None) -> Tensor:
    """Index into ``KINDS`` for each element whose code differs, -1 for the others."""
    spread_kind = scale_kind.repeat_interleave(a.block_size, -1)[..., : a.codes.shape[-1]]
    differ = (a.codes != b.codes) & ~(a.nan_byte & b.nan_byte)
    kind = torch.full_like(spread_kind, -1)
    kind[differ] = KINDS.index(OTHER)
    m_a, m_b = (s.codes.int() & _MAGNITUDE for s in (a, b))
    if source is not None:
        quotient = source.abs().double() / a.values
        kind[differ & (quotient > e2m1.MAX)] = KINDS.index(CLIP)
        grid = torch.tensor(e2m1.GRID, dtype=torch.float64, device=quotient.device)
        middle = (grid[m_a] + grid[m_b]) / 2
        neighbours = ((m_a - m_b).abs() == 1) & ((a.codes ^ b.codes) & _SIGN == 0)
        near = (quotient - middle).abs() <= _TIE_WIDTH * middle
        kind[differ & neighbours & near] = KINDS.index(TIE)
    kind[differ & (a.spread == 0) & ((m_a == 0) != (m_b == 0))] = KINDS.index(FLUSH)
    kind[differ & (m_a == 0) & (m_b == 0)] = KINDS.index(SIGN_OF_ZERO)
    return torch.where(differ & (spread_kind >= 0), spread_kind, kind)


def _first(
    where: str,
    axis: int,
    sides: tuple[_Side, _Side],
    element_kind: Tensor,
    scale_kind: Tensor,
    source: Tensor | None,
) -> Example | None:
    """The first differing element; without one, the first element of the first differing block."""
    a, b = sides
    found = (element_kind >= 0).nonzero()
    if found.numel():
        place = [int(i) for i in found[0]]
        block = place[-1] // a.block_size
        kind = int(element_kind[tuple(place)])
    else:
        found = (scale_kind >= 0).nonzero()
        if not found.numel():
            return None
        place = [int(i) for i in found[0]]
        block, kind = place[-1], int(scale_kind[tuple(place)])
        place[-1] *= a.block_size
    at, index = tuple(place), list(place)
    index.insert(axis, index.pop())
    return Example(
        where=where,
        index=tuple(index),
        block=block,
        kind=KINDS[kind],
        source=None if source is None else float(source[tuple(index)]),
        expected=int(a.codes[at]),
        found=int(b.codes[at]),
        expected_scale=int(a.spread[at]),
        found_scale=int(b.spread[at]),
    )


def _check_comparable(a: QuantizedTensor, b: QuantizedTensor, where: str) -> None:
    one, other = (
        (tuple(q.shape), q.axis, q.profile.block_size, q.profile.scale_format) for q in (a, b)
    )
    if one != other:
        raise ValueError(
            f"{where or 'the tensors'}: cannot compare codes of (shape, axis, block, scales) {one} "
            f"with {other}"
        )
    if a.level0_scales is not None or b.level0_scales is not None:
        raise ValueError(f"{where or 'the tensors'}: dual-level codes are not compared here")


def _equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    same = torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
    return same and _same_tensor_scale(a, b)


def _same_tensor_scale(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether the divisors agree: a file stores those, and a reciprocal may lose the last bit."""
    if a.tensor_scale is None or b.tensor_scale is None:
        return a.tensor_scale is b.tensor_scale
    return bool(a.tensor_scale.float().reciprocal() == b.tensor_scale.float().reciprocal())


def _any_in_blocks(flags: Tensor, size: int) -> Tensor:
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % size))
    return padded.unflatten(-1, (-1, size)).any(-1)


def _last(source: Tensor | None, axis: int) -> Tensor | None:
    return None if source is None else source.movedim(axis, -1)


def _counted(kinds: Tensor) -> dict[str, int]:
    counts = torch.bincount(kinds[kinds >= 0].flatten(), minlength=len(KINDS)).tolist()
    return {kind: n for kind, n in zip(KINDS, counts, strict=True) if n}


def _added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {kind: n for kind in KINDS if (n := a.get(kind, 0) + b.get(kind, 0))}
