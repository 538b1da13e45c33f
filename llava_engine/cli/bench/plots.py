"""Plots as SVG text: lines, stacked bars, one request's time line, shares of a ceiling.

Colours and fonts are classes that the page's style sheet defines, so that a plot follows the page
into dark mode and onto paper. Widths are in units of about a pixel on a wide screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 860
COLOURS = 6
"""Classes c0 to c5."""

_CHARACTER = 7.2  # a wide one of the 12 unit font
_ROWS = 26


@dataclass(frozen=True, slots=True)
class Line:
    """A series of points. labels: over points, where given, or below them. dashed: beside a main
    line."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    dashed: bool = False
    dots: bool = False
    below: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows, from `low` to `high`. at: its ticks, where they are not to be found."""

    title: str
    low: float
    high: float
    log: bool = False
    at: Sequence[float] = ()

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        if self.log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values, some four to eight."""
        if self.at:
            return list(self.at)
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _round_up((self.high - self.low) / 6)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(title: str, values: Sequence[float], log: bool = False) -> Axis:
    """An axis that holds all values; from 0, unless it is logarithmic."""
    high = max(values, default=1.0)
    if not log:
        step = _round_up((high or 1.0) / 6)
        return Axis(title, 0.0, step * math.ceil((high or 1.0) / step + 1e-9))
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.4, max(positive) * 1.1  # with room for names below the least
    return Axis(title, low, max(high, low * 2), True)


