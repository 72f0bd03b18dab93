"""Just enough SVG for the manual's figures: shapes with numbers rounded to a tenth of a pixel.

Written out by hand rather than by a plotting library, so that the same numbers make the same bytes
on every machine and a test can compare them, and so that the text stays text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

INK, GREY, PALE = "#212121", "#757575", "#e0e0e0"
BLUE, ORANGE, GREEN, RED = "#3949ab", "#ef6c00", "#2e7d32", "#c62828"
LIGHT_BLUE, LIGHT_ORANGE, LIGHT_GREEN = "#e8eaf6", "#fff3e0", "#e8f5e9"
FONT = "Helvetica, Arial, 'Noto Sans', sans-serif"
MONO = "'DejaVu Sans Mono', Menlo, Consolas, monospace"


class Figure:
    """A canvas of `width` x `height` pixels; `title` says what it shows to who cannot see it."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "none",
        stroke: str = "none",
        radius: float = 0,
        dash: str = "",
    ) -> None:
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
            f'rx="{_n(radius)}" fill="{fill}" stroke="{stroke}"{extra}/>'
        )

    def line(
        self,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        *,
        color: str = INK,
        width: float = 1,
        dash: str = "",
        arrow: bool = False,
    ) -> None:
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        extra += f' marker-end="url(#{_arrow_id(color)})"' if arrow else ""
        self.parts.append(
            f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" stroke="{color}" '
            f'stroke-width="{_n(width)}"{extra}/>'
        )

    def path(
        self,
        points: Iterable[tuple[float, float]],
        *,
        color: str = INK,
        width: float = 1.5,
        dash: str = "",
        arrow: bool = False,
    ) -> None:
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        extra += f' marker-end="url(#{_arrow_id(color)})"' if arrow else ""
        listed = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self.parts.append(
            f'<polyline points="{listed}" fill="none" stroke="{color}" '
            f'stroke-width="{_n(width)}"{extra}/>'
        )

    def circle(
        self, x: float, y: float, radius: float, *, fill: str = INK, stroke: str = "none"
    ) -> None:
        self.parts.append(
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str | Sequence[str],
        *,
        size: float = 12,
        color: str = INK,
        anchor: str = "middle",
        mono: bool = False,
        bold: bool = False,
        leading: float = 1.3,
    ) -> None:
        """One line, or several below each other; `y` is the first baseline."""
        lines = [words] if isinstance(words, str) else words
        font = f' font-family="{MONO}"' if mono else ""
        weight = ' font-weight="bold"' if bold else ""
        for i, line in enumerate(lines):
            self.parts.append(
                f'<text x="{_n(x)}" y="{_n(y + i * size * leading)}" font-size="{_n(size)}" '
                f'fill="{color}" text-anchor="{anchor}"{font}{weight}>{escape(line)}</text>'
            )

    def heading(self, x: float, y: float, words: str) -> None:
        self.text(x, y, words, anchor="start", size=14, bold=True)

    def note(self, x: float, y: float, words: str | Sequence[str]) -> None:
        self.text(x, y, words, anchor="start", size=12, color=GREY)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str | Sequence[str],
        *,
        fill: str = LIGHT_BLUE,
        stroke: str = BLUE,
        size: float = 12,
        bold_first: bool = False,
    ) -> None:
        """A rounded box with centred words."""
        self.rect(x, y, width, height, fill=fill, stroke=stroke, radius=5)
        lines = [words] if isinstance(words, str) else list(words)
        top = y + height / 2 - (len(lines) - 1) * size * 0.65 + size * 0.35
        for i, line in enumerate(lines):
            bold = bold_first and i == 0
            self.text(x + width / 2, top + i * size * 1.3, line, size=size, bold=bold)

    def render(self) -> str:
        markers = "".join(
            f'<marker id="{_arrow_id(color)}" viewBox="0 0 10 10" refX="9" refY="5" '
            f'markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
            f'<path d="M0,0 L10,5 L0,10 z" fill="{color}"/></marker>'
            for color in (INK, GREY, BLUE, ORANGE, GREEN, RED)
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="{FONT}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<defs>{markers}</defs>\n"
            f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
        )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _arrow_id(color: str) -> str:
    return "arrow-" + color.removeprefix("#")
