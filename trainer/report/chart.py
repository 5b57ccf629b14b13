"""Charts as SVG text of our own: curves over steps or hours, and one bar in parts.

What a colour says is said without it too: curves differ by their dashes and carry their names, parts of a bar have
patterns and are listed beside it. Colours are classes that the page's style gives for light and dark.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from trainer.report.scale import Axis, Format, axis, short

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 30
POINTS = 400  # of a curve; more are drawn as the mean of their neighbours between least and most
CURVES = 8  # that have a class of their own
LETTER = 6.9  # pixels of one at the size of a curve's name


Thin = tuple[float, float, float, float]  # x, mean, least, most of a few neighbours


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]  # rising in x; where y is not finite the line is broken


@dataclass(frozen=True)
class Mark:
    """Something that happened, a line across the chart with a letter above it."""

    x: float
    letter: str
    text: str
    fault: bool = False


@dataclass(frozen=True)
class Look:
    """How a chart is labelled.

    Attributes:
        x, y: what the axes are, with units.
        show_x, show_y: how their numbers are written.
        zero: the vertical axis begins at 0.
        log: the vertical axis is logarithmic where that says more.
        dots: points are drawn as well; for few of them.
    """

    x: str = "step"
    y: str = ""
    show_x: Format = short
    show_y: Format = short
    zero: bool = False
    log: bool = False
    dots: bool = False
    marks: Sequence[Mark] = field(default=())


def curves(given: Sequence[Curve], look: Look) -> str:
    """A chart of curves; a sentence where there is nothing to draw."""
    kept = [one for one in given if finite(one.points)][:CURVES]
    if not kept:
        return '<p class="none">nothing was recorded</p>'
    thin = [pieces(one.points) for one in kept]
    right = RIGHT + (max(len(one.name) for one in kept) * LETTER + 30 if len(kept) > 1 else 0)
    every = [point for one in kept for point in finite(one.points)]
    x = Axis(min(point[0] for point in every), max(point[0] for point in every), LEFT, WIDTH - right)
    y = axis([point[1] for point in every], HEIGHT - BOTTOM, TOP + 8, zero=look.zero, log=look.log)
    parts = [_grid(x, y, look, WIDTH - right), _marks(look.marks, x)]
    for number, broken in enumerate(thin):
        for points in broken:
            parts.append(_band(points, x, y, number) + _curve(points, x, y, number, look.dots or len(points) < 3))
    if len(kept) > 1:
        parts.append(_names([one.name for one in kept], [broken[-1][-1][1] for broken in thin], y, WIDTH - right + 6))
    data = {
        "x": [x.low, x.high, x.begin, x.end],
        "y": [y.low, y.high, y.begin, y.end, int(y.log)],
        "curves": [
            [one.name, [[_round(a), _round(b)] for points in broken for a, b, *_ in points]]
            for one, broken in zip(kept, thin, strict=True)
        ],
        "labels": [look.x, look.y],
        "percent": int(look.show_y(0.5) == "50%"),
    }
    told = "; ".join(_told(one, look) for one in kept)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(told)}" '
        f"data-chart='{escape(json.dumps(data, separators=(',', ':')), quote=True)}'>{''.join(parts)}</svg>"
    )


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def pieces(points: Sequence[tuple[float, float]]) -> list[list[Thin]]:
    """The unbroken parts of a line; of neighbours the mean, POINTS of them at most, and each part's last as it is."""
    size = -(-len(points) // POINTS)
    parts: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[0]) and math.isfinite(point[1]):
            parts[-1].append(point)
        elif parts[-1]:
            parts.append([])
    return [thinned(part, size) for part in parts if part]


def thinned(points: Sequence[tuple[float, float]], size: int) -> list[Thin]:
    """Every `size` neighbours as one."""
    found = []
    for first in range(0, len(points), size):
        part = points[first : first + size]
        values = [value for _, value in part]
        found.append((part[-1][0], sum(values) / len(values), min(values), max(values)))
    return found


def sparkline(values: Sequence[float], width: int = 120, height: int = 28) -> str:
    """A small curve without axes."""
    kept = finite(list(enumerate(values)))
    if len(kept) < 2:
        return ""
    x = Axis(kept[0][0], kept[-1][0], 1, width - 1)
    y = axis([value for _, value in kept], height - 2, 2)
    path = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b, *_ in pieces(kept)[0])
    return f'<svg class="spark" viewBox="0 0 {width} {height}" aria-hidden="true"><polyline points="{path}"/></svg>'


def bar(parts: Sequence[tuple[str, float]], show: Format) -> str:
    """One bar in parts with a list of them below; parts of nothing are left out.

    Args:
        parts: (name, value); where a name stands in the list gives its pattern.
        show: how a value is written.
    """
    total = sum(value for _, value in parts)
    if not total:
        return '<p class="none">nothing was recorded</p>'
    at, cells, listed = 0.0, [], []
    for number, (name, value) in enumerate(parts):
        if not value:
            continue
        wide = value / total * WIDTH
        gap = 2.0 if wide > 4 else 0.0
        title = f"{name}: {show(value)}, {value / total:.1%}"
        cells.append(f"<g><title>{escape(title)}</title>{_filled(number, f'{at:.1f}', f'{wide - gap:.1f}', '34')}</g>")
        listed.append(
            f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{_filled(number, "0", "14", "14")}</svg>{escape(name)} '
            f"<b>{value / total:.1%}</b> <span>{escape(show(value))}</span></li>"
        )
        at += wide
    told = ", ".join(f"{name} {value / total:.1%}" for name, value in parts if value)
    return (
        f'<svg class="bar" viewBox="0 0 {WIDTH} 34" preserveAspectRatio="none" role="img" aria-label="{escape(told)}">'
        f'{"".join(cells)}</svg><ul class="legend">{"".join(listed)}</ul>'
    )


