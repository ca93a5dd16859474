"""The figure of an explanation: an image, and next to it the same in grey under a heat map for one class."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from image_classifier.evaluation.plots.figure import GREY, INK, axes_at, fit_text, new_figure, save_figure

_MAP = "inferno"  # lightness rises evenly: readable with every colour vision, and in grey
_SIDE = 3.0  # inches of a picture's longer side


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return a heat map float32 [H, W] in 0..1 drawn over an image uint8 [H, W, 3].

    The result is uint8 [H, W, 3]: coloured where there is heat, dark grey elsewhere, pale where the heat is NaN.
    """
    grey = np.repeat((picture @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2) / 255
    known = np.nan_to_num(heat)[..., None]
    coloured = matplotlib.colormaps[_MAP](known[..., 0])[..., :3]
    strength = 0.8 * known**0.7
    mixed = np.where(np.isnan(heat)[..., None], 0.75 + 0.25 * grey, (1 - strength) * 0.8 * grey + strength * coloured)
    return np.asarray(np.rint(255 * mixed).clip(0, 255).astype(np.uint8))


def explanation_name(file: Path) -> str:
    """Return the file name of the explanation of an image: unique, and the same however its path is written."""
    resolved = file.resolve()
    return f"{resolved.stem[:60]}-{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:8]}.png"


def plot_explanation(
    picture: np.ndarray, heat: np.ndarray, answer: str, method: str, path: Path, title: str = ""
) -> Path:
    """Write image | overlay as PNG: image uint8 [H, W, 3], heat float32 [H, W] in 0..1, NaN where cropped away."""
    height, width = (max(0.6, _SIDE * side / max(picture.shape[:2])) for side in picture.shape[:2])
    panel = max(width, 1.8)
    across = 2 * panel + 1.25
    up = height + 0.98
    figure = new_figure(across, up, title or answer)
    for column, (image, heading) in enumerate(((picture, answer), (overlay(picture, heat), method))):
        axes = axes_at(figure, 0.15 + column * (panel + 0.15), 0.3, width, height)
        axes.imshow(image, aspect="auto", interpolation="nearest")
        axes.set_title(fit_text(heading, 72 * panel, 10), fontsize=10, color=INK, loc="left", pad=4)
        axes.set_axis_off()
        if column and np.isnan(heat).any():
            _frame(axes, heat)
    _legend(figure, 2 * panel + 0.45, height)
    note = "pale: cropped away, the model does not see it" if np.isnan(heat).any() else ""
    if not np.nan_to_num(heat).any():
        note = "nothing in the image supports this class"
    figure.text(0.15 / across, 0.1 / up, fit_text(note, 72 * (across - 0.3), 8), fontsize=8, color=GREY, va="bottom")
    return save_figure(figure, path, vector=False)


def _frame(axes: matplotlib.axes.Axes, heat: np.ndarray) -> None:
    """Draw a frame around the pixels that the network sees."""
    rows, columns = (np.flatnonzero((~np.isnan(heat)).any(axis=axis)) for axis in (1, 0))
    corner = (columns[0] - 0.5, rows[0] - 0.5)
    size = (len(columns), len(rows))
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=INK, linewidth=1, linestyle="--"))


def _legend(figure: matplotlib.figure.Figure, left: float, height: float) -> None:
    axes = axes_at(figure, left, 0.3, 0.12, height)
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=_MAP, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.set_yticks([0, 1], ["none", "most"], fontsize=8)
