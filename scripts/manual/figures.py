"""Figures of the numbers: what they show is computed by ``numerics``, not drawn by hand."""

from __future__ import annotations

from itertools import pairwise

import torch
from example import block
from svg import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT_BLUE,
    LIGHT_GREEN,
    LIGHT_ORANGE,
    ORANGE,
    PALE,
    RED,
    Figure,
)

from npu_qat.numerics import fake_quant, quantize
from npu_qat.numerics.e2m1 import GRID, round_
from npu_qat.numerics.scales import values_from_bytes

FLOAT_COLUMNS = (
    "#e8eaf6",
    "#c5cae9",
    "#9fa8da",
    "#7986cb",
    "#5c6bc0",
    "#3f51b5",
    "#303f9f",
    "#1a237e",
)


def e2m1_grid() -> Figure:
    """The sixteen numbers, and which way each rounding sends what lies between them."""
    fig = Figure(860, 330, "The numbers of E2M1 and the interval that each rounding sends to them")
    left, unit = 130.0, 104.0
    fig.heading(20, 28, "The numbers of E2M1 that are not negative, with their codes")
    for code, value in enumerate(GRID):
        x = left + value * unit
        fig.line(x, 70, x, 84, width=2)
        fig.text(x, 62, f"{value:g}", bold=True, size=14)
        fig.text(x, 100, f"0 {code >> 1:02b} {code & 1}", mono=True, size=10, color=GREY)
    fig.line(left, 77, left + 6.6 * unit, 77, width=1.5)
    fig.text(20, 100, "bits: s ee m", anchor="start", size=10, color=GREY)
    for row, name in enumerate(("half_even", "half_away", "half_down", "toward_zero")):
        y = 122 + row * 44
        fig.text(20, y + 18, name, anchor="start", mono=True, size=12)
        v = torch.arange(int(6.6 * 256) + 1, dtype=torch.float32) / 256
        codes = [GRID.index(g) for g in round_(v.clone(), name).tolist()]
        start = 0
        for i in range(1, len(codes) + 1):
            if i == len(codes) or codes[i] != codes[start]:
                x0, x1 = left + start / 256 * unit, left + min(i, len(codes) - 1) / 256 * unit
                fig.rect(x0, y, x1 - x0, 28, fill=FLOAT_COLUMNS[codes[start]], stroke="#ffffff")
                start = i
        ties = [(a + b) / 2 for a, b in pairwise(GRID)]
        if name != "toward_zero":
            for tie in ties:
                up = codes[round(tie * 256)] > codes[round(tie * 256) - 1]
                x = left + tie * unit
                fig.circle(x, y + 14, 4, fill="#ffffff", stroke=INK)
                fig.line(x, y + 14, x + (15 if up else -15), y + 14, color=ORANGE, arrow=True)
    fig.note(
        20,
        318,
        "Circles are ties, halfway between two numbers; the arrow shows where each rounding sends "
        "them. Above 6 everything is clipped.",
    )
    return fig


def mx_block() -> Figure:
    """A block of 32 numbers, its scale, and what is left of the numbers."""
    x = block()
    q = quantize(x, "ascend950")
    after = fake_quant(x, "ascend950").float().tolist()
    before = x.float().tolist()
    scale = values_from_bytes(q.scales, q.profile).item()
    fig = Figure(860, 360, "A block of 32 numbers before and after quantisation to MXFP4")
    middle, unit, left, step = 180.0, 32.0, 64.0, 24.2
    fig.heading(20, 26, f"One block: 32 numbers, one scale of {scale:g} (byte {q.scales.item()})")
    for grid in GRID:
        for sign in (1, -1):
            y = middle - sign * grid * scale * unit
            fig.line(left, y, left + 32 * step, y, color=PALE)
            if grid in (0.0, 1.0, 2.0, 3.0, 4.0, 6.0) and not (grid == 0 and sign < 0):
                fig.text(
                    left - 8, y + 4, f"{sign * grid * scale:g}", anchor="end", size=10, color=GREY
                )
    for i, (was, now) in enumerate(zip(before, after, strict=True)):
        centre = left + (i + 0.5) * step
        top, bottom = sorted((middle, middle - was * unit))
        fig.rect(centre - 6, top, 12, max(bottom - top, 0.5), fill="#c5cae9")
        y = middle - now * unit
        fig.line(centre - 10, y, centre + 10, y, color=ORANGE, width=3)
    largest = max(range(32), key=lambda i: abs(before[i]))
    fig.text(
        left + (largest + 1.3) * step,
        middle - before[largest] * unit + 4,
        f"amax = {before[largest]:g}: clipped to 6 scales",
        anchor="start",
        size=11,
        color=RED,
    )
    fig.rect(left, 312, 12, 12, fill="#c5cae9")
    fig.text(left + 18, 322, "the number in 16 bits", anchor="start", size=12)
    fig.line(left + 170, 318, left + 194, 318, color=ORANGE, width=3)
    fig.text(
        left + 200,
        322,
        "the nearest of the 15 values that the scale allows (grey lines)",
        anchor="start",
        size=12,
    )
    lost = 1 - after[largest] / before[largest]
    dead = sum(1 for was, now in zip(before, after, strict=True) if was and not now)
    fig.note(
        left,
        344,
        f"{dead} of 32 numbers become 0 and the outlier loses {lost:.0%}: one large number costs "
        "its 31 neighbours their resolution.",
    )
    return fig


