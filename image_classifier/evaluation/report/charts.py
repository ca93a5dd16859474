"""Small line charts as SVG that takes its colours from the page, so that dark, print and narrow screens need no second picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import MaxNLocator

from image_classifier.sampling import evenly_spaced

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 26, 14, 44
_MOST = 400  # points of a line
_STYLES = {"train": 0, "val": 1}  # a part looks the same in every chart; other lines by their order


@dataclass(frozen=True)
class Scale:
    """An axis: its name, its ends, and whether it shows per cent."""

    name: str
    low: float
    high: float
    percent: bool = False
    whole: bool = False

    @classmethod
    def over(cls, name: str, values: Sequence[float], percent: bool = False, whole: bool = False) -> Scale:
        """An axis over these values with a little air; per cent stays within 0..100."""
        low, high = min(values), max(values)
        pad = 0.06 * (high - low) or (0.5 if whole else 0.05 * abs(high) or 0.5)
        if whole:
            return cls(name, low - (0.5 if low == high else 0), high + (0.5 if low == high else 0), percent, whole)
        return cls(
            name, min(low, max(0.0, low - pad)), max(high, min(1.0, high + pad)) if percent else high + pad, percent
        )

    def place(self, value: float, start: float, end: float) -> float:
        """Where a value comes to lie between `start` and `end`."""
        return start + (value - self.low) / (self.high - self.low) * (end - start)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        values = MaxNLocator(nbins=5, integer=self.whole, min_n_ticks=1 if self.whole else 2).tick_values(
            self.low, self.high
        )
        return [float(value) for value in values if self.low - 1e-9 <= value <= self.high + 1e-9]

    def words(self, value: float) -> str:
        """A tick's text."""
        return f"{100 * value:.4g} %" if self.percent else f"{value:.4g}"


def line_chart(lines: Mapping[str, Points], across: Scale, up: Scale, about: str, guide: Points = ()) -> str:
    """Lines by name, each in a colour and dashes of its own; `about` says in words what is seen, `guide` is a thin grey line.

    Every text in it is escaped.
    """
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(about)}">']
    parts += [_grid(across, up)]
    if guide:
        parts.append(f'<polyline class="guide" points="{_path(guide, across, up)}"/>')
    for number, (name, points) in enumerate(lines.items()):
        number, kept = _STYLES.get(name, number), _thinned(points)
        parts.append(f'<polyline class="line line{number}" points="{_path(kept, across, up)}"/>')
        if len(kept) <= 30:
            parts += [
                f'<circle class="dot line{number}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in _places(kept, across, up)
            ]
    return "".join([*parts, "</svg>", _legend(list(lines))])


def _grid(across: Scale, up: Scale) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in up.ticks():
        y = round(up.place(value, bottom, _TOP), 1)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{escape(up.words(value))}</text>')
    for value in across.ticks():
        x = round(across.place(value, _LEFT, right), 1)
        parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{escape(across.words(value))}</text>')
    parts.append(f'<line class="base" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="name" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(across.name)}</text>'
    )
    return "".join(parts)


def _thinned(points: Points) -> Points:
    if len(points) <= _MOST:
        return points
    return [points[row] for row in evenly_spaced(len(points), _MOST).tolist()]


def _places(points: Points, across: Scale, up: Scale) -> list[tuple[float, float]]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    return [(round(across.place(x, _LEFT, right), 1), round(up.place(y, bottom, _TOP), 1)) for x, y in points]


def _path(points: Points, across: Scale, up: Scale) -> str:
    return " ".join(f"{x},{y}" for x, y in _places(points, across, up))


def _legend(names: Sequence[str]) -> str:
    marks = (
        f'<svg class="mark" viewBox="0 0 22 6" aria-hidden="true"><line class="line line{number}" x1="0" x2="22" y1="3" y2="3"/></svg>'
        for number in (_STYLES.get(name, place) for place, name in enumerate(names))
    )
    items = "".join(f"<span>{mark}{escape(name)}</span>" for mark, name in zip(marks, names, strict=True))
    return f'<p class="legend">{items}</p>' if len(names) > 1 or names[0] in _STYLES else ""
