"""The F1 of each class as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from image_classifier.evaluation.metrics.compute import ClassScore
from image_classifier.evaluation.plots.figure import (
    BLUE,
    GREY,
    INK,
    axes_at,
    draw_grid,
    fit_text,
    new_figure,
    save_figure,
    text_width,
)

_MAX_BARS = 60
_NUM_WORST = 30
_NUM_BEST = 10


def plot_class_scores(per_class: Sequence[ClassScore], path: Path, title: str = "") -> Path:
    """Write the F1 of each class and its 95 % interval, worst first; above 60 classes the worst 30 and the best 10."""
    rows, note = _choose_scores(per_class)
    if any(score.intervals.get("f1") for score in per_class):
        note += "; lines: 95 % intervals"
    names = [fit_text(score.label, 170, 9) if score else "…" for score in rows]
    left = max(text_width(name, 9) for name in names) / 72 + 0.3
    height = 0.22 * len(rows)
    figure = new_figure(left + 5.6, height + 1.4, title or "F1 per class")
    axes = axes_at(figure, left, 0.6, 3.7, height)
    values = [score.f1 if score else 0.0 for score in rows]
    axes.barh(range(len(rows)), values, height=0.72, color=BLUE)
    spans = [(line, *bounds) for line, score in enumerate(rows) if score and (bounds := score.intervals.get("f1"))]
    if spans:
        lines, lows, highs = zip(*spans, strict=True)
        axes.hlines(lines, lows, highs, color=INK, linewidth=1.2)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel="F1", axisbelow=True)
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    draw_grid(axes, "x")
    _draw_columns(axes, rows)
    figure.text(0.15 / figure.get_figwidth(), 1 - 0.42 / figure.get_figheight(), note, fontsize=9, color=GREY, va="top")
    return save_figure(figure, path)


def _choose_scores(per_class: Sequence[ClassScore]) -> tuple[Sequence[ClassScore | None], str]:
    """Return the rows to draw, worst first, with None for the gap, and a note that describes the selection."""
    ranked = sorted(per_class, key=lambda score: (score.support == 0, score.f1, score.label))
    num_absent = sum(score.support == 0 for score in per_class)
    absent = f"; {num_absent} without images" if num_absent else ""
    if len(ranked) <= _MAX_BARS:
        return ranked, f"{len(ranked)} classes, worst first{absent}"
    present = ranked[: len(ranked) - num_absent]
    if len(present) <= _MAX_BARS:
        return present, f"{len(present)} of {len(ranked)} classes, worst first{absent}"
    rows = [*present[:_NUM_WORST], None, *present[-_NUM_BEST:]]
    return rows, f"worst {_NUM_WORST} and best {_NUM_BEST} of {len(ranked)} classes{absent}"


def _draw_columns(axes: Axes, rows: Sequence[ClassScore | None]) -> None:
    """Write two columns to the right of the bars: the score and the number of images."""
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontsize": 9, "ha": "right"}
    for x, heading in ((1.15, "F1"), (1.42, "images")):
        axes.text(x, -0.75, heading, va="bottom", color=GREY, **style)
    for line, score in enumerate(rows):
        if score:
            axes.text(1.15, line, f"{score.f1:.3f}" if score.support else "–", va="center_baseline", color=INK, **style)
            axes.text(1.42, line, str(score.support), va="center_baseline", color=INK, **style)
