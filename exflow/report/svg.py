"""Charts as inline SVG: bars, lines, grids of numbers. Colours come from the page's style sheet.

Every chart names itself for screen readers (`<title>`), and every mark says its value on hover.
Lengths are in pixels of a chart as wide as its `viewBox`; charts shrink with the page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SERIES = 4
"""Series colours in the style sheet: classes s0, s1, ..."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row of a bar chart: stacked parts, and a remark after the total."""

    label: str
    parts: Sequence[float]
    remark: str = ""
    is_strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a line chart; a `quiet` one is a reference to read others against."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    is_quiet: bool = False


def chart(title: str, width: float, height: float, marks: Sequence[str]) -> str:
    """An SVG element around marks."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{"".join(marks)}</svg>'
    )


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """A piece of text, its baseline at y."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )


def rect(
    x: float, y: float, width: float, height: float, kind: str, tip: str, opacity: float = 1.0
) -> str:
    """A rectangle that says `tip` on hover."""
    shade = "" if opacity >= 1 else f' fill-opacity="{opacity:.3f}"'
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'class="{kind}"{shade}><title>{escape(tip)}</title></rect>'
    )


def bars(title: str, rows: Sequence[Bar], series: Sequence[str], *, unit: str = "") -> str:
    """Horizontal stacked bars with their totals, and a key if there are several series."""
    width, left, right, step = 760.0, 190.0, 170.0, 34.0
    top = 26.0 if len(series) > 1 else 6.0
    most = max((sum(row.parts) for row in rows), default=0.0) or 1.0
    scale = (width - left - right) / most
    marks = _key(series, left) if len(series) > 1 else []
    for number, row in enumerate(rows):
        y, x = top + number * step, left
        kind = "strong" if row.is_strong else ""
        marks.append(text(left - 10, y + 16, row.label, kind, "end"))
        for index, (name, value) in enumerate(zip(series, row.parts, strict=True)):
            tip = f"{row.label}, {name}: {value:.2f}{unit}"
            marks.append(rect(x, y, value * scale, 23, f"s{index % SERIES}", tip))
            x += value * scale
        marks.append(text(x + 8, y + 16, f"{sum(row.parts):.1f}{unit}", "strong"))
        marks.append(text(x + 66, y + 16, row.remark, "muted"))
    return chart(title, width, top + len(rows) * step, marks)


def _key(names: Sequence[str], x: float) -> list[str]:
    marks = []
    for index, name in enumerate(names):
        marks += [
            f'<rect x="{x:.0f}" y="2" width="12" height="12" class="s{index % SERIES}"/>',
            text(x + 18, 12.5, name, "muted"),
        ]
        x += 44 + 7.2 * len(name)
    return marks


