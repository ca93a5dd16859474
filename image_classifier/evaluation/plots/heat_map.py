"""The figure of an explanation: a picture, and beside it the same in grey with a heat map of what speaks for a class."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from image_classifier.evaluation.plots.figure import GREY, INK, axes_at, fit_text, new_figure, save_figure

_MAP = "inferno"  # its lightness rises evenly: read alike in every colour vision, and in grey
_SIDE = 3.0  # inches of a picture's longer side


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Heat float32 [H, W] in 0..1 laid on a picture uint8 [H, W, 3]: colour where there is heat, dark grey elsewhere; NaN, unseen, is paled."""
    grey = np.repeat((picture @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2) / 255
    known = np.nan_to_num(heat)[..., None]
    coloured = matplotlib.colormaps[_MAP](known[..., 0])[..., :3]
    strength = 0.8 * known**0.7
    mixed = np.where(np.isnan(heat)[..., None], 0.75 + 0.25 * grey, (1 - strength) * 0.8 * grey + strength * coloured)
    return np.asarray(np.rint(255 * mixed).clip(0, 255).astype(np.uint8))


def explanation_name(file: Path) -> str:
    """The file name of the figure that explains an answer: the same for an image however its path is written, and no two alike."""
    whole = file.resolve()
    return f"{whole.stem[:60]}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}.png"


def plot_explanation(
    picture: np.ndarray, heat: np.ndarray, answer: str, method: str, path: Path, title: str = ""
) -> Path:
    """Write picture | overlay as PNG: picture uint8 [H, W, 3], heat float32 [H, W] in 0..1, NaN where the network did not look."""
    height, width = (max(0.6, _SIDE * side / max(picture.shape[:2])) for side in picture.shape[:2])
    panel = max(width, 1.8)
    across, up = 2 * panel + 1.25, height + 0.98
    figure = new_figure(across, up, title or answer)
    for place, (image, heading) in enumerate(((picture, answer), (overlay(picture, heat), method))):
        axes = axes_at(figure, 0.15 + place * (panel + 0.15), 0.3, width, height)
        axes.imshow(image, aspect="auto", interpolation="nearest")
        axes.set_title(fit_text(heading, 72 * panel, 10), fontsize=10, color=INK, loc="left", pad=4)
        axes.set_axis_off()
        if place and np.isnan(heat).any():
            _frame(axes, heat)
    _legend(figure, 2 * panel + 0.45, height)
    note = (
        "no place speaks for this class"
        if not np.nan_to_num(heat).any()
        else "pale: cut off before the network looks"
        if np.isnan(heat).any()
        else ""
    )
    figure.text(0.15 / across, 0.1 / up, fit_text(note, 72 * (across - 0.3), 8), fontsize=8, color=GREY, va="bottom")
    return save_figure(figure, path, vector=False)


def _frame(axes: matplotlib.axes.Axes, heat: np.ndarray) -> None:
    """Draw the edge of what the network saw."""
    rows, columns = (np.flatnonzero((~np.isnan(heat)).any(axis=axis)) for axis in (1, 0))
    corner, size = (columns[0] - 0.5, rows[0] - 0.5), (len(columns), len(rows))
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=INK, linewidth=1, linestyle="--"))


def _legend(figure: matplotlib.figure.Figure, left: float, height: float) -> None:
    axes = axes_at(figure, left, 0.3, 0.12, height)
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=_MAP, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.set_yticks([0, 1], ["none", "most"], fontsize=8)