def mx_bytes() -> Figure:
    """The memory of the block: 16 bytes of codes and one of scale."""
    q = quantize(block(), "ascend950")
    packed = q.packed.tolist()
    fig = Figure(860, 250, "The 17 bytes of an MXFP4 block, and how two codes share a byte")
    fig.heading(
        20,
        26,
        "The same block in memory: 16 bytes of codes and 1 byte of scale, for 64 bytes of bf16",
    )
    cell, left, top = 44.0, 30.0, 44.0
    for i, byte in enumerate(packed):
        fig.rect(left + i * cell, top, cell, 30, fill=LIGHT_BLUE, stroke=BLUE)
        fig.text(left + (i + 0.5) * cell, top + 20, f"{byte:02x}", mono=True, size=14)
        fig.text(left + (i + 0.5) * cell, top + 44, f"{2 * i},{2 * i + 1}", size=10, color=GREY)
    at = left + 16 * cell + 20
    fig.rect(at, top, cell, 30, fill=LIGHT_ORANGE, stroke=ORANGE)
    fig.text(at + cell / 2, top + 20, f"{q.scales.item():02x}", mono=True, size=14)
    fig.text(at + cell / 2, top + 44, "scale", size=10, color=GREY)
    first, second = q.codes.tolist()[2:4]
    x0, y0 = 130.0, 140.0
    fig.line(left + 1.5 * cell, top + 50, x0 + 150, y0 - 6, color=GREY, dash="4 3")
    for bit in range(8):
        nibble, shift = (second, 7 - bit) if bit < 4 else (first, 7 - bit)
        value = nibble >> (shift - 4 if bit < 4 else shift) & 1
        fill = "#d1c4e9" if bit < 4 else LIGHT_GREEN
        fig.rect(x0 + bit * 38, y0, 38, 30, fill=fill, stroke=INK)
        fig.text(x0 + bit * 38 + 19, y0 + 20, str(value), mono=True, size=14)
    fig.text(x0 + 76, y0 + 48, f"number 3: code {second}", size=12)
    fig.text(x0 + 228, y0 + 48, f"number 2: code {first}", size=12)
    fig.text(x0 + 76, y0 + 64, "high nibble", size=10, color=GREY)
    fig.text(x0 + 228, y0 + 64, "low nibble", size=10, color=GREY)
    byte = q.scales.item()
    x1 = 520.0
    fig.line(at + cell / 2, top + 50, x1 + 150, y0 - 6, color=GREY, dash="4 3")
    for bit in range(8):
        fig.rect(x1 + bit * 38, y0, 38, 30, fill=LIGHT_ORANGE, stroke=INK)
        fig.text(x1 + bit * 38 + 19, y0 + 20, str(byte >> (7 - bit) & 1), mono=True, size=14)
    fig.text(
        x1 + 152,
        y0 + 48,
        f"E8M0: no sign, no mantissa, 2^({byte} - 127) = {2.0 ** (byte - 127):g}",
        size=12,
    )
    fig.text(430, 238, "(16 · 8 + 8) / 32 = 4.25 bits a number", size=12, color=GREY)
    return fig


def bit_layouts() -> Figure:
    """E2M1, E8M0, E4M3, and how MXFP4 and NVFP4 put them together."""
    fig = Figure(860, 330, "Bit layouts of E2M1, E8M0 and E4M3, and the blocks of MXFP4 and NVFP4")
    rows = [
        ("E2M1, the element", "S EE M", "±{0, 0.5, 1, 1.5, 2, 3, 4, 6}: 16 codes, no Inf, no NaN"),
        ("E8M0, the scale of MXFP4", "EEEEEEEE", "2^-127 ... 2^127, 0xFF is NaN"),
        ("E4M3, the scale of NVFP4", "S EEEE MMM", "2^-9 ... 448, 8 steps a binade"),
    ]
    colors = {"S": "#ffcdd2", "E": "#c5cae9", "M": "#c8e6c9"}
    for row, (name, bits, says) in enumerate(rows):
        y = 18 + row * 44
        fig.text(20, y + 19, name, anchor="start", size=13, bold=True)
        x = 230.0
        for bit in bits.replace(" ", ""):
            fig.rect(x, y, 26, 28, fill=colors[bit], stroke=INK)
            fig.text(x + 13, y + 19, bit, mono=True, size=12)
            x += 26
        fig.text(460, y + 19, says, anchor="start", size=12)
    for row, (name, size, scale, after) in enumerate(
        [
            ("MXFP4", 32, "E8M0", "4.25 bits a number"),
            ("NVFP4", 16, "E4M3", "4.5 bits a number, and one fp32 scale for the whole tensor"),
        ]
    ):
        y = 170 + row * 78
        fig.text(20, y + 24, name, anchor="start", size=15, bold=True)
        for i in range(size):
            fig.rect(110 + i * 17, y, 17, 34, fill=LIGHT_BLUE, stroke=BLUE)
        end = 110 + size * 17
        fig.rect(end + 8, y, 34 * 1.6, 34, fill=LIGHT_ORANGE, stroke=ORANGE)
        fig.text(end + 8 + 27, y + 22, scale, size=12)
        fig.note(110, y + 52, f"{size} elements of 4 bits share one scale: {after}")
    return fig


