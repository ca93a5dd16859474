"""How far the answers can be trusted, from the predictions alone: reliability, and the risk that is left when the least sure are refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from image_classifier.predictions import PredictionTable, softmax

_NUM_BINS = 15
_COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


@dataclass(frozen=True)
class Reliability:
    """Of each bin of confidence that holds an image: mean confidence, accuracy and images; and the expected calibration error."""

    bins: tuple[tuple[float, float, int], ...]
    error: float


def reliability(confidence: np.ndarray, right: np.ndarray) -> Reliability:
    """Over 15 equal bins, each open on the left (Guo et al., 2017); inputs [N]."""
    places = np.clip(np.ceil(confidence * _NUM_BINS).astype(int) - 1, 0, _NUM_BINS - 1)
    counts = np.bincount(places, minlength=_NUM_BINS)
    sure, hits = (np.bincount(places, weights=values, minlength=_NUM_BINS) for values in (confidence, right))
    met = np.flatnonzero(counts)
    bins = tuple((float(sure[place] / counts[place]), float(hits[place] / counts[place]), int(counts[place])) for place in met)
    return Reliability(bins, float(np.abs(hits - sure).sum() / len(confidence)))


def calibrated(table: PredictionTable, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and whether it is right, [N] each, with probabilities at this temperature."""
    probabilities = softmax(table.logits / temperature)
    top = probabilities.argmax(axis=1)
    return probabilities[np.arange(len(top)), top], top == table.targets


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> list[tuple[float, float]]:
    """(share of the images that is answered, share of wrong answers among them), the surest first; equal confidences come together."""
    order = np.argsort(-confidence, kind="stable")
    last = np.flatnonzero(np.diff(confidence[order], append=-1.0))
    answered = last + 1
    wrong = np.cumsum(~right[order])[last]
    return list(zip((answered / len(order)).tolist(), (wrong / answered).tolist(), strict=True))


def risks(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The risk at a few round coverages: the smallest that reaches each."""
    return [(wanted, next(risk for coverage, risk in curve if coverage >= wanted - 1e-12)) for wanted in _COVERAGES]