def lines(series: Sequence[Line], x: Axis, y: Axis, width: int = WIDTH, height: int = 300) -> str:
    """Lines, drawn from point to point, with both axes and a grid."""
    left, right, top, bottom = 64, 24, 12, 48
    inner_w, inner_h = width - left - right, height - top - bottom

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = min(1.0, max(0.0, x.place(point[0])))
        up = min(1.0, max(0.0, y.place(point[1])))
        return left + inner_w * across, top + inner_h * (1 - up)

    parts = []
    for tick in y.ticks():
        _, py = at((x.low, tick))
        parts.append(_rule(left, py, left + inner_w, py))
        parts.append(_text(left - 8, py + 4, number(tick), "end"))
    for tick in x.ticks():
        px, _ = at((tick, y.low))
        parts.append(_rule(px, top, px, top + inner_h))
        parts.append(_text(px, top + inner_h + 18, number(tick), "middle"))
    parts.append(_text(left + inner_w / 2, height - 8, x.title, "middle", "title"))
    middle = top + inner_h / 2
    turned = f'transform="rotate(-90 14 {middle:.1f})"'
    parts.append(_text(14, middle, y.title, "middle", "title", turned))
    for line in series:
        places = [at(point) for point in line.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        dash = " dashed" if line.dashed else ""
        parts.append(f'<polyline class="line c{line.colour}{dash}" points="{path}"/>')
        if line.dots:
            parts += [_dot(px, py, line.colour) for px, py in places]
        for (px, py), label in zip(places, line.labels, strict=False):
            near_edge = px > left + inner_w - 8 * len(label) - 12
            anchor, shift = ("end", -9) if near_edge else ("start", 9)
            parts.append(_text(px + shift, py + (16 if line.below else -7), label, anchor))
    names = ", ".join(line.name for line in series)
    return _svg(width, height, parts, f"{y.title} over {x.title}: {names}")


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of spans one after the other: name, colour, length. note: at the row's end."""

    label: str
    spans: Sequence[tuple[str, int, float]]
    note: str = ""


def bars(rows: Sequence[Bar], x: Axis, width: int = WIDTH, mark: float | None = None) -> str:
    """Horizontal bars, so many to a plot that one fits a sheet of paper. mark: a line across all of
    them at that value."""
    left = 16 + _CHARACTER * max((len(row.label) for row in rows), default=0)
    right = 16 + _CHARACTER * max((len(row.note) for row in rows), default=0)
    sheets = [rows[first : first + _ROWS] for first in range(0, len(rows), _ROWS)]
    return "".join(_bars(sheet, x, (width, left, right), mark) for sheet in sheets)


def _bars(
    rows: Sequence[Bar], x: Axis, widths: tuple[int, float, float], mark: float | None
) -> str:
    width, left, right = widths
    step, thick, top, bottom = 24, 15, 8, 46
    inner_w = max(120.0, width - left - right)
    width = max(width, math.ceil(left + inner_w + right))
    inner_h = step * len(rows)
    parts = []
    for tick in x.ticks():
        px = left + inner_w * x.place(tick)
        parts.append(_rule(px, top, px, top + inner_h))
        parts.append(_text(px, top + inner_h + 18, number(tick), "middle"))
    parts.append(_text(left + inner_w / 2, top + inner_h + 38, x.title, "middle", "title"))
    for index, row in enumerate(rows):
        y = top + step * index + (step - thick) / 2
        parts.append(_text(left - 8, y + thick - 3, row.label, "end"))
        at = left
        for name, colour, length in row.spans:
            span = inner_w * (x.place(x.low + length) if length > 0 else 0.0)
            hint = f"<title>{escape(f'{row.label}, {name}: {number(length)}')}</title>"
            parts.append(
                f'<rect class="fill c{colour}" data-row="{escape(row.label)}" '
                f'data-span="{escape(name)}" x="{at:.2f}" y="{y:.1f}" width="{span:.3f}" '
                f'height="{thick}">{hint}</rect>'
            )
            at += span
        if row.note:
            parts.append(_text(left + inner_w + 8, y + thick - 3, row.note, "start"))
    if mark is not None:
        px = left + inner_w * x.place(mark)
        parts.append(f'<line class="mark" x1="{px:.1f}" y1="{top}" x2="{px:.1f}" '
                     f'y2="{top + inner_h}"/>')  # fmt: skip
    return _svg(width, top + inner_h + bottom, parts, f"Bars: {x.title}")


def request_line(
    stages: Sequence[tuple[str, int, float]], chunks: Sequence[float], width: int = WIDTH
) -> str:
    """One request: its stages one after the other, and a tick for each chunk below them."""
    left, right, top = 16, 24, 6
    x = axis("milliseconds after the call", [sum(ms for _, _, ms in stages), *chunks])
    inner_w = width - left - right

    def at(ms: float) -> float:
        return left + inner_w * x.place(ms)

    parts = []
    for tick in x.ticks():
        parts.append(_rule(at(tick), top, at(tick), top + 68))
        parts.append(_text(at(tick), top + 86, number(tick), "middle"))
    begun = 0.0
    for name, colour, length in stages:
        parts.append(
            f'<rect class="fill c{colour}" data-span="{escape(name)}" x="{at(begun):.2f}" '
            f'y="{top}" width="{at(begun + length) - at(begun):.3f}" height="30">'
            f"<title>{escape(name)} {number(length)} ms</title></rect>"
        )
        begun += length
    for ms in chunks:
        place = f'x1="{at(ms):.2f}" y1="{top + 40}" x2="{at(ms):.2f}" y2="{top + 60}"'
        parts.append(f'<line class="tick" {place}/>')
    parts.append(_text(left + inner_w / 2, top + 106, x.title, "middle", "title"))
    return _svg(width, top + 116, parts, "One request by stage, and when its chunks came")


def legend(names: Sequence[tuple[str, int, bool]]) -> str:
    """Names beside their colours, as HTML, which breaks where it must."""
    items = "".join(
        f'<span><i class="key c{colour}{" dashed" if dashed else ""}"></i>{escape(name)}</span>'
        for name, colour, dashed in names
    )
    return f'<p class="legend">{items}</p>'


def number(value: float) -> str:
    """Three digits or so, for people."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    text = f"{value:.3g}"
    return f"{value:.6f}".rstrip("0").rstrip(".") if "e" in text else text


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    shape = f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}"'
    svg = f"<svg {shape}>{''.join(parts)}</svg>"
    # A wide one is not squeezed onto a small screen until its text is illegible: it scrolls.
    return f'<div class="wide">{svg}</div>' if width >= WIDTH else svg


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label", more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place} {more}>{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(x: float, y: float, colour: int) -> str:
    return f'<circle class="dot c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    for factor in (1, 2, 2.5, 5, 10):
        if factor * power >= value * (1 - 1e-9):
            return factor * power
    return 10 * power


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or the powers alone where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 3
    factors = (1,) if wide else (1, 2, 5)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in found if low <= tick <= high]
