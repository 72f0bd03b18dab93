"""The inputs of the conformance kit: fixed, made from integers, the same on every machine.

Two machines can be compared only on the same bits, so no input comes from a random generator of a
library (whose stream may change) or from a transcendental function (whose last bit may differ):
every number is an integer put together by a counter-based mixer (SplitMix64), or a bit pattern
written down. ``Case.digest()`` is the SHA-256 of an input; a test pins all of them.

The suite only grows. A released case is never changed, and one that was found wanting gets a
successor with another name; so a recording of any age names inputs that still exist.

What is in it, and which question about a device each part asks:

    patterns      every bf16 number, as a block's maximum and under other maxima
    thresholds    maxima around 1.5 and 1.75 * 2^e: which scale rule is it?
    ties          every midpoint of the E2M1 grid and its neighbours, both signs, many scales
    specials      zeros of both signs, NaN, Inf, subnormals, the largest numbers; alone, and between
                  ordinary blocks, so that a leak into the next block shows
    shapes        tails, odd block counts, one to four dimensions, every axis
    layers        weights and activations in the shapes of Qwen2.5-1.5B
    products      matmuls of codes: some whose sum is exact in any order, some of real size
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

SUITE_VERSION = 1
"""Goes up when cases are added."""

BLOCK = 32
# Middles between neighbours of the E2M1 grid 0, .5, 1, 1.5, 2, 3, 4, 6; and where clipping starts.
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True)
class Case:
    """One tensor to quantise.

    Attributes:
        name: never used for another input.
        build: makes the tensor (bf16 or fp16, on the CPU).
        axis: the blocked axis.
        large: of a real layer's size: run under the first profile only.
    """

    name: str
    build: Callable[[], Tensor]
    axis: int = -1
    large: bool = False

    def make(self) -> Tensor:
        """The tensor; not to be written to."""
        return _made(self.build)

    def digest(self) -> str:
        """SHA-256 of dtype, shape and bits of the input."""
        return digest(self.make())


@dataclass(frozen=True)
class Product:
    """One product of codes, ``x W^T + b``.

    Attributes:
        name: never used for another input.
        build: makes (x [.., K], weight [N, K], bias [N] or None), bf16, on the CPU.
        out_dtype: of the result.
        exact: whether every partial sum is exact in fp32, so that any order of summation gives
            the same bits.
        large: of a real layer's size.
    """

    name: str
    build: Callable[[], tuple[Tensor, Tensor, Tensor | None]]
    out_dtype: torch.dtype
    exact: bool
    large: bool = False

    def make(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The operands; not to be written to."""
        return _made(self.build)

    def digest(self) -> str:
        """SHA-256 over the digests of the operands."""
        parts = [digest(t) for t in self.make() if t is not None]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


@lru_cache(maxsize=4)  # a case is asked for several times in a row
def _made(build: Callable[[], T]) -> T:
    return build()


