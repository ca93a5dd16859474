"""The learning rate of `optimizer.lr=auto`: a sweep with rising rates, on what the run will train."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.errors import TrainingError
from image_classifier.evaluation.plots.learning_curves import plot_learning_rate_finder
from image_classifier.training.builders import TrainingInputs
from image_classifier.training.callbacks.lr_sweep import LearningRateSweep
from image_classifier.training.distributed import broadcast, is_rank_zero
from image_classifier.training.transfer.activations import KeptActivations
from image_classifier.training.trial_trainer import UNSCHEDULED, TrialTrainer

log = logging.getLogger(__name__)

_SWEEP_STEPS, _LOWEST_RATE, _HIGHEST_RATE = 100, 1e-6, 10.0
_REASONS = {"suggest": "falls fastest", "lowest": "is lowest"}


def with_finetuning_rate(inputs: TrainingInputs, plots: Path, kept: KeptActivations | None) -> TrainingInputs:
    """Return the inputs with the rate for the layers that are fine-tuned.

    Raises:
        TrainingError: The loss falls at no learning rate.
    """
    rate = find_learning_rate(TrialTrainer(inputs, kept), plots, lowest if kept else suggest)
    return replace(inputs, config=inputs.config.with_values({"optimizer.lr": rate}))


def find_learning_rate(
    trials: TrialTrainer, plots: Path, choose: Callable[[np.ndarray, np.ndarray], float | None]
) -> float:
    """Return the rate that `choose` finds in a sweep with rising rates (Smith, 2017, section 3.3).

    Args:
        trials: Trains the network of the sweep.
        plots: The folder of its figure and its table.
        choose: `suggest` or `lowest`.

    Raises:
        TrainingError: The loss falls at no learning rate.
    """
    sweep = LearningRateSweep(_LOWEST_RATE, _HIGHEST_RATE, _SWEEP_STEPS)
    steps = {"trainer.max_steps": _SWEEP_STEPS, "trainer.max_epochs": -1, "trainer.limit_val_batches": 0}
    fixed = {"data.progressive_sizes": None, "optimizer.lr": _LOWEST_RATE}
    trials.fit({**steps, **UNSCHEDULED, **fixed}, sweep)
    rates, losses = np.array(sweep.rates), np.array(sweep.losses)
    smooth = smoothed(losses)
    rate: float | None = broadcast(choose(rates, smooth) if is_rank_zero() else None)
    figure = plots / "learning_rate_finder.png"
    if is_rank_zero():
        plot_learning_rate_finder(rates, losses, smooth, rate, figure)
        rows = zip(rates, losses, smooth, strict=True)
        write_text(figure.with_suffix(".csv"), _table(["learning_rate", "loss", "smoothed_loss"], rows))
    if rate is None:
        raise TrainingError("the loss falls at no learning rate", f"look at {figure}, and give optimizer.lr")
    log.info("optimizer.lr: %.2g (found: the loss %s there; %s)", rate, _REASONS[choose.__name__], figure)
    return rate


def smoothed(losses: np.ndarray, width: float = 3.0) -> np.ndarray:
    """Return losses [S] averaged with Gaussian weights of `width` steps; unlike a running mean this has no lag.

    >>> smoothed(np.array([1.0, 1.0, 1.0])).round(6).tolist()
    [1.0, 1.0, 1.0]
    """
    steps = np.arange(len(losses))
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / width) ** 2)  # [S, S]
    return np.asarray(weights @ losses / weights.sum(axis=1))


def suggest(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """Return the rate where smoothed losses [S] fall fastest along log(rate); None where they never fall.

    Only rates below that of the smallest loss count.

    >>> suggest(np.array([0.001, 0.01, 0.1, 1.0]), np.array([2.0, 1.9, 1.0, 0.9]))
    0.01
    """
    bottom = int(losses.argmin())
    if bottom < 2:
        return None
    slopes = np.gradient(losses, np.log(rates))[: bottom + 1]
    return float(f"{rates[int(slopes.argmin())]:.2g}") if slopes.min() < 0 else None


def lowest(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """Return the rate of the smallest of smoothed losses [S]; None where they never fall.

    Pretrained weights learn at all rates below it, and their loss falls fastest at the first of them (decision 033).

    >>> lowest(np.array([0.001, 0.01, 0.1, 1.0]), np.array([2.0, 1.0, 0.9, 1.5]))
    0.1
    """
    at = int(losses.argmin())
    return float(f"{rates[at]:.2g}") if at else None


def _table(header: Sequence[str], rows: Iterable[Sequence[float]]) -> str:
    text = io.StringIO()
    numbers = ([f"{float(value):.6g}" for value in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows([header, *numbers])
    return text.getvalue()
