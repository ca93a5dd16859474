"""The sums over a part's images that all its figures are made of: the part's own, and those of a resample of it, by the same code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from image_classifier.evaluation.counts import Counts
from image_classifier.evaluation.metrics.per_image import TOP, PerImage
from image_classifier.evaluation.metrics.ranking import Ranking
from image_classifier.evaluation.reliability.calibration import NUM_BINS, bins_of

SCALARS = (
    *("accuracy", "top5_accuracy", "balanced_accuracy"),
    *("precision_macro", "recall_macro", "f1_macro", "precision_weighted", "recall_weighted", "f1_weighted"),
    *("roc_auc", "average_precision", "log_loss", "brier", "ece", "kappa"),
)


@dataclass(frozen=True)
class MetricSums:
    """N judged images of C classes: true classes `targets` int64 [N], the answers and how the classes rank."""

    targets: np.ndarray
    images: PerImage
    ranking: Ranking

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """All sums [S] with image i counted weights[i] times, float64 [N]: hits, support and named by class, gaps by bin, other values."""
        wrong, hits = np.bincount(self._outcomes, weights, minlength=2 * self.num_classes).reshape(-1, 2).T
        named = np.bincount(self.images.predicted, weights, minlength=self.num_classes)
        gaps = np.bincount(self._bins, weights * self._gaps, minlength=NUM_BINS)
        values = np.einsum("vn,n->v", self._values, weights)  # no BLAS: its rounding depends on its threads
        return np.concatenate([hits, wrong + hits, named, gaps, values])

    def counts(self, sums: np.ndarray) -> Counts:
        """The counts by class of sums [..., S]."""
        return Counts(*np.split(sums[..., : 3 * self.num_classes], 3, axis=-1))

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """The single numbers of sums [..., S] under their stable names in their order, each [...]; NaN where one is not defined."""
        averages = self.counts(sums).scalars()
        total = sums[..., self.num_classes : 2 * self.num_classes].sum(axis=-1)
        gaps, values = np.split(sums[..., 3 * self.num_classes :], [NUM_BINS], axis=-1)
        in_top, log_loss, brier, roc_auc, average_precision = np.moveaxis(values, -1, 0)
        found = {
            **averages,
            "top5_accuracy": in_top / total if self.num_classes > TOP else np.full_like(total, np.nan),
            "roc_auc": _macro(self.ranking.roc_auc) + roc_auc,
            "average_precision": _macro(self.ranking.average_precision) + average_precision,
            "log_loss": log_loss / total,
            "brier": brier / total,
            "ece": np.abs(gaps).sum(axis=-1) / total,
        }
        return {name: found[name] for name in SCALARS}

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.ranking.roc_auc)

    @cached_property
    def _values(self) -> np.ndarray:
        """What is only added up, float64 [5, N]; of the two ranked figures, what a resample changes in them."""
        return np.stack([self.images.in_top, self.images.log_loss, self.images.brier, *self.ranking.influence])

    @cached_property
    def _outcomes(self) -> np.ndarray:
        """Twice the true class, and one more where the answer is right, int64 [N]."""
        return np.asarray(2 * self.targets.astype(np.int64) + (self.images.correct > 0))

    @cached_property
    def _gaps(self) -> np.ndarray:
        """What each image adds to the gap between accuracy and confidence, float64 [N]."""
        return np.asarray(self.images.correct - self.images.confidence)

    @cached_property
    def _bins(self) -> np.ndarray:
        """The bin of each confidence, int64 [N]."""
        return bins_of(self.images.confidence)


def _macro(values: np.ndarray) -> float:
    """Mean of the values [C] that are numbers; NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan
