"""Figures of a study: its trials by value, and which keys the metric depends on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import optuna
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from image_classifier.evaluation.plots.figure import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    axes_at,
    fit_text,
    new_figure,
    save_figure,
    text_width,
)

_MIN_TRIALS = 6  # for an importance: with fewer, the forest fits noise
_GRID = "#e3e3e3"


def plot_study(study: optuna.Study, metric: str, directory: Path) -> list[str]:
    """Write history.png and, where there are enough trials, importance.png; return lines for a terminal about them.

    Importance is the share of the metric's variance that a key explains (functional ANOVA on a random forest, Hutter et
    al., 2014).
    """
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    maximise = study.direction.name == "MAXIMIZE"
    history = plot_history(trials, metric, study.study_name, maximise, directory / "history.png")
    lines = [f"plots    {history}"]
    keys = {key for trial in complete for key in trial.params}
    if len(complete) < _MIN_TRIALS or len(keys) < 2 or len({trial.value for trial in complete}) < 2:
        need = f"needs {_MIN_TRIALS} complete trials of two or more keys, there are {len(complete)} of {len(keys)}"
        return [*lines, f"         no importance.png: it {need}"]
    # It imports scikit-learn, which nothing before the end of a study needs.
    from optuna import importance

    shares = importance.get_param_importances(study, evaluator=importance.FanovaImportanceEvaluator(seed=0))
    path = plot_importance(shares, len(complete), metric, study.study_name, directory / "importance.png")
    return [*lines, f"         {path}"]


def plot_history(trials: Sequence[FrozenTrial], metric: str, name: str, maximise: bool, path: Path) -> Path:
    """Write a figure of each trial's value by number, and of the best so far."""
    complete = sorted(
        (trial.number, trial.value)
        for trial in trials
        if trial.state is TrialState.COMPLETE and trial.value is not None
    )
    pruned = [
        (trial.number, trial.value) for trial in trials if trial.state is TrialState.PRUNED and trial.value is not None
    ]
    failed = [trial.number for trial in trials if trial.state is TrialState.FAIL]
    figure = new_figure(7.2, 4.4, f"{name}: {len(complete)} complete, {len(pruned)} pruned, {len(failed)} failed")
    axes = axes_at(figure, 0.85, 0.65, 6.05, 3.05)
    if complete:
        numbers, values = zip(*complete, strict=True)
        best = list(accumulate(values, max if maximise else min))
        last = max([*numbers, *failed, *(number for number, _ in pruned)])
        axes.step([*numbers, last], [*best, best[-1]], where="post", color=ORANGE, linewidth=1.6, label="best so far")
        axes.plot(numbers, values, linestyle="none", marker="o", markersize=5, color=BLUE, label="complete")
        winner = numbers[values.index(best[-1])]
        axes.plot(
            [winner],
            [best[-1]],
            linestyle="none",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=INK,
            label=f"trial {winner}",
        )
    if pruned:
        axes.plot(*zip(*pruned, strict=True), linestyle="none", marker="x", markersize=5, color=GREY, label="pruned")
    if failed:
        axes.plot(
            failed,
            [0.02] * len(failed),
            linestyle="none",
            marker="v",
            markersize=5,
            color=INK,
            label="failed",
            transform=axes.get_xaxis_transform(),
        )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set(xlabel="trial", ylabel=metric)
    axes.margins(y=0.1)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.01),
        ncols=5,
        fontsize=9,
        frameon=False,
        columnspacing=1.2,
        borderaxespad=0.0,
    )
    return save_figure(figure, path)


def plot_importance(shares: dict[str, float], num_trials: int, metric: str, name: str, path: Path) -> Path:
    """Write a figure of the share of the metric's variance that each key explains, the largest first."""
    rows = sorted(shares.items(), key=lambda row: -row[1])
    names = [fit_text(key, 200, 9) for key, _ in rows]
    left, height = max(text_width(key, 9) for key in names) / 72 + 0.3, 0.3 * len(rows)
    figure = new_figure(left + 5.0, height + 1.35, f"{name}: importance for {metric}")
    note = f"share of the variance over {num_trials} complete trials (functional ANOVA)"
    figure.text(0.15 / figure.get_figwidth(), 1 - 0.42 / figure.get_figheight(), note, fontsize=9, color=GREY, va="top")
    axes = axes_at(figure, left, 0.6, 4.0, height)
    values = [share for _, share in rows]
    axes.barh(range(len(rows)), values, height=0.66, color=BLUE)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel="importance", axisbelow=True)
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    for line, value in enumerate(values):
        axes.text(
            1.04,
            line,
            f"{value:.2f}",
            transform=axes.get_yaxis_transform(),
            fontsize=9,
            va="center_baseline",
            color=INK,
        )
    return save_figure(figure, path)
