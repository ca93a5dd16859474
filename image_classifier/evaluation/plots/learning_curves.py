"""Learning curves of a run and the sweep of the learning-rate finder, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from image_classifier.evaluation.plots.figure import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    axes_at,
    draw_grid,
    legend_above,
    new_figure,
    save_figure,
)

History = Mapping[str, Sequence[tuple[float, float]]]

_CURVES = (("loss", "loss", "Loss"), ("accuracy", "accuracy", "Accuracy"), ("f1", "f1_macro", "F1 (macro)"))
_LONG_RUN = 40  # epochs from which the loss is also drawn in several panels
_MANY_POINTS = 200  # points above which a curve is smoothed


def plot_learning_curves(history: History, directory: Path) -> list[Path]:
    """Write loss.png, accuracy.png and f1.png from (epoch, value) points; skip metrics without a finite value."""
    written = []
    for name, metric, title in _CURVES:
        series = _series(history, metric)
        if series:
            figure = _learning_curve(series, title, lowest=metric == "loss")
            written.append(save_figure(figure, directory / f"{name}.png"))
    return written


def _series(history: History, metric: str) -> dict[str, np.ndarray]:
    """Return (epoch, value) rows [E, 2] of a metric for each split that has a finite value."""
    series = {split: _points(history.get(f"{split}/{metric}", ())) for split in ("train", "val")}
    return {split: points for split, points in series.items() if np.isfinite(points[:, 1]).any()}


def _learning_curve(series: Mapping[str, np.ndarray], title: str, lowest: bool) -> Figure:
    """Draw one metric: (epoch, value) rows [E, 2] of each split, and the best epoch of the last split."""
    figure = new_figure(7.2, 4.4, title)
    axes = axes_at(figure, 0.85, 0.65, 6.05, 3.05)
    for split, points in series.items():
        _draw_curve(axes, points, split)
    _mark_best(axes, *list(series.items())[-1], lowest=lowest)
    if num_gaps := sum(int(np.isnan(points[:, 1]).sum()) for points in series.values()):
        axes.plot([], [], linestyle="none", marker="x", color=GREY, label=f"{num_gaps} not a number")
    epochs = np.concatenate([points[:, 0] for points in series.values()])
    pad = max(0.5 if np.ptp(epochs) == 0 else 0.0, 0.03 * float(np.ptp(epochs)))
    axes.set_xlim(epochs.min() - pad, epochs.max() + pad)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set(xlabel="epoch", ylabel=title.lower().replace("f1", "F1"))
    draw_grid(axes)
    legend_above(axes, 4)
    return figure


def plot_loss_in_parts(history: History, directory: Path) -> list[Path]:
    """Write loss_parts.png with four panels, for a run of 40 epochs or more."""
    losses = {name: points for name, points in history.items() if name.endswith("/loss")}
    return plot_curves_in_parts(losses, directory, 4, _LONG_RUN)


def plot_curves_in_parts(history: History, directory: Path, panels: int, min_epochs: int = 2) -> list[Path]:
    """Write loss_parts.png, accuracy_parts.png and f1_parts.png: the epochs in equal panels, each with its own scale.

    Late progress can be seen that way. Metrics with fewer than `min_epochs` epochs are skipped; there are never more
    panels than steps between epochs.
    """
    written = []
    for name, metric, title in _CURVES:
        series = _series(history, metric)
        epochs = np.unique(np.concatenate([points[:, 0] for points in series.values()])) if series else np.zeros(0)
        if len(epochs) >= max(2, min_epochs):
            figure = _curve_in_parts(
                series, title, np.linspace(epochs[0], epochs[-1], min(panels, len(epochs) - 1) + 1)
            )
            written.append(save_figure(figure, directory / f"{name}_parts.png"))
    return written


def _curve_in_parts(series: Mapping[str, np.ndarray], title: str, edges: np.ndarray) -> Figure:
    """Draw one panel between each two `edges` (epochs): two in a row, three in a row for more than four panels."""
    panels = len(edges) - 1
    columns = min(panels, 2 if panels <= 4 else 3)
    rows = ceil(panels / columns)
    heading = f"{title}, in {panels} parts" if panels > 1 else title
    figure = new_figure(max(4.6, 0.1 + 3.55 * columns), 0.6 + 2.7 * rows, heading)
    for panel in range(panels):
        row, column = divmod(panel, columns)
        axes = axes_at(figure, 0.75 + 3.55 * column, 0.6 + 2.7 * (rows - 1 - row), 2.6, 2.05)
        for split, points in series.items():
            inside = points[(points[:, 0] >= edges[panel]) & (points[:, 0] <= edges[panel + 1])]
            if len(inside):
                _draw_curve(axes, inside, split)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set(xlabel="epoch", ylabel=title.lower().replace("f1", "F1"))
        draw_grid(axes)
    legend_above(figure.axes[0], 2, side="left")
    return figure


def plot_learning_rate_finder(
    rates: np.ndarray, losses: np.ndarray, smooth: np.ndarray, chosen: float | None, path: Path
) -> Path:
    """Write the sweep of a learning-rate finder: losses [S] and smoothed losses [S] over rates [S], and its choice."""
    figure = new_figure(7.2, 4.4, "Learning-rate finder")
    axes = axes_at(figure, 0.85, 0.65, 6.05, 3.05)
    axes.plot(rates, losses, color=BLUE, linewidth=0.7, alpha=0.4, label="each step")
    axes.plot(rates, smooth, color=BLUE, linewidth=1.8, label="smoothed")
    if chosen is not None:
        axes.axvline(chosen, color=ORANGE, linestyle="--", linewidth=1.4, label=f"chosen: {chosen:.2g}")
    axes.set_xscale("log")
    # The usual labels are formulas, and save_figure turns formulas off.
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes.set_ylim(*_span(smooth))
    axes.set(xlabel="learning rate", ylabel="loss")
    draw_grid(axes)
    legend_above(axes, 4)
    return save_figure(figure, path)


def _span(values: np.ndarray) -> tuple[float, float]:
    """Return the range of the loss axis; the steep end, where training diverges, is cut off."""
    low = float(values.min())
    first = float(values[0])
    top = min(float(values.max()), first + (first - low))
    pad = 0.06 * (top - low) or 0.5
    return low - pad, top + pad


def _points(points: Sequence[tuple[float, float]]) -> np.ndarray:
    """Return rows (epoch, value) [E, 2] in order of epoch: the last value of each, NaN where it is not finite."""
    table = np.array(sorted(dict(points).items()), dtype=np.float64).reshape(-1, 2)
    table[~np.isfinite(table[:, 1]), 1] = np.nan
    return table[np.isfinite(table[:, 0])]


def _draw_curve(axes: Axes, points: np.ndarray, split: str) -> None:
    """Draw a curve, with dots while there are few points; a long one as its running mean over the pale raw values."""
    epochs, values = points.T
    colour, style = (ORANGE, "-") if split == "val" else (BLUE, "--")
    if len(values) > _MANY_POINTS:
        axes.plot(epochs, values, color=colour, linewidth=0.7, alpha=0.3)
        kernel = np.ones(2 * (len(values) // 100) + 1)
        known = np.convolve(np.isfinite(values), kernel, "same")
        total = np.convolve(np.nan_to_num(values), kernel, "same")
        values = np.where(known > 0, total / np.maximum(known, 1), np.nan)
        split = f"{split} (smoothed)"
    marker = "o" if len(values) <= 40 or np.isfinite(values).sum() == 1 else ""
    axes.plot(epochs, values, style, color=colour, linewidth=1.8, marker=marker, markersize=4, label=split)


def _mark_best(axes: Axes, split: str, points: np.ndarray, lowest: bool) -> None:
    values = points[:, 1]
    epoch, value = points[np.nanargmin(values) if lowest else np.nanargmax(values)]
    shown = f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
    axes.axvline(epoch, color=GREY, linewidth=0.9, linestyle=":")
    ring: dict[str, Any] = {
        "marker": "o",
        "markersize": 11,
        "markerfacecolor": "none",
        "markeredgecolor": INK,
        "markeredgewidth": 1.6,
    }
    axes.plot([epoch], [value], linestyle="none", label=f"best {split} {shown} (epoch {epoch:g})", **ring)
