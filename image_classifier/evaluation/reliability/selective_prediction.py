"""Answers and abstentions: how the share of wrong ones falls with the share of images answered, and the threshold that keeps a stated risk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from image_classifier.predictions import PredictionTable
from image_classifier.sampling import evenly_spaced

_LEVELS = 64  # thresholds that are kept, at equal steps of the coverage
_DIGITS = 1e6


@dataclass(frozen=True)
class RiskLevel:
    """One threshold on the confidence: how many images of a part it answers, and how many of these answers are wrong."""

    threshold: float
    answered: int
    wrong: int


def risk_levels(table: PredictionTable) -> tuple[RiskLevel, ...]:
    """At most 64 thresholds on the confidence of a part, the strictest first; each answers more than the one before."""
    confidence, wrong = _confidence_and_errors(table)
    order = np.sort(confidence)[::-1]
    ranks = np.unique(np.ceil(len(order) * np.arange(1, _LEVELS + 1) / _LEVELS).astype(np.int64)) - 1
    thresholds = np.unique(np.floor(order[ranks] * _DIGITS) / _DIGITS)[::-1]
    return tuple(
        RiskLevel(float(limit), int((confidence >= limit).sum()), int(wrong[confidence >= limit].sum()))
        for limit in thresholds
    )


def choose_level(levels: Sequence[RiskLevel], risk: float, confidence: float) -> RiskLevel | None:
    """The level that answers most of those found to keep a risk; None where none is.

    With the probability `confidence` no more than the share `risk` of the answers given to new images of the same kind is wrong: selection with
    guaranteed risk (Geifman and El-Yaniv, 2017), a binary search whose every step is a binomial test at its share of 1 - confidence.
    """
    if risk >= 1:
        return levels[-1]
    doubt = (1 - confidence) / (math.floor(math.log2(len(levels))) + 1)
    low, high, best = 0, len(levels) - 1, None
    while low <= high:
        middle = (low + high) // 2
        if chance_of_fewer(levels[middle].wrong, levels[middle].answered, risk) <= doubt:
            low, best = middle + 1, levels[middle]
        else:
            high = middle - 1
    return best


def lowest_risk(levels: Sequence[RiskLevel], confidence: float) -> float:
    """The lowest risk that `choose_level` keeps, rounded up to thousandths; 1 where there is none below."""
    promised = (step / 1000 for step in range(1, 1000))
    return next((risk for risk in promised if choose_level(levels, risk, confidence)), 1.0)


def chance_of_fewer(wrong: int, answered: int, risk: float) -> float:
    """The probability of at most `wrong` errors in `answered` answers each of which is wrong with probability `risk`, 0 < risk < 1.

    As `scipy.special.bdtr`, which inference does without: it would double the time to the first answer.
    """
    counts = np.arange(wrong + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((answered - counts[1:] + 1) / counts[1:]))])
    logs = ways + counts * math.log(risk) + (answered - counts) * math.log1p(-risk)
    return float(min(1.0, np.exp(logs - logs.max()).sum() * math.exp(logs.max())))


@dataclass(frozen=True)
class RiskCurve:
    """The share of wrong answers, float64 [K], when the most confident share `coverage` [K] of a part is answered.

    `area` is its mean over all coverages (AURC), `best_area` that of the same answers with every wrong one last.
    """

    coverage: np.ndarray
    risk: np.ndarray
    area: float
    best_area: float


def risk_curve(table: PredictionTable, num_points: int = 500) -> RiskCurve:
    """The curve of one part; equal confidences are answered together, in the mean over their orders."""
    confidence, wrong = _confidence_and_errors(table)
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    shares = np.bincount(group, weights=wrong) / sizes
    expected, count = np.repeat(shares, sizes), np.arange(1, len(wrong) + 1)
    risk, best = expected.cumsum() / count, np.sort(wrong).cumsum() / count
    shown = evenly_spaced(len(wrong), num_points)
    return RiskCurve(count[shown] / len(wrong), risk[shown], float(risk.mean()), float(best.mean()))


def _confidence_and_errors(table: PredictionTable) -> tuple[np.ndarray, np.ndarray]:
    predicted, confidence = table.answers()
    return confidence, predicted != table.targets
