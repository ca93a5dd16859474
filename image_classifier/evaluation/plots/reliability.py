"""Figures of how far predictions can be trusted: reliability before and after calibration, risk over coverage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from image_classifier.evaluation.metrics.bootstrap import wilson
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
from image_classifier.evaluation.reliability.calibration import Reliability
from image_classifier.evaluation.reliability.selective_prediction import RiskCurve


def plot_reliability(before: Reliability, after: Reliability, temperature: float, path: Path, title: str = "") -> Path:
    """Write the reliability diagram without and with the temperature: accuracy over confidence, and images per bin."""
    figure = new_figure(7.6, 4.75, title or "Reliability")
    panels = ((before, "before calibration", ORANGE), (after, f"temperature {temperature:.3g}", BLUE))
    for number, (bins, name, colour) in enumerate(panels):
        left = 0.75 + 3.55 * number
        axes = axes_at(figure, left, 1.5, 2.95, 2.5)
        axes.set_title(f"{name}: ECE {bins.ece:.2%}", fontsize=10, loc="left", color=INK)
        _draw_bins(axes, bins, colour)
        axes.set_ylabel("accuracy" if number == 0 else "")
        _draw_counts(axes_at(figure, left, 0.6, 2.95, 0.6), bins, colour, "images" if number == 0 else "")
    return save_figure(figure, path)


def _draw_bins(axes: Axes, bins: Reliability, colour: str) -> None:
    """Draw a dot for each bin that is not empty, with the 95 % interval of its accuracy (Wilson, 1927)."""
    filled = bins.counts > 0
    counts, share = bins.counts[filled], bins.accuracy[filled]
    low, high = wilson(np.round(share * counts), counts)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1.0, linestyle=":", label="perfect")
    axes.vlines(bins.confidence[filled], low, high, color=colour, alpha=0.45, linewidth=2.2)
    axes.plot(bins.confidence[filled], share, "o-", color=colour, linewidth=1.4, markersize=4.5, label="95 % interval")
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6), xticklabels=[])
    draw_grid(axes)
    axes.set_axisbelow(True)


def _draw_counts(axes: Axes, bins: Reliability, colour: str, label: str) -> None:
    highest = max(1, int(bins.counts.max()))
    axes.bar(
        bins.edges[:-1],
        bins.counts,
        width=np.diff(bins.edges),
        align="edge",
        color=colour,
        alpha=0.6,
        edgecolor="white",
        linewidth=0.8,
    )
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1.1 * highest),
        xticks=np.linspace(0, 1, 6),
        yticks=[0, highest],
        xlabel="confidence",
        ylabel=label,
    )
    axes.tick_params(axis="y", labelsize=8)


def plot_risk_coverage(
    curve: RiskCurve, promised: float | None, chosen: tuple[float, float] | None, path: Path, title: str = ""
) -> Path:
    """Write the risk-coverage curve: the share of wrong labels when only the most confident predictions count.

    `promised` is the risk that the limits promise, `chosen` the coverage and risk with the limits in use.
    """
    figure = new_figure(7.2, 4.6, title or "Risk and coverage")
    axes = axes_at(figure, 0.85, 0.65, 6.05, 3.05)
    axes.plot(
        curve.coverage,
        curve.risk,
        color=BLUE,
        linewidth=1.8,
        label=f"AURC {curve.area:.4f} (best order: {curve.best_area:.4f})",
    )
    if promised is not None:
        axes.axhline(
            promised, color=GREY, linestyle="--", linewidth=1.0, label=f"promised: at most {100 * promised:g}%"
        )
    if chosen is not None:
        axes.plot(
            *chosen,
            "o",
            color=ORANGE,
            markersize=8,
            label=f"in use: {chosen[0]:.0%} labelled, {chosen[1]:.1%} wrong",
            clip_on=False,
            zorder=3,
        )
    settled = curve.risk[curve.coverage >= 0.05]  # the first few images make it jump
    top = max(0.01, 1.15 * float(settled.max(initial=0)), 1.3 * (promised or 0), 1.15 * (chosen[1] if chosen else 0))
    axes.set(
        xlim=(0, 1),
        ylim=(0, top),
        xlabel="coverage: share of images that get a label",
        ylabel="risk: share of wrong labels",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    draw_grid(axes)
    legend_above(axes, 2)
    return save_figure(figure, path)
