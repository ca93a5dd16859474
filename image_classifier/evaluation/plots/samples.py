"""A grid of images with true and predicted classes, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from image_classifier.errors import DataError
from image_classifier.evaluation.plots.figure import (
    BLUE,
    DPI,
    ORANGE,
    axes_at,
    fit_text,
    new_figure,
    save_figure,
    text_width,
)

_CELL = 1.9  # side of a sample in inches
_MAX_SAMPLES = 24


def plot_samples(
    images: Sequence[np.ndarray],
    truths: Sequence[str],
    predictions: Sequence[str],
    confidences: Sequence[float],
    path: Path,
    title: str = "",
) -> Path:
    """Write a grid of up to 24 images, uint8 [H, W, 3]: blue with a tick for right, orange with a cross for wrong.

    Raises:
        DataError: There is no image.
    """
    rows = list(zip(images, truths, predictions, confidences, strict=True))[:_MAX_SAMPLES]
    if not rows:
        raise DataError("no image to draw", "choose a split with at least one image")
    gap = 0.2
    text = 0.46 if any(truth != predicted for _, truth, predicted, _ in rows) else 0.3
    num_columns = min(6, len(rows))
    width = max(3.2, gap + num_columns * (_CELL + gap))
    height = 0.42 + ceil(len(rows) / num_columns) * (_CELL + text) + gap
    figure = new_figure(width, height, title or "Predictions")
    axes = axes_at(figure, 0, 0, width, height)  # one for all images, in inches: axes are slow to draw
    for position, row in enumerate(rows):
        down, across = divmod(position, num_columns)
        _draw_sample(axes, *row, gap + across * (_CELL + gap), height - 0.42 - (down + 1) * (_CELL + text))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return save_figure(figure, path, vector=False)


def _draw_sample(
    axes: Axes, image: np.ndarray, truth: str, predicted: str, confidence: float, left: float, bottom: float
) -> None:
    """Draw one image in its square cell, with its proportions kept, a frame, and the prediction above it."""
    right = truth == predicted
    colour, mark = (BLUE, "✓") if right else (ORANGE, "✗")
    height, width = (_CELL * side / max(image.shape[:2]) for side in image.shape[:2])
    left += (_CELL - width) / 2
    bottom += (_CELL - height) / 2
    # Small images keep their square pixels; large ones are averaged down.
    interpolation = "nearest" if max(image.shape[:2]) < _CELL * DPI else "antialiased"
    axes.imshow(image, interpolation=interpolation, extent=(left, left + width, bottom, bottom + height), aspect="auto")
    axes.add_patch(Rectangle((left, bottom), width, height, fill=False, edgecolor=colour, linewidth=2))
    percent = f" {confidence:.0%}"
    points = _CELL * 72
    first = f"{mark} {fit_text(predicted, points - text_width(f'{mark} {percent}', 8) - 2, 8)}{percent}"
    second = "" if right else f"\ntrue: {fit_text(truth, points - text_width('true: ', 8) - 2, 8)}"
    axes.text(left, bottom + height + 4 / 72, first + second, fontsize=8, color=colour, va="bottom")