def _filled(number: int, x: str, width: str, height: str) -> str:
    """A box in a part's colour and pattern."""
    place = f'x="{x}" y="0" width="{width}" height="{height}" rx="2"'
    return f'<rect class="c{number}" {place}/><rect fill="url(#pattern-{number})" {place}/>'


def patterns() -> str:
    """The patterns that `bar` uses, once for a page."""
    shapes = (
        "", "M0 6L6 0", "M0 3H6", "M3 0V6", "M0 0L6 6", "M0 3H6M3 0V6", "M0 6L6 0M0 0L6 6", "M1 1h2v2h-2z",
    )  # fmt: skip
    size = 'width="6" height="6" patternUnits="userSpaceOnUse"'
    defined = "".join(
        f'<pattern id="pattern-{number}" {size}><path d="{shape}"/></pattern>' for number, shape in enumerate(shapes)
    )
    return f'<svg class="patterns" width="0" height="0" aria-hidden="true"><defs>{defined}</defs></svg>'


def _grid(x: Axis, y: Axis, look: Look, right: float) -> str:
    """Lines behind the curves, and the axes' numbers and names."""
    parts = []
    for value in y.ticks(5):
        at = y.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">'
                     f"{escape(look.show_y(value))}</text>")  # fmt: skip
    for value in x.ticks(6):
        parts.append(f'<text class="tick" x="{x.place(value):.1f}" y="{HEIGHT - 14}" text-anchor="middle">'
                     f"{escape(look.show_x(value))}</text>")  # fmt: skip
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="name" x="{right:.1f}" y="{HEIGHT - 2}" text-anchor="end">{escape(look.x)}</text>')
    return "".join(parts)


def _marks(marks: Sequence[Mark], x: Axis) -> str:
    """Lines where something happened; letters that would lie on each other are written once."""
    parts, last = [], -math.inf
    for mark in sorted(marks, key=lambda one: one.x):
        if not x.low <= mark.x <= x.high:
            continue
        at = x.place(mark.x)
        kind = "mark fault" if mark.fault else "mark"
        parts.append(f'<g class="{kind}"><title>{escape(mark.text)}</title><line x1="{at:.1f}" x2="{at:.1f}" '
                     f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')  # fmt: skip
        if at - last > 9:
            parts.append(f'<text x="{at:.1f}" y="{TOP - 2}" text-anchor="middle">{escape(mark.letter)}</text>')
            last = at
        parts.append("</g>")
    return "".join(parts)


def _band(points: Sequence[Thin], x: Axis, y: Axis, number: int) -> str:
    """From the least to the most of what was drawn as its mean."""
    if all(least == most for _, _, least, most in points):
        return ""
    upper = [f"{x.place(a):.1f},{y.place(most):.1f}" for a, _, _, most in points]
    lower = [f"{x.place(a):.1f},{y.place(least):.1f}" for a, _, least, _ in reversed(points)]
    return f'<polygon class="band s{number}" points="{" ".join(upper + lower)}"/>'


def _curve(points: Sequence[Thin], x: Axis, y: Axis, number: int, dots: bool) -> str:
    """The line itself."""
    places = [(x.place(a), y.place(b)) for a, b, *_ in points]
    text = f'<polyline class="line s{number}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>'
    if dots:
        text += "".join(f'<circle class="dot s{number}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in places)
    return text


def _names(names: Sequence[str], ends: Sequence[float], y: Axis, at: float) -> str:
    """The curves' names at their ends, moved apart where they would lie on each other."""
    places: dict[int, float] = {}
    last = TOP - 1.0
    for number in sorted(range(len(names)), key=lambda number: y.place(ends[number])):
        last = places[number] = max(y.place(ends[number]) + 4, last + 14)
    over = max(0.0, last - (HEIGHT - BOTTOM))
    return "".join(
        f'<line class="line s{number}" x1="{at:.1f}" x2="{at + 14:.1f}" y1="{place - over - 4:.1f}" '
        f'y2="{place - over - 4:.1f}"/><text class="curve" x="{at + 18:.1f}" y="{place - over:.1f}">'
        f"{escape(names[number])}</text>"
        for number, place in places.items()
    )


def _told(curve: Curve, look: Look) -> str:
    """A curve in words."""
    points = finite(curve.points)
    (first, began), (last, ended) = points[0], points[-1]
    name = curve.name or look.y
    return (
        f"{name}: {look.show_y(began)} at {look.x} {look.show_x(first)}, {look.show_y(ended)} at {look.show_x(last)}, "
        f"between {look.show_y(min(v for _, v in points))} and {look.show_y(max(v for _, v in points))}"
    )


def _round(value: float) -> float:
    """Five digits are enough to read off."""
    return float(f"{value:.5g}")
