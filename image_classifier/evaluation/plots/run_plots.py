"""Pictures of a run as PNG and SVG files: learning curves, confusion matrix, sample grid, scores per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from image_classifier.errors import DataError
from image_classifier.evaluation.metrics.compute import ClassScore
from image_classifier.evaluation.plots.figure import (
    BLUE,
    DPI,
    GREY,
    INK,
    ORANGE,
    axes_at,
    fit_text,
    new_figure,
    save_figure,
    text_width,
)

_CURVES = (("loss", "loss", "Loss"), ("accuracy", "accuracy", "Accuracy"), ("f1", "f1_macro", "F1 (macro)"))
_LONG = 40  # epochs from which the loss is drawn in parts too
_CELL = 1.9  # side of a sample in inches
_LINE = 1.4  # height of a line of text, in font sizes
_MAX_SAMPLES, _MAX_BARS, _NUM_WORST, _NUM_BEST = 24, 60, 30, 10


def plot_learning_curves(history: Mapping[str, Sequence[tuple[float, float]]], directory: Path) -> list[Path]:
    """Write loss.png, accuracy.png and f1.png from (epoch, value) points; those with no finite value are skipped."""
    written = []
    for name, metric, title in _CURVES:
        series = {split: _points(history.get(f"{split}/{metric}", ())) for split in ("train", "val")}
        series = {split: points for split, points in series.items() if np.isfinite(points[:, 1]).any()}
        if series:
            figure = _learning_curve(series, title, lowest=metric == "loss")
            written.append(save_figure(figure, directory / f"{name}.png"))
    return written


def _learning_curve(series: Mapping[str, np.ndarray], title: str, lowest: bool) -> Figure:
    """Curves of one metric, one array of (epoch, value) rows [E, 2] per split; the best epoch is of the last split."""
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
    axes.grid(color="#e3e3e3", linewidth=0.8)
    # Above the axes, where no curve can pass behind it.
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.01),
        ncols=4,
        fontsize=9,
        frameon=False,
        columnspacing=1.4,
        borderaxespad=0.0,
    )
    return figure


def plot_loss_in_parts(history: Mapping[str, Sequence[tuple[float, float]]], directory: Path) -> list[Path]:
    """Write loss_parts.png for a run of 40 epochs or more, in four parts."""
    return plot_curves_in_parts(
        {name: points for name, points in history.items() if name.endswith("/loss")}, directory, 4, _LONG
    )


def plot_curves_in_parts(
    history: Mapping[str, Sequence[tuple[float, float]]], directory: Path, parts: int, least: int = 2
) -> list[Path]:
    """Write loss_parts.png, accuracy_parts.png and f1_parts.png: equal shares of the epochs, each on its own scale, so that late progress is seen.

    A metric that was followed for fewer than `least` epochs is skipped; there are never more parts than steps between epochs.
    """
    written = []
    for name, metric, title in _CURVES:
        series = {split: _points(history.get(f"{split}/{metric}", ())) for split in ("train", "val")}
        series = {split: points for split, points in series.items() if np.isfinite(points[:, 1]).any()}
        epochs = np.unique(np.concatenate([points[:, 0] for points in series.values()])) if series else np.zeros(0)
        if len(epochs) >= max(2, least):
            figure = _curve_in_parts(series, title, np.linspace(epochs[0], epochs[-1], min(parts, len(epochs) - 1) + 1))
            written.append(save_figure(figure, directory / f"{name}_parts.png"))
    return written


def _curve_in_parts(series: Mapping[str, np.ndarray], title: str, edges: np.ndarray) -> Figure:
    """One panel between each two `edges` (epochs), two in a row, three where there are more than four."""
    parts = len(edges) - 1
    columns = min(parts, 2 if parts <= 4 else 3)
    rows = ceil(parts / columns)
    figure = new_figure(
        max(4.6, 0.1 + 3.55 * columns), 0.6 + 2.7 * rows, f"{title}, in {parts} parts" if parts > 1 else title
    )
    for part in range(parts):
        axes = axes_at(figure, 0.75 + 3.55 * (part % columns), 0.6 + 2.7 * (rows - 1 - part // columns), 2.6, 2.05)
        for split, points in series.items():
            inside = points[(points[:, 0] >= edges[part]) & (points[:, 0] <= edges[part + 1])]
            if len(inside):
                _draw_curve(axes, inside, split)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set(xlabel="epoch", ylabel=title.lower().replace("f1", "F1"))
        axes.grid(color="#e3e3e3", linewidth=0.8)
    axes = figure.axes[0]
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.01),
        ncols=2,
        fontsize=9,
        frameon=False,
        columnspacing=1.4,
        borderaxespad=0.0,
    )
    return figure


def plot_learning_rate_finder(
    rates: np.ndarray, losses: np.ndarray, smooth: np.ndarray, found: float | None, path: Path
) -> Path:
    """Write the sweep of a learning-rate finder: losses [S] and their smooth course over rates [S], and the rate that was `found`."""
    figure = new_figure(7.2, 4.4, "Learning-rate finder")
    axes = axes_at(figure, 0.85, 0.65, 6.05, 3.05)
    axes.plot(rates, losses, color=BLUE, linewidth=0.7, alpha=0.4, label="each step")
    axes.plot(rates, smooth, color=BLUE, linewidth=1.8, label="smoothed")
    if found is not None:
        axes.axvline(found, color=ORANGE, linestyle="--", linewidth=1.4, label=f"chosen: {found:.2g}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(
        lambda rate, _: f"{rate:g}"
    )  # the usual labels are formulas, which figures of ours do not set
    axes.set_ylim(*_span(smooth))
    axes.set(xlabel="learning rate", ylabel="loss")
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.01),
        ncols=4,
        fontsize=9,
        frameon=False,
        columnspacing=1.4,
        borderaxespad=0.0,
    )
    return save_figure(figure, path)


def _span(values: np.ndarray) -> tuple[float, float]:
    """Where a curve's course can be seen: what it climbs to while it diverges is cut."""
    low, first = float(values.min()), float(values[0])
    top = min(float(values.max()), first + (first - low))
    pad = 0.06 * (top - low) or 0.5
    return low - pad, top + pad