def lines(
    title: str,
    series: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    is_log: bool = False,
    y_max: float | None = None,
) -> str:
    """Lines from a common zero, named at their ends."""
    width, height, left, right, top, bottom = 520.0, 270.0, 44.0, 148.0, 26.0, 42.0
    xs = [_place(x, is_log=is_log) for line in series for x in line.xs]
    x_low, x_high = min(xs), max(xs)
    limit = y_max or _round_up(max(y for line in series for y in line.ys))

    def at(x: float, y: float) -> tuple[float, float]:
        share = (_place(x, is_log=is_log) - x_low) / ((x_high - x_low) or 1.0)
        return (
            left + share * (width - left - right),
            height - bottom - y / limit * (height - top - bottom),
        )

    marks = [text(8, 14, y_label, "muted")]
    for tick in range(5):
        value = limit * tick / 4
        y = at(series[0].xs[0], value)[1]
        marks.append(f'<path d="M{left} {y:.1f}H{width - right}" class="grid"/>')
        marks.append(text(left - 6, y + 4, f"{value:g}", "muted", "end"))
    marks += [
        text(at(x, 0)[0], height - bottom + 17, _short(x), "muted", "middle")
        for x in _ticks(series[0].xs)
    ]
    marks.append(text((left + width - right) / 2, height - 6, x_label, "muted", "middle"))
    ends = _apart([at(line.xs[-1], line.ys[-1])[1] for line in series])
    loud = 0
    for line, end in zip(series, ends, strict=True):
        kind = "quiet" if line.is_quiet else f"l{loud % SERIES}"
        loud += not line.is_quiet
        points = [at(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        marks.append(f'<path d="M{path}" class="line {kind}"/>')
        for (x, y), a, b in zip(points, line.xs, line.ys, strict=True):
            tip = f"{line.name}, {x_label} {a:g}: {b:.3g}"
            dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 if line.is_quiet else 3}" '
            marks.append(f'{dot}class="dot {kind}"><title>{escape(tip)}</title></circle>')
        marks.append(text(width - right + 8, end + 4, line.name, f"name {kind}"))
    return chart(title, width, height, marks)


def grid(
    title: str,
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    most: float,
    digits: int = 1,
) -> str:
    """A matrix as shaded cells with their numbers; numbers are left out where cells are many."""
    cell = 46.0 if len(columns) <= 6 else 37.0 if len(columns) <= 10 else 18.0
    left = 16 + 6.6 * max(len(name) for name in rows)
    top = 22.0
    marks = [
        text(left + (j + 0.5) * cell, top - 7, name, "muted", "middle")
        for j, name in enumerate(columns)
    ]
    for i, name in enumerate(rows):
        y = top + i * 30.0
        marks.append(text(left - 8, y + 19, name, "muted", "end"))
        for j, value in enumerate(values[i]):
            tip = f"{name} → {columns[j]}: {value:.{digits + 1}f}"
            share = min(1.0, value / most) if most else 0.0
            x = left + j * cell
            marks.append(rect(x, y, cell - 1, 29, "heat", tip, opacity=0.04 + 0.86 * share))
            if cell > 30:
                kind = "cell on" if share > 0.55 else "cell"
                label = f"{value:.{digits}f}" if value else "·"
                marks.append(text(x + cell / 2, y + 19, label, kind, "middle"))
    return chart(title, left + len(columns) * cell + 2, top + len(rows) * 30.0, marks)


def load_strip(title: str, shares: Sequence[Sequence[float]], layer_ids: Sequence[int]) -> str:
    """(layers, ranks) load over the mean of its layer: above 1 in one colour, below in another."""
    num_ranks = len(shares[0])
    cell, left, top = max(9.0, min(34.0, 620.0 / len(shares))), 64.0, 22.0
    marks = []
    for column, layer in enumerate(layer_ids):
        if column % max(1, math.ceil(22 / cell)) == 0:
            x = left + (column + 0.5) * cell
            marks.append(text(x, top - 7, str(layer), "muted", "middle"))
    for rank in range(num_ranks):
        y = top + rank * 24.0
        marks.append(text(left - 8, y + 16, f"rank {rank}", "muted", "end"))
        for column, layer in enumerate(layer_ids):
            share = shares[column][rank]
            kind = "over" if share > 1 else "under"
            tip = f"layer {layer}, rank {rank}: {share:.2f} of the mean load"
            x, opacity = left + column * cell, min(1.0, 0.03 + 2.5 * abs(share - 1))
            marks.append(rect(x, y, cell - 1, 23, kind, tip, opacity=opacity))
    return chart(title, left + len(shares) * cell + 2, top + num_ranks * 24.0, marks)


def _place(x: float, *, is_log: bool) -> float:
    return math.log2(x) if is_log else x


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value * 0.999)


def _ticks(xs: Sequence[float]) -> Sequence[float]:
    step = max(1, math.ceil(len(xs) / 8))
    return xs[::step]


def _short(x: float) -> str:
    """1500 as 1.5k."""
    return f"{x:g}" if x < 1000 else f"{x / 1000:.3g}k"


def _apart(ys: Sequence[float], gap: float = 15.0) -> list[float]:
    """The heights moved so far apart that names do not overlap, in the same order."""
    order = sorted(range(len(ys)), key=lambda i: ys[i])
    placed = list(ys)
    for above, below in pairwise(order):
        placed[below] = max(placed[below], placed[above] + gap)
    excess = max(0.0, max(placed, default=0.0) - 235.0)
    return [y - excess for y in placed]
