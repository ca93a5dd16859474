"""The robustness figure: accuracy by severity, one panel for each corruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from image_classifier.evaluation.plots.figure import BLUE, GREY, INK, axes_at, draw_grid, new_figure, save_figure

_NAMES = {"jpeg": "JPEG"}


def plot_robustness(accuracy: Mapping[str, Mapping[str, float]], num_images: int, path: Path, title: str = "") -> Path:
    """Write one panel for each corruption: accuracy in per cent by severity; severity "0" is the unchanged image."""
    columns = 3
    num_rows = -(-len(accuracy) // columns)
    height = 0.75 + 2.2 * num_rows + 0.3
    figure = new_figure(7.6, height, title or "Robustness")
    for number, (name, row) in enumerate(accuracy.items()):
        down, across = divmod(number, columns)
        axes = axes_at(figure, 0.65 + 2.35 * across, height - 0.85 - 2.2 * down - 1.5, 1.95, 1.45)
        severities = [int(severity) for severity in row]
        values = [100 * value for value in row.values()]
        axes.axhline(values[0], color=GREY, linewidth=1, linestyle="--")
        axes.plot(severities, values, color=BLUE, linewidth=1.8, marker="o", markersize=4)
        axes.set(xlim=(-0.2, severities[-1] + 0.45), ylim=(-4, 108), axisbelow=True)
        style: dict[str, Any] = {
            "fontsize": 8,
            "va": "center",
            "color": INK,
            "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        }
        axes.annotate(f"{values[-1]:.0f}", (severities[-1], values[-1]), (5, 0), textcoords="offset points", **style)
        axes.set_xticks(severities, ["none", *map(str, severities[1:])], fontsize=8)
        axes.set_yticks(range(0, 101, 25), [str(value) for value in range(0, 101, 25)], fontsize=8)
        axes.set_title(_NAMES.get(name, name), fontsize=10, loc="left", pad=4, color=INK)
        draw_grid(axes)
        if across == 0:
            axes.set_ylabel("accuracy, %", fontsize=8)
        if down == num_rows - 1:
            axes.set_xlabel("severity", fontsize=8)
    note = f"{num_images} images; dashed line: accuracy on the unchanged images"
    figure.text(0.15 / 7.6, 0.08 / height, note, fontsize=8, color=GREY, va="bottom")
    return save_figure(figure, path)