def plot_confusion_matrix(confusion: np.ndarray, classes: Sequence[str], path: Path, title: str = "") -> Path:
    """Write the confusion matrix, counts [C, C], rows truth, columns predicted, coloured by the share of the row.

    The counts stand in the cells or, where they do not fit, the most frequent confusions are listed at the side.
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
    note = f" (1 name in {step} is shown)" if step > 1 else ""
    axes.set(xlabel=f"predicted class{note}", ylabel=f"true class{note}")
    if cell:
        _draw_counts(axes, confusion, shares, cell)
    else:
        _list_confusions(axes_at(figure, left + side + 1.15, bottom, 4.6, side), confusion, classes, side)
    return save_figure(figure, path)


def plot_samples(
    images: Sequence[np.ndarray],
    truths: Sequence[str],
    predictions: Sequence[str],
    confidences: Sequence[float],
    path: Path,
    title: str = "",
) -> Path:
    """Write a grid of up to 24 images, uint8 [H, W, 3]: blue and a tick where right, orange and a cross where wrong."""
    rows = list(zip(images, truths, predictions, confidences, strict=True))[:_MAX_SAMPLES]
    if not rows:
        raise DataError("there is no image to draw", "give a part that holds at least one image")
    gap, text = 0.2, 0.46 if any(truth != predicted for _, truth, predicted, _ in rows) else 0.3
    num_columns = min(6, len(rows))
    width, height = (
        max(3.2, gap + num_columns * (_CELL + gap)),
        0.42 + ceil(len(rows) / num_columns) * (_CELL + text) + gap,
    )
    figure = new_figure(width, height, title or "Predictions")
    axes = axes_at(figure, 0, 0, width, height)  # one for all pictures, in inches: axes are what costs time
    for position, row in enumerate(rows):
        down, across = divmod(position, num_columns)
        _draw_sample(axes, *row, gap + across * (_CELL + gap), height - 0.42 - (down + 1) * (_CELL + text))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return save_figure(figure, path, vector=False)


def plot_class_scores(per_class: Sequence[ClassScore], path: Path, title: str = "") -> Path:
    """Write the F1 of each class with its 95 % interval where it has one, worst first; above 60 classes the worst 30 and the best 10."""
    rows, note = _choose_scores(per_class)
    if any(score.intervals.get("f1") for score in per_class):
        note += "; lines: 95 % intervals"
    names = [fit_text(score.label, 170, 9) if score else "…" for score in rows]
    left, height = max(text_width(name, 9) for name in names) / 72 + 0.3, 0.22 * len(rows)
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
    axes.grid(axis="x", color="#e3e3e3", linewidth=0.8)
    _draw_columns(axes, rows)
    figure.text(0.15 / figure.get_figwidth(), 1 - 0.42 / figure.get_figheight(), note, fontsize=9, color=GREY, va="top")
    return save_figure(figure, path)


def _points(points: Sequence[tuple[float, float]]) -> np.ndarray:
    """Rows (epoch, value) [E, 2] in order of epoch, the last word on each, NaN where not finite."""
    table = np.array(sorted(dict(points).items()), dtype=np.float64).reshape(-1, 2)
    table[~np.isfinite(table[:, 1]), 1] = np.nan
    return table[np.isfinite(table[:, 0])]


def _draw_curve(axes: Axes, points: np.ndarray, split: str) -> None:
    """A line with dots while they can be told apart; a long run as its running mean over the pale raw values."""
    epochs, values = points.T
    colour, style = (ORANGE, "-") if split == "val" else (BLUE, "--")
    if len(values) > 200:
        axes.plot(epochs, values, color=colour, linewidth=0.7, alpha=0.3)
        kernel = np.ones(2 * (len(values) // 100) + 1)
        known = np.convolve(np.isfinite(values), kernel, "same")
        total = np.convolve(np.nan_to_num(values), kernel, "same")
        values, split = np.where(known > 0, total / np.maximum(known, 1), np.nan), f"{split} (smoothed)"
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


def _cell_size(largest: int, pitch: float) -> float:
    """Font size in points at which a count fits a cell `pitch` points wide, or 0 (above some 30 classes, a sea of digits)."""
    for size in (10.0, 9.0, 8.0, 7.0):
        if text_width(str(largest), size) < 0.85 * pitch and pitch > 20:
            return size
    return 0.0


def _draw_matrix(
    figure: Figure, axes: Axes, confusion: np.ndarray, bar: tuple[float, float, float, float]
) -> np.ndarray:
    """Paint the share of each row and return it on the colour scale, 0..1 [C, C], NaN in rows that have no image."""
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, confusion / np.maximum(totals, 1), np.nan)
    # The square root lets a confusion of a few per cent be seen beside a full diagonal.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="#dddddd")
    image = axes.imshow(np.ma.masked_invalid(shares), cmap=colours, norm=norm, interpolation="nearest", aspect="auto")
    scale = figure.colorbar(image, cax=axes_at(figure, *bar))
    scale.set_ticks([0, 0.05, 0.25, 0.5, 0.75, 1], labels=["0%", "5%", "25%", "50%", "75%", "100%"], fontsize=8)
    empty = int((totals == 0).sum())
    scale.set_label(
        "share of the true class" + (f" (grey: no image, {empty} of {len(shares)})" if empty else ""), fontsize=9
    )
    return np.asarray(np.sqrt(shares))


def _draw_counts(axes: Axes, confusion: np.ndarray, depth: np.ndarray, size: float) -> None:
    for row, column in np.argwhere((confusion > 0) | np.eye(len(confusion), dtype=bool)):
        colour = "white" if depth[row, column] > 0.6 else INK
        axes.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=size, color=colour)


def _list_confusions(axes: Axes, confusion: np.ndarray, classes: Sequence[str], height: float) -> None:
    """Name the pairs that are mixed up most, by number of images, in a panel 4.6 inches wide."""
    axes.set_axis_off()
    axes.text(0, 1, "Most frequent confusions (true → predicted)", fontsize=10, weight="bold", va="top", color=INK)
    wrong = confusion - np.diag(np.diag(confusion))
    order = [
        pair
        for pair in np.argsort(-wrong, axis=None, kind="stable")[: min(25, int(height / 0.26) - 2)]
        if wrong.flat[pair]
    ]
    for line, pair in enumerate(order):
        truth, predicted = divmod(int(pair), len(classes))
        top = 1 - (0.36 + 0.26 * line) / height
        axes.text(
            0,
            top,
            f"{fit_text(classes[truth], 112, 8)} → {fit_text(classes[predicted], 112, 8)}",
            fontsize=8,
            va="top",
            color=INK,
        )
        axes.text(
            1, top, f"{wrong.flat[pair]} of {confusion[truth].sum()}", fontsize=8, va="top", ha="right", color=ORANGE
        )
    if not order:
        axes.text(0, 1 - 0.36 / height, "none: every image is right", fontsize=9, va="top", color=INK)


def _draw_sample(
    axes: Axes, image: np.ndarray, truth: str, predicted: str, confidence: float, left: float, bottom: float
) -> None:
    """One picture in its square, in its own proportions, framed, with what was answered above it."""
    right = truth == predicted
    colour, mark = (BLUE, "✓") if right else (ORANGE, "✗")
    height, width = (_CELL * side / max(image.shape[:2]) for side in image.shape[:2])
    left, bottom = left + (_CELL - width) / 2, bottom + (_CELL - height) / 2
    # Small images keep their square pixels; large ones are averaged down.
    how = "nearest" if max(image.shape[:2]) < _CELL * DPI else "antialiased"
    axes.imshow(image, interpolation=how, extent=(left, left + width, bottom, bottom + height), aspect="auto")
    axes.add_patch(Rectangle((left, bottom), width, height, fill=False, edgecolor=colour, linewidth=2))
    percent, points = f" {confidence:.0%}", _CELL * 72
    first = f"{mark} {fit_text(predicted, points - text_width(f'{mark} {percent}', 8) - 2, 8)}{percent}"
    second = "" if right else f"\ntrue: {fit_text(truth, points - text_width('true: ', 8) - 2, 8)}"
    axes.text(left, bottom + height + 4 / 72, first + second, fontsize=8, color=colour, va="bottom")


def _choose_scores(per_class: Sequence[ClassScore]) -> tuple[Sequence[ClassScore | None], str]:
    """The rows to draw, worst first, None for the gap, and the sentence that says what they are."""
    ranked = sorted(per_class, key=lambda score: (score.support == 0, score.f1, score.label))
    num_absent = sum(score.support == 0 for score in per_class)
    absent = f"; {num_absent} with no image" if num_absent else ""
    if len(ranked) <= _MAX_BARS:
        return ranked, f"{len(ranked)} classes, worst first{absent}"
    present = ranked[: len(ranked) - num_absent]
    if len(present) <= _MAX_BARS:
        return present, f"{len(present)} of {len(ranked)} classes, worst first{absent}"
    return [
        *present[:_NUM_WORST],
        None,
        *present[-_NUM_BEST:],
    ], f"worst {_NUM_WORST} and best {_NUM_BEST} of {len(ranked)} classes{absent}"


def _draw_columns(axes: Axes, rows: Sequence[ClassScore | None]) -> None:
    """Two columns right of the bars: the score and how many images it rests on."""
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontsize": 9, "ha": "right"}
    for place, heading in ((1.15, "F1"), (1.42, "images")):
        axes.text(place, -0.75, heading, va="bottom", color=GREY, **style)
    for line, score in enumerate(rows):
        if score:
            axes.text(1.15, line, f"{score.f1:.3f}" if score.support else "–", va="center_baseline", color=INK, **style)
            axes.text(1.42, line, str(score.support), va="center_baseline", color=INK, **style)
