"""Plots as SVG text: bars per label, and curves over sizes on two logarithmic axes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from html import escape

from .measure import Contest, number

COLOURS = ("#1b6ca8", "#d98032", "#5a9e57", "#8a6bb1", "#a34a4a", "#888888")
WIDTH, LEFT, RIGHT, ROW, GAP = 760, 230, 130, 18, 16
HEIGHT, TOP, BOTTOM = 360, 16, 70

Points = list[tuple[float, float]]


def bars(contests: Sequence[Contest]) -> str:
    """Return one group of bars per contest, scaled to its maximum. The lines span smallest to largest sample."""
    parts: list[str] = []
    y = 8.0
    colours = _colours(contests)
    for contest in contests:
        names = [contest.subject, *contest.others]
        most = max(max(contest.values(name)) for name in names) or 1
        parts.append(_text(8, y + 13, f"{contest.label} ({contest.unit})", weight="bold"))
        y += ROW + 4
        for name in names:
            parts.extend(_bar(y, name, contest.values(name), most, colours[name]))
            y += ROW
        y += GAP
    return _svg(y, parts)


def curves(contests: Sequence[Contest]) -> str:
    """Return one curve per contestant over the contests, or per contest over its contestants: numbers are on x."""
    lines: dict[str, Points] = {}
    for contest in contests:
        for name in contest.samples:
            across, line = (contest.label, name) if _is_number(contest.label) else (name, contest.label)
            point = float(across.replace(",", "")), statistics.median(contest.values(name))
            lines.setdefault(line, []).append(point)
    points = [point for line in lines.values() for point in line]
    across = _Axis([x for x, _ in points], LEFT / 3, WIDTH - 200)
    up = _Axis([y for _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [*_grid(across, up, contests[0].unit)]
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [(across.place(x), up.place(y)) for x, y in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts.append(_text(WIDTH - 190, TOP + 14 + index * ROW, name, fill=colour))
    return _svg(HEIGHT, parts)


class _Axis:
    """A logarithmic axis over whole decades, between two coordinates."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        positive = [value for value in values if value > 0] or [1]
        self.low = math.floor(math.log10(min(positive)))
        self.high = max(math.ceil(math.log10(max(positive))), self.low + 1)
        self.start, self.end = start, end

    def place(self, value: float) -> float:
        """Return the coordinate of a value."""
        part = (math.log10(max(value, 10.0**self.low)) - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * part

    def decades(self) -> list[float]:
        """Return the values of the grid lines."""
        return [10.0**power for power in range(self.low, self.high + 1)]


def _grid(across: _Axis, up: _Axis, unit: str) -> Iterator[str]:
    for value in across.decades():
        x = across.place(value)
        yield f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>'
        yield _text(x, HEIGHT - BOTTOM + 18, number(value), anchor="middle")
    for value in up.decades():
        y = up.place(value)
        yield f'<line x1="{across.start:.1f}" y1="{y:.1f}" x2="{across.end:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(across.start - 6, y + 4, number(value), anchor="end")
    yield _text((across.start + across.end) / 2, HEIGHT - BOTTOM + 42, "files", anchor="middle")
    yield _text(8, HEIGHT - 8, f"vertical: {unit}")


def _bar(y: float, name: str, values: Sequence[float], most: float, colour: str) -> Iterator[str]:
    scale = (WIDTH - LEFT - RIGHT) / most
    middle, low, high = (LEFT + value * scale for value in (statistics.median(values), min(values), max(values)))
    yield _text(LEFT - 8, y + 12, name, anchor="end")
    yield f'<rect x="{LEFT}" y="{y}" width="{max(middle - LEFT, 1):.1f}" height="{ROW - 4}" fill="{colour}"/>'
    yield f'<line x1="{low:.1f}" y1="{y + 7}" x2="{high:.1f}" y2="{y + 7}" stroke="#222"/>'
    yield _text(high + 6, y + 12, number(statistics.median(values)))


def _colours(contests: Sequence[Contest]) -> dict[str, str]:
    names = dict.fromkeys(name for contest in contests for name in (contest.subject, *contest.others))
    return {name: COLOURS[min(index, len(COLOURS) - 1)] for index, name in enumerate(names)}


def _is_number(label: str) -> bool:
    return label.replace(",", "").isdecimal()


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", fill: str = "#222") -> str:
    looks = f'text-anchor="{anchor}" font-weight="{weight}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {looks}>{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>', *parts, "</svg>", ""])
