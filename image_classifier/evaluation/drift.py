"""Whether the images that a model is asked about are still like those that it was validated on: two figures of its answers, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from image_classifier.evaluation.reliability.abstention import Decision

FEWEST = 50  # images, below which nothing is said
_DOUBT = 0.001  # the chance of a false alarm where nothing has changed, for one look at one figure
_LEAST = 0.1  # a smaller distance is no reason to wake somebody, however many images prove it


@dataclass(frozen=True)
class Shift:
    """One figure of the traffic beside the same of val.

    `distance` is that of Kolmogorov and Smirnov, from 0 (alike) to 1; above `limit` it is more than chance and more than a trifle.
    """

    figure: str
    images: int
    distance: float
    limit: float
    median: float
    val_median: float

    @property
    def drifted(self) -> bool:
        """Whether this is another kind of traffic; never with fewer than 50 images."""
        return self.images >= FEWEST and self.distance > self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**vars(self), "drifted": self.drifted}


@dataclass(frozen=True)
class DriftReference:
    """What val was like: of `num_images` the confidences, and the out-of-distribution scores: how far an embedding lies from the training's.

    Each as values in rising order and the share of val that is at or below each.
    """

    num_images: int
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, decision: Mapping[str, Any] | None) -> DriftReference | None:
        """What a bundle's `decision` tells of val; None where it tells nothing."""
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
        """One Shift for each figure that both know, `seen` being the traffic's."""
        return [
            self._shift(name, np.asarray(values))
            for name, values in seen.items()
            if name in self.figures and len(values)
        ]

    def _shift(self, name: str, values: np.ndarray) -> Shift:
        points, shares = self.figures[name]
        ordered = np.sort(values)
        # Confidences are known by how many lie below a threshold, scores by how many lie at or below a value.
        found = np.searchsorted(ordered, points, side="left" if name == "confidence" else "right") / len(ordered)
        distance = float(np.abs(found - shares).max())
        chance = math.sqrt(
            -math.log(_DOUBT / 2) / 2 * (len(ordered) + self.num_images) / (len(ordered) * self.num_images)
        )
        middle = float(points[min(int(np.searchsorted(shares, 0.5)), len(points) - 1)])
        return Shift(name, len(ordered), distance, max(_LEAST, chance), float(np.median(ordered)), middle)
