"""What more photographs would bring: accuracy of a logistic regression by number of training images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from image_classifier.text import listed

_SHARES = (0.25, 0.5, 1.0)
_REPEATS = 4  # random subsets of each smaller share
_MAX_IMAGES = 4000  # of a fit, so that the curve takes seconds
_MAX_ITER = 100
_NEEDY = 3  # classes that are named


@dataclass(frozen=True)
class LearningCurve:
    """Accuracy on val by number of training images, and the recall of each class with half and with all of them.

    Attributes:
        points: Number of training images and mean accuracy.
        gain: Expected gain of accuracy from twice the images: that of the last doubling.
        error: Its standard error over random subsets and val images.
        recalls: Of each class with half and with all training images, float [2, K]; NaN without val images.
    """

    points: tuple[tuple[int, float], ...]
    gain: float
    error: float
    recalls: np.ndarray

    def as_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "points": [list(point) for point in self.points],
            "gain": self.gain,
            "error": self.error,
            "needy": self.needy(classes),
        }

    def needy(self, classes: Sequence[str]) -> list[str]:
        """Return the classes that most need photographs: lowest recall first, those that still gain before others."""
        half, whole = self.recalls
        missing = np.nan_to_num((1 - whole) + np.maximum(0, whole - half))
        order = np.argsort(-missing, kind="stable")[:_NEEDY]
        return [classes[code] for code in order.tolist() if missing[code] > 0.1]

    def sentence(self, classes: Sequence[str]) -> str:
        """Return what more images would bring, in words."""
        text = f"twice the images: {100 * self.gain:+.1f} ± {100 * self.error:.1f} points of val accuracy expected"
        names = self.needy(classes)
        return f"{text}; most in need of photographs: {listed(names)}" if names else text


def learning_curve(
    features: np.ndarray,
    targets: np.ndarray,
    val_features: np.ndarray,
    val_targets: np.ndarray,
    strength: float,
    seed: int,
) -> LearningCurve:
    """Fit to random shares of the training images and extrapolate the last doubling.

    Args:
        features: Training embeddings float32 [N, D]; at most 4000 evenly drawn ones are used.
        targets: Their classes, int64 [N].
        val_features: Float32 [M, D].
        val_targets: Int64 [M].
        strength: C of the regression.
        seed: Decides the subsets.
    """
    generator = np.random.default_rng(seed)
    if len(features) > _MAX_IMAGES:
        rows = generator.permutation(len(features))[:_MAX_IMAGES]
        features, targets = features[rows], targets[rows]
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    features, val_features = (features - mean) / std, (val_features - mean) / std
    num_classes = int(max(targets.max(), val_targets.max())) + 1
    points, hits = [], {}
    for share in _SHARES:
        count = max(2, round(share * len(features)))
        subsets = [_subset(targets, count, generator) for _ in range(1 if share == 1 else _REPEATS)]
        right = [_right(features[rows], targets[rows], val_features, val_targets, strength) for rows in subsets]
        hits[share] = np.array(right)  # [repeats, M]
        # More than `count` where there are many classes: each has an image in every subset.
        points.append((round(float(np.mean([len(rows) for rows in subsets]))), float(hits[share].mean())))
    gains = hits[1.0][0].astype(float) - hits[0.5]  # [repeats, M]
    # Which images are in the half, and which are in val, are both a matter of luck.
    error = np.hypot(
        gains.mean(axis=1).std(ddof=1) / np.sqrt(len(gains)), gains.mean(axis=0).std() / np.sqrt(len(val_targets))
    )
    recalls = np.full((2, num_classes), np.nan)
    for code in np.unique(val_targets).tolist():
        of_class = val_targets == code
        recalls[:, code] = hits[0.5][:, of_class].mean(), hits[1.0][:, of_class].mean()
    return LearningCurve(tuple(points), float(gains.mean()), float(error), recalls)


def _subset(targets: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return rows of a random subset that has each class at least once."""
    order = generator.permutation(len(targets))
    firsts = np.unique(targets[order], return_index=True)[1]
    return np.asarray(order[np.unique(np.concatenate([firsts, np.arange(len(order))[:count]]))])


def _right(
    features: np.ndarray, targets: np.ndarray, val_features: np.ndarray, val_targets: np.ndarray, strength: float
) -> np.ndarray:
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # many classes of few images are fine
        fitted = LogisticRegression(C=strength, max_iter=_MAX_ITER).fit(features, targets)
    return np.asarray(fitted.predict(val_features) == val_targets)
