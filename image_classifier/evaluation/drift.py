"""Drift: whether recent images are still like the validation images, by two figures of the predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from image_classifier.evaluation.reliability.abstention import Decision

FEWEST = 50  # images below which there is no alarm
_FALSE_ALARM = 0.001  # probability of an alarm without drift, for one check of one figure
_MIN_DISTANCE = 0.1  # smaller distances are no reason for an alarm, however many images prove them


@dataclass(frozen=True)
class Shift:
    """One figure of recent images compared with the validation images.

    `distance` is the Kolmogorov-Smirnov distance, from 0 (equal) to 1. Above `limit` it is neither chance nor
    negligible.
    """

    figure: str
    images: int
    distance: float
    limit: float
    median: float
    val_median: float

    @property
    def drifted(self) -> bool:
        """Whether the images have drifted; never with fewer than 50 images."""
        return self.images >= FEWEST and self.distance > self.limit

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**vars(self), "drifted": self.drifted}


@dataclass(frozen=True)
class DriftReference:
    """The distributions of confidences and out-of-distribution scores on the `num_images` validation images.

    Each is given by values in rising order and the share of the images at or below each value.
    """

    num_images: int
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, decision: Mapping[str, Any] | None) -> DriftReference | None:
        """Read the distributions from the `decision` of a bundle; None if it has none."""
        if not decision:
            return None
        evidence = Decision.from_dict(decision).evidence
        if not evidence.num_images or not evidence.levels:
            return None
        limits = np.array([level.threshold for level in evidence.levels])[::-1]
        below = 1 - np.array([level.answered for level in evidence.levels])[::-1] / evidence.num_images
        figures = {"confidence": (limits, below)}
        if evidence.ood_scores:
            scores = np.array(evidence.ood_scores)
            figures["ood_score"] = (scores, np.arange(1, len(scores) + 1) / len(scores))
        return cls(evidence.num_images, figures)

    def shifts(self, seen: Mapping[str, Sequence[float]]) -> list[Shift]:
        """Return the shift of each figure that both have; `seen` are the values of recent images."""
        return [
            self._shift(name, np.asarray(values))
            for name, values in seen.items()
            if name in self.figures and len(values)
        ]

    def _shift(self, name: str, values: np.ndarray) -> Shift:
        points, shares = self.figures[name]
        ordered = np.sort(values)
        # Confidences are stored as shares below a threshold, scores as shares at or below a value.
        seen = np.searchsorted(ordered, points, side="left" if name == "confidence" else "right") / len(ordered)
        distance = float(np.abs(seen - shares).max())
        # Critical distance of the two-sample Kolmogorov-Smirnov test.
        chance = math.sqrt(
            -math.log(_FALSE_ALARM / 2) / 2 * (len(ordered) + self.num_images) / (len(ordered) * self.num_images)
        )
        middle = float(points[min(int(np.searchsorted(shares, 0.5)), len(points) - 1)])
        return Shift(name, len(ordered), distance, max(_MIN_DISTANCE, chance), float(np.median(ordered)), middle)
