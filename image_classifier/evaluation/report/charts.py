"""Small line charts as SVG with the colours of the page: one drawing for dark mode, print and phones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import MaxNLocator

from image_classifier.sampling import evenly_spaced

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 26, 14, 44
_MAX_POINTS = 400  # points of a line
_STYLES = {"train": 0, "val": 1}  # the same in every chart; other lines are styled by their order


@dataclass(frozen=True)
class Scale:
    """An axis: its name, its ends, and whether it shows per cent or only integers."""

    name: str
    low: float
    high: float
    percent: bool = False
    integers: bool = False

    @classmethod
    def over(cls, name: str, values: Sequence[float], percent: bool = False, integers: bool = False) -> Scale:
        """Return an axis over these values with some margin; per cent stays within 0..100."""
        low, high = min(values), max(values)
        pad = 0.06 * (high - low) or (0.5 if integers else 0.05 * abs(high) or 0.5)
        if integers:
            return cls(name, low - (0.5 if low == high else 0), high + (0.5 if low == high else 0), percent, integers)
        return cls(
            name, min(low, max(0.0, low - pad)), max(high, min(1.0, high + pad)) if percent else high + pad, percent
        )

    def position(self, value: float, start: float, end: float) -> float:
        """Return the position of a value between `start` and `end`."""
        return start + (value - self.low) / (self.high - self.low) * (end - start)

    def ticks(self) -> list[float]:
        """Return round values within the axis."""
        values = MaxNLocator(nbins=5, integer=self.integers, min_n_ticks=1 if self.integers else 2).tick_values(
            self.low, self.high
        )
        return [float(value) for value in values if self.low - 1e-9 <= value <= self.high + 1e-9]

    def label(self, value: float) -> str:
        """Return the label of a tick."""
        return f"{100 * value:.4g} %" if self.percent else f"{value:.4g}"


def line_chart(lines: Mapping[str, Points], across: Scale, up: Scale, about: str, guide: Points = ()) -> str:
    """Return a chart of lines by name, each with its colour and dashes, and a legend; all text is escaped.

    `about` describes the chart for screen readers, `guide` is a thin grey line.
    """
    elements = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(about)}">']
    elements += [_grid(across, up)]
    if guide:
        elements.append(f'<polyline class="guide" points="{_path(guide, across, up)}"/>')
    for number, (name, points) in enumerate(lines.items()):
        number = _STYLES.get(name, number)
        kept = _thinned(points)
        elements.append(f'<polyline class="line line{number}" points="{_path(kept, across, up)}"/>')
        if len(kept) <= 30:
            elements += [
                f'<circle class="dot line{number}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in _positions(kept, across, up)
            ]
    return "".join([*elements, "</svg>", _legend(list(lines))])


def _grid(across: Scale, up: Scale) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    elements = []
    for value in up.ticks():
        y = round(up.position(value, bottom, _TOP), 1)
        elements.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        elements.append(f'<text x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{escape(up.label(value))}</text>')
    for value in across.ticks():
        x = round(across.position(value, _LEFT, right), 1)
        elements.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{escape(across.label(value))}</text>')
    elements.append(f'<line class="base" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    position = f'x="{(_LEFT + right) / 2}" y="{_HEIGHT - 5}"'
    elements.append(f'<text class="name" {position} text-anchor="middle">{escape(across.name)}</text>')
    return "".join(elements)


def _thinned(points: Points) -> Points:
    if len(points) <= _MAX_POINTS:
        return points
    return [points[row] for row in evenly_spaced(len(points), _MAX_POINTS).tolist()]


def _positions(points: Points, across: Scale, up: Scale) -> list[tuple[float, float]]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    return [(round(across.position(x, _LEFT, right), 1), round(up.position(y, bottom, _TOP), 1)) for x, y in points]


def _path(points: Points, across: Scale, up: Scale) -> str:
    return " ".join(f"{x},{y}" for x, y in _positions(points, across, up))


def _legend(names: Sequence[str]) -> str:
    marks = (
        f'<svg class="mark" viewBox="0 0 22 6" aria-hidden="true">'
        f'<line class="line line{number}" x1="0" x2="22" y1="3" y2="3"/></svg>'
        for number in (_STYLES.get(name, order) for order, name in enumerate(names))
    )
    items = "".join(f"<span>{mark}{escape(name)}</span>" for mark, name in zip(marks, names, strict=True))
    return f'<p class="legend">{items}</p>' if len(names) > 1 or names[0] in _STYLES else ""