def scale_rules() -> Figure:
    """Where in a binade each rule of the scale goes one step up, and what is clipped then."""
    rules = [
        ("floor", "ascend950", "ocp, ascend950"),
        ("even", "ocp-even", "ocp-even, compressed-tensors"),
        ("above 1.75", "ascend950-alg2-max7", "ascend950-alg2-max7"),
        ("rceil", "ascend950-alg2", "ocp-rceil, ascend950-alg2"),
        ("ceil", "ocp-ceil", "ocp-ceil"),
    ]
    fig = Figure(
        860, 330, "The scale that each rule takes, over one binade of the largest magnitude"
    )
    left, width = 240.0, 420.0
    fig.heading(
        20,
        26,
        "Which scale a block gets, by where its largest magnitude lies between two powers of two",
    )
    for tick in (1.0, 1.25, 1.5, 1.75, 2.0):
        x = left + (tick - 1) * width
        fig.text(x, 58, f"{tick:g} · 2^e", size=11, color=GREY)
        fig.line(x, 64, x, 288, color=PALE)
    steps = 128
    for row, (rule, profile, users) in enumerate(rules):
        y = 72 + row * 44
        fig.text(20, y + 14, rule, anchor="start", size=13, bold=True)
        fig.text(20, y + 29, users, anchor="start", size=10, color=GREY)
        amax = 1 + torch.arange(steps, dtype=torch.float32) / steps
        blocks = torch.zeros(steps, 32)
        blocks[:, 0] = amax
        exponents = quantize(blocks, profile).scales[:, 0].to(torch.int32) - 127
        for i in range(steps):
            up = exponents[i].item() > -2
            fill = "#9fa8da" if up else "#c5cae9"
            if amax[i] / 2.0 ** exponents[i].item() > 6:
                fill = "#ffab91"
            fig.rect(left + i * width / steps, y, width / steps + 0.4, 30, fill=fill)
        fig.text(left + width + 12, y + 20, _turn(exponents), anchor="start", size=12)
    y = 304
    for x, fill, says in (
        (240, "#c5cae9", "scale 2^(e-2)"),
        (370, "#ffab91", "scale 2^(e-2), and the largest number is above 6 scales: clipped"),
        (745, "#9fa8da", "scale 2^(e-1)"),
    ):
        fig.rect(x, y, 14, 14, fill=fill)
        fig.text(x + 20, y + 12, says, anchor="start", size=11)
    return fig


def _turn(exponents: torch.Tensor) -> str:
    """Where the exponent goes up, in words."""
    ups = (exponents > -2).nonzero()
    if not len(ups):
        return "never up"
    first = int(ups[0]) / len(exponents) + 1
    exact = first in (1.5, 1.75)
    return f"up from {first:g}" if exact else f"up above {first - 1 / len(exponents):g}"


def block_axis() -> Figure:
    """Why blocks must run along the dimension that the matmul sums over."""
    fig = Figure(860, 260, "Blocks of a weight matrix along in and along out")
    for panel, (title, verdict, color) in enumerate(
        [
            (
                "block_axis: row, along in",
                "one scale a block can leave the sum: hardware multiplies so",
                GREEN,
            ),
            (
                "block_axis: column, along out",
                "each product has another scale: no hardware computes it",
                RED,
            ),
        ]
    ):
        x0, y0, cell = 40 + panel * 430, 56, 20
        fig.heading(x0, 26, title)
        for i in range(8):
            for j in range(16):
                group = (i * 2 + j // 8) if panel == 0 else (j * 2 + i // 4)
                shade = ("#c5cae9", "#ffe0b2", "#c8e6c9", "#e1bee7")[
                    (group + (i if panel == 0 else j)) % 4
                ]
                fig.rect(x0 + j * cell, y0 + i * cell, cell, cell, fill=shade, stroke="#ffffff")
        fig.rect(x0, y0 + 3 * cell, 16 * cell, cell, stroke=INK)
        fig.text(x0 + 8 * cell, y0 - 8, "in: the matmul sums over it  →", size=11, color=GREY)
        fig.text(x0 - 8, y0 + 4 * cell, "out", anchor="end", size=11, color=GREY)
        fig.text(x0, 238, verdict, anchor="start", size=12, color=color)
    return fig
