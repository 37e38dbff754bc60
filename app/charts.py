"""Pictures for reports: inline SVG in one HTML page that asks for nothing from anywhere. Pure.

Every text is escaped. Colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 760
HEIGHT: Final = 380
LEFT: Final = 84
RIGHT: Final = 16
TOP: Final = 16
BOTTOM: Final = 52
COLOURS: Final = ("#3366cc", "#dd6b20", "#2f855a", "#9f3a9f", "#b7791f", "#4a5568", "#c53030")

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1a202c; --faint: #cbd5e0; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e8f0; --faint: #4a5568; --paper: #171923; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
.axis { stroke: var(--ink); } .grid { stroke: var(--faint); stroke-dasharray: 2 4; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: 0.2rem 0.8rem 0.2rem 0;
  text-align: right; border-bottom: 1px solid var(--faint); }
td:first-child, th:first-child { text-align: left; } pre { overflow-x: auto; }
"""


@dataclass(frozen=True, slots=True)
class Axis:
    label: str
    is_log: bool = False  #: then all values are above 0

    def at(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def ticks(self, low: float, high: float) -> list[float]:
        """Round values from `low` to `high`, at most ten."""
        if self.is_log and high > 8 * low:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1, 2, 5) if len(decades) < 4 else (1,)
            ticks = [step * 10.0**decade for decade in decades for step in steps]
            return [tick for tick in ticks if low <= tick <= high][:10] or [low]
        step = _round_step((high - low) / 6)
        first = math.ceil(low / step)
        return [step * (first + place) for place in range(10) if step * (first + place) <= high]


@dataclass(frozen=True, slots=True)
class Series:
    """Points under one name, joined by a line or not."""

    name: str
    points: Sequence[tuple[float, float]]
    notes: Sequence[str] = ()  #: of each point, shown when it is pointed at
    is_line: bool = True
    radius: float = 3.5


def line_chart(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """An SVG picture of at least one point."""
    xs = [x.at(point[0]) for each in series for point in each.points]
    ys = [y.at(point[1]) for each in series for point in each.points]
    across = _Scale(xs, LEFT, WIDTH - RIGHT, from_zero=False)
    upward = _Scale(ys, HEIGHT - BOTTOM, TOP, from_zero=not y.is_log)
    parts = [*_axis_x(x, across), *_axis_y(y, upward)]
    for place, each in enumerate(series):
        colour = COLOURS[place % len(COLOURS)]
        dots = [(across.at(x.at(left)), upward.at(y.at(up))) for left, up in each.points]
        if each.is_line and len(dots) > 1:
            path = " ".join(f"{left:.1f},{up:.1f}" for left, up in dots)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for number, (left, up) in enumerate(dots):
            note = each.notes[number] if number < len(each.notes) else each.name
            parts.append(
                f'<circle cx="{left:.1f}" cy="{up:.1f}" r="{each.radius}" fill="{colour}">'
                f"<title>{escape(note)}</title></circle>"
            )
        parts.append(_legend(place, each.name, colour))
    return _svg(parts, f"{y.label} over {x.label}")


def bar_chart(labels: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], y: str) -> str:
    """An SVG picture of stacked bars, one for each label; values are not negative."""
    # The legend stands above the bars.
    sums = [sum(values[place] for _, values in series) for place in range(len(labels))]
    axis, upward = (
        Axis(y),
        _Scale([0.0, max(sums) * (1 + 0.08 * len(series))], HEIGHT - BOTTOM, TOP, from_zero=True),
    )
    floor, step = HEIGHT - BOTTOM, (WIDTH - LEFT - RIGHT) / len(labels)
    parts = _axis_y(axis, upward)
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{WIDTH - RIGHT}" y2="{floor}"/>')
    every = math.ceil(len(labels) / 7)  # so that labels have room
    for place, label in enumerate(labels):
        left, below = LEFT + step * place, 0.0
        for number_, (name, values) in enumerate(series):
            top, bottom = upward.at(below + values[place]), upward.at(below)
            below += values[place]
            parts.append(
                f'<rect x="{left + step * 0.1:.1f}" y="{top:.1f}" width="{step * 0.8:.1f}" '
                f'height="{bottom - top:.1f}" fill="{COLOURS[number_ % len(COLOURS)]}">'
                f"<title>{escape(f'{label}: {name}: {number(values[place])}')}</title></rect>"
            )
        if place % every == 0:
            parts.append(_text(left + step / 2, floor + 18, label, "middle"))
    for place, (name, _) in enumerate(series):
        parts.append(_legend(place, name, COLOURS[place % len(COLOURS)]))
    return _svg(parts, f"{y} by {', '.join(name for name, _ in series)}")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def page(title: str, *parts: str) -> str:
    """A whole HTML document; `parts` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def number(value: float) -> str:
    """Three digits that count, and no exponent for what people read: 0.0123, 12.3, 12,300."""
    if value == 0 or not math.isfinite(value):
        return str(value if value else 0)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class _Scale:
    """Values to places in the picture."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, from_zero: bool):
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        self.low = 0.0 if from_zero and low >= 0 else low - margin
        self.high = high + margin
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)


def _ends(axis: Axis, scale: _Scale) -> tuple[float, float]:
    return (10**scale.low, 10**scale.high) if axis.is_log else (scale.low, scale.high)


def _axis_x(axis: Axis, scale: _Scale) -> list[str]:
    floor = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{WIDTH - RIGHT}" y2="{floor}"/>']
    for tick in axis.ticks(*_ends(axis, scale)):
        at = scale.at(axis.at(tick))
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{floor}"/>')
        parts.append(_text(at, floor + 18, number(tick), "middle"))
    return [*parts, _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, axis.label, "middle")]


def _axis_y(axis: Axis, scale: _Scale) -> list[str]:
    floor = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{floor}"/>']
    for tick in axis.ticks(*_ends(axis, scale)):
        at = scale.at(axis.at(tick))
        right = WIDTH - RIGHT
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        parts.append(_text(LEFT - 8, at + 4, number(tick), "end"))
    middle = (TOP + floor) / 2
    label = f'<text x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">'
    return [*parts, f"{label}{escape(axis.label)}</text>"]


def _legend(place: int, name: str, colour: str) -> str:
    y = TOP + 14 + 18 * place
    right = WIDTH - RIGHT - 8
    dot = f'<circle cx="{right}" cy="{y - 4}" r="5" fill="{colour}"/>'
    return dot + _text(right - 10, y, name, "end")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= step * 0.999)
