"""The confusion matrix as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from image_classifier.evaluation.plots.figure import (
    INK,
    ORANGE,
    axes_at,
    fit_text,
    new_figure,
    save_figure,
    text_width,
)

_LINE = 1.4  # height of a line of text, in font sizes


def plot_confusion_matrix(confusion: np.ndarray, classes: Sequence[str], path: Path, title: str = "") -> Path:
    """Write the confusion matrix: counts [C, C], rows true, columns predicted, coloured by the share of the row.

    The counts are in the cells. Where they do not fit, the most frequent confusions are listed at the side.
    """
    num_classes = len(classes)
    side = min(max(3.8, 0.56 * num_classes), 9.6)
    pitch = side * 72 / num_classes
    size = 9.0 if pitch > 14 else 7.0
    step = ceil(_LINE * size / pitch)
    names = [fit_text(name, 120, size) for name in classes[::step]]
    widest = max(text_width(name, size) for name in names)
    upright = widest > 0.9 * pitch * step
    left, bottom = widest / 72 + 0.6, (widest if upright else size) / 72 + 0.6
    cell = _cell_size(int(confusion.max()), pitch)
    figure = new_figure(left + side + (1.05 if cell else 6.0), bottom + side + 0.6, title or "Confusion matrix")
    axes = axes_at(figure, left, bottom, side, side)
    shares = _draw_matrix(figure, axes, confusion, (left + side + 0.15, bottom, 0.15, side))
    ticks = range(0, num_classes, step)
    axes.set_xticks(ticks, names, fontsize=size, rotation=90 if upright else 0)
    axes.set_yticks(ticks, names, fontsize=size)
    note = f" (1 name in {step} shown)" if step > 1 else ""
    axes.set(xlabel=f"predicted class{note}", ylabel=f"true class{note}")
    if cell:
        _draw_counts(axes, confusion, shares, cell)
    else:
        _list_confusions(axes_at(figure, left + side + 1.15, bottom, 4.6, side), confusion, classes, side)
    return save_figure(figure, path)


def _cell_size(largest: int, pitch: float) -> float:
    """Return the font size in points at which a count fits a cell `pitch` points wide; 0 where none does."""
    for size in (10.0, 9.0, 8.0, 7.0):
        if text_width(str(largest), size) < 0.85 * pitch and pitch > 20:
            return size
    return 0.0


def _draw_matrix(
    figure: Figure, axes: Axes, confusion: np.ndarray, bar: tuple[float, float, float, float]
) -> np.ndarray:
    """Paint the share of each row; return the depth of colour, 0..1 [C, C], NaN in rows without images."""
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, confusion / np.maximum(totals, 1), np.nan)
    # The square root makes a confusion of a few per cent visible next to a full diagonal.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="#dddddd")
    image = axes.imshow(np.ma.masked_invalid(shares), cmap=colours, norm=norm, interpolation="nearest", aspect="auto")
    scale = figure.colorbar(image, cax=axes_at(figure, *bar))
    scale.set_ticks([0, 0.05, 0.25, 0.5, 0.75, 1], labels=["0%", "5%", "25%", "50%", "75%", "100%"], fontsize=8)
    empty = int((totals == 0).sum())
    note = f"; {empty} of {len(shares)} classes have no image (grey)" if empty else ""
    scale.set_label(f"share of the true class, square-root scale{note}", fontsize=9)
    return np.asarray(np.sqrt(shares))


def _draw_counts(axes: Axes, confusion: np.ndarray, depth: np.ndarray, size: float) -> None:
    for row, column in np.argwhere((confusion > 0) | np.eye(len(confusion), dtype=bool)):
        colour = "white" if depth[row, column] > 0.6 else INK
        axes.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=size, color=colour)


def _list_confusions(axes: Axes, confusion: np.ndarray, classes: Sequence[str], height: float) -> None:
    """List the pairs of classes that are confused most, by number of images, in a panel 4.6 inches wide."""
    axes.set_axis_off()
    axes.text(0, 1, "Most frequent confusions (true → predicted)", fontsize=10, weight="bold", va="top", color=INK)
    wrong = confusion - np.diag(np.diag(confusion))
    room = min(25, int(height / 0.26) - 2)
    order = [pair for pair in np.argsort(-wrong, axis=None, kind="stable")[:room] if wrong.flat[pair]]
    for line, pair in enumerate(order):
        truth, predicted = divmod(int(pair), len(classes))
        top = 1 - (0.36 + 0.26 * line) / height
        names = f"{fit_text(classes[truth], 112, 8)} → {fit_text(classes[predicted], 112, 8)}"
        count = f"{wrong.flat[pair]} of {confusion[truth].sum()}"
        axes.text(0, top, names, fontsize=8, va="top", color=INK)
        axes.text(1, top, count, fontsize=8, va="top", ha="right", color=ORANGE)
    if not order:
        axes.text(0, 1 - 0.36 / height, "none: every prediction is right", fontsize=9, va="top", color=INK)
