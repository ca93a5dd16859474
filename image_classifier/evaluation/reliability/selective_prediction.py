"""Selective prediction: the share of wrong labels by share of images that get one, and thresholds for a stated risk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from image_classifier.predictions import PredictionTable
from image_classifier.sampling import evenly_spaced

_MAX_LEVELS = 64  # thresholds at equal steps of the coverage
_DIGITS = 1e6  # thresholds are rounded down to six digits


@dataclass(frozen=True)
class RiskLevel:
    """One threshold on the confidence: the number of images that get a label, and how many of the labels are wrong."""

    threshold: float
    answered: int
    wrong: int


def risk_levels(table: PredictionTable) -> tuple[RiskLevel, ...]:
    """Return at most 64 thresholds, strictest first; each gives more images a label than the one before."""
    confidence, wrong = _confidence_and_errors(table)
    order = np.sort(confidence)[::-1]
    # The confidence at each step of the coverage, rounded down so that equal thresholds merge.
    ranks = np.unique(np.ceil(len(order) * np.arange(1, _MAX_LEVELS + 1) / _MAX_LEVELS).astype(np.int64)) - 1
    thresholds = np.unique(np.floor(order[ranks] * _DIGITS) / _DIGITS)[::-1]
    return tuple(
        RiskLevel(float(limit), int((confidence >= limit).sum()), int(wrong[confidence >= limit].sum()))
        for limit in thresholds
    )


def choose_level(levels: Sequence[RiskLevel], risk: float, confidence: float) -> RiskLevel | None:
    """Return the level that keeps a risk and gives most images a label; None if there is none.

    With probability `confidence`, at most the share `risk` of the labels of new images of the same kind is wrong. This
    is selection with guaranteed risk (Geifman and El-Yaniv, 2017): a binary search in which every step is a binomial
    test at its share of 1 - confidence.
    """
    if risk >= 1:
        return levels[-1]
    # Divide the allowed error probability among all steps of the search.
    doubt = (1 - confidence) / (math.floor(math.log2(len(levels))) + 1)
    low = 0
    high = len(levels) - 1
    best = None
    while low <= high:
        middle = (low + high) // 2
        if chance_of_fewer(levels[middle].wrong, levels[middle].answered, risk) <= doubt:
            # The risk is kept: try to give more images a label.
            low = middle + 1
            best = levels[middle]
        else:
            high = middle - 1
    return best


def lowest_risk(levels: Sequence[RiskLevel], confidence: float) -> float:
    """Return the lowest risk that `choose_level` can keep, rounded up to thousandths; 1 if there is none below."""
    promised = (step / 1000 for step in range(1, 1000))
    return next((risk for risk in promised if choose_level(levels, risk, confidence)), 1.0)


def chance_of_fewer(wrong: int, answered: int, risk: float) -> float:
    """Return the probability of at most `wrong` errors in `answered` labels, each wrong with probability `risk`.

    0 < risk < 1. The same as `scipy.special.bdtr`; inference does not import scipy, which would double its start-up.

    >>> round(chance_of_fewer(wrong=1, answered=10, risk=0.1), 4)
    0.7361
    """
    counts = np.arange(wrong + 1)
    # Logarithms of the binomial coefficients, then of each term; the largest is factored out.
    ways = np.concatenate([[0.0], np.cumsum(np.log((answered - counts[1:] + 1) / counts[1:]))])
    logs = ways + counts * math.log(risk) + (answered - counts) * math.log1p(-risk)
    return float(min(1.0, np.exp(logs - logs.max()).sum() * math.exp(logs.max())))


@dataclass(frozen=True)
class RiskCurve:
    """The share of wrong labels, float64 [K], when the most confident share `coverage` [K] of a split gets a label.

    `area` is the mean risk over all coverages (AURC), `best_area` the mean if every wrong prediction came last.
    """

    coverage: np.ndarray
    risk: np.ndarray
    area: float
    best_area: float


def risk_curve(table: PredictionTable, num_points: int = 500) -> RiskCurve:
    """Return the curve of one split; images with equal confidence count in the mean over their orders."""
    confidence, wrong = _confidence_and_errors(table)
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    # Share of wrong ones in each group of equal confidence, repeated for its images.
    shares = np.bincount(group, weights=wrong) / sizes
    expected = np.repeat(shares, sizes)
    count = np.arange(1, len(wrong) + 1)
    risk = expected.cumsum() / count
    best = np.sort(wrong).cumsum() / count
    shown = evenly_spaced(len(wrong), num_points)
    return RiskCurve(count[shown] / len(wrong), risk[shown], float(risk.mean()), float(best.mean()))


def _confidence_and_errors(table: PredictionTable) -> tuple[np.ndarray, np.ndarray]:
    predicted, confidence = table.answers()
    return confidence, predicted != table.targets