def digest(x: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bits."""
    head = f"{x.dtype} {list(x.shape)} ".encode()
    return hashlib.sha256(head + x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# --- numbers --------------------------------------------------------------------------------------


def words(count: int, seed: int) -> np.ndarray:
    """``count`` 64-bit words of SplitMix64 started at ``seed``."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def bell(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Bell-shaped numbers of standard deviation 0.036: sums of four uniform integers."""
    z = words(int(np.prod(shape)), seed)
    total = z.view(np.uint16).reshape(-1, 4).sum(1, dtype=np.int32) - 131070
    values = torch.from_numpy(total.astype(np.float32)) * 2.0**-20
    return values.to(dtype).reshape(shape)


def with_outliers(x: Tensor) -> Tensor:
    """Every 97th column 32 times as large, as activations of language models have them."""
    x = x.clone()
    x[..., ::97] *= 32
    return x


def patterns_of(words16: np.ndarray, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """16-bit words as numbers."""
    return torch.from_numpy(np.ascontiguousarray(words16, np.uint16).view(np.int16)).view(dtype)


def neighbours(values: list[float]) -> list[float]:
    """Each number with the bf16 numbers below and above it, in both signs."""
    bits = torch.tensor(values).to(torch.bfloat16).view(torch.int16)
    around = torch.stack((bits - 1, bits, bits + 1)).view(torch.bfloat16).float().flatten()
    return [*around.tolist(), *(-around).tolist()]


# --- cases ----------------------------------------------------------------------------------------


def every_pattern(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[2048, 32]: all 65,536 numbers in order; a block's numbers differ in the last bits alone."""
    return patterns_of(np.arange(65536, dtype=np.uint32).astype(np.uint16), dtype).view(-1, BLOCK)


def every_pattern_under(maximum: float) -> Tensor:
    """[2115, 32]: all numbers, 31 a block in mixed order, beside one maximum."""
    mixed = (np.arange(65536, dtype=np.uint64) * np.uint64(40503) % np.uint64(65536)).astype(
        np.uint16
    )
    filled = np.concatenate((mixed, np.zeros(-65536 % 31, np.uint16)))
    blocks = patterns_of(filled).view(-1, 31)
    first = torch.full((blocks.shape[0], 1), maximum, dtype=torch.bfloat16)
    return torch.cat((first, blocks), 1)


def thresholds() -> Tensor:
    """[n, 32]: maxima around 1, 1.5, 1.75 and 2 times 2^e over smaller ones, for many e."""
    rows = []
    for exponent in (-126, -125, -124, -123, -100, -20, -3, 0, 1, 7, 60, 125, 126):
        for maximum in neighbours([1.0, 1.5, 1.75, 1.96875]):
            row = torch.zeros(BLOCK, dtype=torch.float64)
            row[7] = maximum
            row[8:24] = torch.tensor([(-1) ** i * 2.0**-i * 0.875 for i in range(16)])
            rows.append(row * 2.0**exponent)
    return torch.stack(rows).float().to(torch.bfloat16)


def ties() -> Tensor:
    """[n, 32]: midpoints of the grid and their neighbours, under scales from 2^-118 to 2^122."""
    numbers = neighbours(list(MIDPOINTS))
    rows = []
    for exponent in (-118, -60, -9, -1, 0, 1, 10, 60, 122):
        for maximum in (4.0, 5.0, 6.0, 6.03125, 7.0, 7.03125):
            for start in range(0, len(numbers), BLOCK - 1):
                row = [maximum, *numbers[start : start + BLOCK - 1]]
                row += [0.0] * (BLOCK - len(row))
                rows.append(torch.tensor(row, dtype=torch.float64) * 2.0**exponent)
    return torch.stack(rows).float().to(torch.bfloat16)


def special_blocks() -> list[list[int]]:
    """Blocks of bf16 patterns that a quantiser has to know about, as their first numbers."""
    inf, nan, signalling, largest, one = 0x7F80, 0x7FC0, 0x7F81, 0x7F7F, 0x3F80
    minus = 0x8000
    return [
        [0],
        [minus] * BLOCK,
        [minus, 0, minus, 0],
        [inf, one],
        [minus | inf, one],
        [nan, one],
        [minus | nan, minus | one],
        [signalling, 0x0001],
        [inf, minus | inf, nan],
        [nan] * BLOCK,
        [largest, minus | largest, one, 0x0001],
        [0x7F00, minus | 0x7F00, 0x7E80],  # 2^127
        [0x0001, minus | 0x0001],  # the smallest subnormals
        [0x007F, minus | 0x007F, 0x0040],  # the largest
        [0x0080, minus | 0x0080],  # 2^-126
        [0x0100, 0x00C0, 0x00C1, minus | 0x0100],  # 2^-125 and what rounds beside it
        [0x0140, 0x00FF],  # 1.5 * 2^-125: bumped by no rule
        [0x0141, 0x0141],  # above 1.5 * 2^-125: alg 2 bumps it out of the flushed range
        [0x0161, 0x0161],  # above 1.75 * 2^-125
        [0x017F, 0x017F],
        [0x0180, 0x0001, minus | 0x0001],  # 2^-124: the first scale that is not flushed
        [0x7F00, 0x0001, minus | 0x0001],  # tiny negatives, which "floor" may round away from 0
        [one, 0x3380, minus | 0x3380, 0x2E00, minus | 0x2E00],
        [one, minus | one] * (BLOCK // 2),
    ]


def specials() -> Tensor:
    """[n, 96]: a special block between two ordinary ones."""
    blocks = special_blocks()
    ordinary = bell((len(blocks), 96), seed=11)
    middle = np.zeros((len(blocks), BLOCK), np.uint16)
    for row, block in enumerate(blocks):
        middle[row, : len(block)] = block
    ordinary[:, BLOCK : 2 * BLOCK] = patterns_of(middle)
    return ordinary


SHAPES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((2,), -1),
    ((64,), 0),
    ((1, 2), -1),
    ((3, 30), -1),
    ((5, 34), -1),
    ((4, 96), -1),
    ((3, 1056), -1),
    ((96, 4), 0),
    ((33, 2), 0),
    ((65, 6), -2),
    ((2, 3, 66), -1),
    ((7, 62, 10), 1),
    ((2, 3, 70, 8), -2),
    ((40, 2, 3, 4), 0),
)


def shape_case(shape: tuple[int, ...], axis: int) -> Case:
    name = "shape-" + "x".join(map(str, shape)) + f"-axis{axis}"
    return Case(name, lambda: bell(shape, seed=sum(shape) + 100), axis)


CASES: tuple[Case, ...] = (
    Case("patterns-in-order", every_pattern),
    *(
        Case(f"patterns-under-{maximum}", lambda m=maximum: every_pattern_under(m))  # type: ignore[misc]
        for maximum in (1.0, 1.5078125, 1.984375)
    ),
    Case("thresholds", thresholds),
    Case("ties", ties),
    Case("specials", specials),
    Case("specials-transposed", lambda: specials().t().contiguous(), axis=0),
    *(shape_case(shape, axis) for shape, axis in SHAPES),
    Case("fp16-patterns", lambda: every_pattern(torch.float16)),
    Case("fp16-bell", lambda: bell((16, 192), seed=12, dtype=torch.float16)),
    Case("activation-16x8960", lambda: with_outliers(bell((16, 8960), seed=13))),
    Case("weight-1536x1536", lambda: bell((1536, 1536), seed=14), large=True),
    Case("weight-256x1536-axis0", lambda: bell((256, 1536), seed=15), axis=0, large=True),
    Case("weight-8960x1536", lambda: bell((8960, 1536), seed=16), large=True),
    Case("weight-1536x8960", lambda: bell((1536, 8960), seed=17), large=True),
    Case("weight-1536x8960-axis0", lambda: bell((1536, 8960), seed=17), axis=0, large=True),
)


# --- products -------------------------------------------------------------------------------------


def small_integers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Multiples of 1/2 up to 6 in blocks whose maximum is 6 or 3: quantised without loss.

    Sums of a few hundred products of such numbers are multiples of 1/16 below 2^16, which fp32
    holds exactly.
    """
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    z = torch.from_numpy((words(int(np.prod(shape)), seed) >> np.uint64(40)).astype(np.int64))
    values = grid[z % 8] * torch.where(z // 8 % 2 == 0, 1.0, -1.0)
    values = values.reshape(shape)
    values[..., ::BLOCK] = 6.0
    halves = (torch.arange(shape[-1]) // BLOCK) % 2 == 1
    return torch.where(halves, values / 2, values).to(torch.bfloat16)


def exact_product(
    rows: tuple[int, ...], n: int, k: int, seed: int, bias: bool
) -> Callable[[], tuple[Tensor, Tensor, Tensor | None]]:
    def make() -> tuple[Tensor, Tensor, Tensor | None]:
        b = small_integers((n,), seed + 2) if bias else None
        return small_integers((*rows, k), seed), small_integers((n, k), seed + 1), b

    return make


def layer_product(
    rows: int, n: int, k: int, seed: int, bias: bool = False
) -> Callable[[], tuple[Tensor, Tensor, Tensor | None]]:
    def make() -> tuple[Tensor, Tensor, Tensor | None]:
        b = bell((n,), seed + 2) if bias else None
        return with_outliers(bell((rows, k), seed)), bell((n, k), seed + 1), b

    return make


PRODUCTS: tuple[Product, ...] = (
    Product("exact-4x16x128", exact_product((4,), 16, 128, 20, False), torch.bfloat16, True),
    Product("exact-4x16x128-fp32", exact_product((4,), 16, 128, 20, True), torch.float32, True),
    Product("exact-odd-blocks", exact_product((5,), 18, 96, 30, True), torch.bfloat16, True),
    Product("exact-one-row", exact_product((1,), 16, 64, 40, True), torch.bfloat16, True),
    Product("exact-one-column", exact_product((6,), 1, 64, 45, False), torch.bfloat16, True),
    Product("exact-square", exact_product((8,), 32, 64, 50, True), torch.bfloat16, True),
    Product("exact-3d", exact_product((2, 3), 24, 96, 60, True), torch.bfloat16, True),
    Product("tail-4x16x80", layer_product(4, 16, 80, 70), torch.float32, False),
    Product("qkv-4x1536x1536", layer_product(4, 1536, 1536, 80, True), torch.float32, False, True),
    Product("up-4x8960x1536", layer_product(4, 8960, 1536, 90), torch.float32, False, True),
    Product("down-4x1536x8960", layer_product(4, 1536, 8960, 95), torch.float32, False, True),
)
