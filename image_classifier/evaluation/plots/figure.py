"""Figures without pyplot: laid out in inches from measured text, so that nothing overlaps, and saved as PNG and SVG.

The colours are those of Okabe and Ito (2008), which every kind of colour vision can distinguish.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Literal, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from image_classifier.atomic_io import write_bytes

DPI = 150
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#6b6b6b", "#222222"
_FONT = "DejaVu Sans"  # ships with matplotlib, draws Latin, Greek and Cyrillic


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty white figure, its size in inches, with its title at the upper left."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    shown = fit_text(title, 72 * (width - 0.4), 12, "bold")
    figure.text(0.15 / width, 1 - 0.15 / height, shown, fontsize=12, weight="bold", va="top", color=INK)
    return figure


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Return axes at a position in inches from the lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def draw_grid(axes: Axes, axis: Literal["both", "x", "y"] = "both") -> None:
    """Draw the pale grid that all figures share."""
    axes.grid(axis=axis, color="#e3e3e3", linewidth=0.8)


def legend_above(axes: Axes, columns: int, side: Literal["left", "right"] = "right") -> None:
    """Put the legend above the axes, where no curve can pass behind it."""
    axes.legend(
        loc="lower right" if side == "right" else "lower left",
        bbox_to_anchor=(1.0 if side == "right" else 0.0, 1.01),
        ncols=columns,
        fontsize=9,
        frameon=False,
        columnspacing=1.4,
        borderaxespad=0.0,
    )


def save_figure(figure: Figure, path: Path, vector: bool = True) -> Path:
    """Write the figure as PNG and, with `vector`, also as SVG.

    Each file is written completely or not at all, and the same figure gives the same bytes.
    """
    for text in figure.findobj(lambda artist: isinstance(artist, Text)):
        cast(Text, text).set_fontfamily(_FONT)
        cast(Text, text).set_parse_math(False)  # a class may be called `$x_1$`
    drawing, buffer = _svg(figure) if vector else None, io.BytesIO()
    # Level 3 takes a quarter less time than 6 for photographs, and files are a tenth larger.
    FigureCanvasAgg(figure).print_figure(
        buffer, format="png", dpi=DPI, facecolor="white", pil_kwargs={"compress_level": 3}
    )
    write_bytes(path, buffer.getvalue())
    if drawing is not None:
        write_bytes(path.with_suffix(".svg"), drawing)
    return path


def _svg(figure: Figure) -> bytes:
    """Return the figure as SVG without dates or random names.

    Letters are outlines: they need no font, stay where they were measured, and cannot be code.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "image_classifier"}):
        FigureCanvasSVG(figure).print_figure(buffer, format="svg", dpi=DPI, facecolor="white", metadata={"Date": None})
    return buffer.getvalue()


@lru_cache(maxsize=4096)
def fit_text(text: str, width: float, size: float, weight: str = "normal") -> str:
    """Return the text shortened to one line of `width` points.

    Characters that the font lacks become □; the middle of a long text becomes an ellipsis.
    """
    font = _face(weight)
    text = " ".join(
        "".join(c if c.isspace() or (c.isprintable() and font.get_char_index(ord(c))) else "□" for c in text).split()
    )
    cuts = [f"{text[: ceil(kept / 2)]}…{text[len(text) - kept // 2 :]}" for kept in range(1, min(len(text), 200))]
    if not cuts or (len(text) <= 200 and text_width(text, size, weight) <= width):
        return text
    return cuts[max(0, bisect_right(cuts, width, key=lambda cut: text_width(cut, size, weight)) - 1)]


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of one line of drawable text, in points."""
    font = _face(weight)
    font.set_size(size, DPI)  # hinting makes the width depend on the resolution
    font.set_text(text, 0.0)
    return float(font.get_width_height()[0] / 64 * 72 / DPI)


def _face(weight: str) -> FT2Font:
    return get_font(findfont(f"{_FONT}:{weight}"))
