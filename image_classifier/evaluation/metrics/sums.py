"""The sums over images that all metrics are made of: of a split, and by the same code of a resample of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from image_classifier.evaluation.metrics.per_image import TOP, PerImage
from image_classifier.evaluation.metrics.ranking import Ranking
from image_classifier.evaluation.reliability.calibration import NUM_BINS, bins_of

SCALARS = (
    *("accuracy", "top5_accuracy", "balanced_accuracy"),
    *("precision_macro", "recall_macro", "f1_macro", "precision_weighted", "recall_weighted", "f1_weighted"),
    *("roc_auc", "average_precision", "log_loss", "brier", "ece", "kappa"),
)


@dataclass(frozen=True)
class Counts:
    """Three counts for each class, of one split or of many resamples of it at once.

    Args:
        hits: Images of the class that are predicted right, float64 [..., C].
        support: Images of the class, float64 [..., C].
        predicted: Images that are predicted as the class, float64 [..., C].
    """

    hits: np.ndarray
    support: np.ndarray
    predicted: np.ndarray

    @property
    def precision(self) -> np.ndarray:
        """Share of right ones among the images predicted as the class, [..., C]; NaN where there are none."""
        return _ratio(self.hits, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """Share of right ones among the images of the class, [..., C]; NaN where there are none."""
        return _ratio(self.hits, self.support)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, [..., C]; NaN where the class is neither present nor predicted."""
        return _ratio(2 * self.hits, self.support + self.predicted)

    def scalars(self) -> dict[str, np.ndarray]:
        """Return the averages over classes, each [...], equal to scikit-learn's with zero_division=0.

        Macro averages are over the classes that are present or predicted, `balanced_accuracy` over those that are
        present, weighted averages by support. `kappa` is NaN where chance alone agrees on every image: one class is
        present, and it is the only one predicted.

        >>> counts = Counts(hits=np.array([2.0, 1.0]), support=np.array([2.0, 2.0]), predicted=np.array([3.0, 1.0]))
        >>> {name: round(float(value), 3) for name, value in counts.scalars().items() if "_" not in name}
        {'accuracy': 0.75, 'kappa': 0.5}
        """
        each = {name: np.nan_to_num(getattr(self, name)) for name in ("precision", "recall", "f1")}
        present = self.support > 0
        present_or_predicted = self.support + self.predicted > 0
        total = self.support.sum(axis=-1)
        accuracy = self.hits.sum(axis=-1) / total
        chance = (self.support * self.predicted).sum(axis=-1) / total**2
        return {
            "accuracy": accuracy,
            "balanced_accuracy": _mean(each["recall"], present),
            **{f"{name}_macro": _mean(values, present_or_predicted) for name, values in each.items()},
            **{f"{name}_weighted": _mean(values, self.support) for name, values in each.items()},
            "kappa": _ratio(accuracy - chance, 1 - chance),
        }


@dataclass(frozen=True)
class MetricSums:
    """N evaluated images of C classes: true classes `targets` int64 [N], predictions and ranking of the classes."""

    targets: np.ndarray
    images: PerImage
    ranking: Ranking

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """Return all sums [S], with image i counted weights[i] times, float64 [N].

        The order is: hits, support and predicted by class [C each], calibration gaps by bin, other values.
        """
        # Right and wrong images of each class in one count.
        wrong, hits = np.bincount(self._outcomes, weights, minlength=2 * self.num_classes).reshape(-1, 2).T
        predicted = np.bincount(self.images.predicted, weights, minlength=self.num_classes)
        gaps = np.bincount(self._bins, weights * self._gaps, minlength=NUM_BINS)
        # Without BLAS, whose rounding depends on its threads.
        values = np.einsum("vn,n->v", self._values, weights)
        return np.concatenate([hits, wrong + hits, predicted, gaps, values])

    def counts(self, sums: np.ndarray) -> Counts:
        """Return the counts by class of sums [..., S]."""
        return Counts(*np.split(sums[..., : 3 * self.num_classes], 3, axis=-1))

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the metrics of sums [..., S] in the order of `SCALARS`, each [...]; NaN where one is not defined."""
        averages = self.counts(sums).scalars()
        total = sums[..., self.num_classes : 2 * self.num_classes].sum(axis=-1)
        gaps, values = np.split(sums[..., 3 * self.num_classes :], [NUM_BINS], axis=-1)
        in_top, log_loss, brier, roc_auc, average_precision = np.moveaxis(values, -1, 0)
        figures = {
            **averages,
            "top5_accuracy": in_top / total if self.num_classes > TOP else np.full_like(total, np.nan),
            "roc_auc": _macro(self.ranking.roc_auc) + roc_auc,
            "average_precision": _macro(self.ranking.average_precision) + average_precision,
            "log_loss": log_loss / total,
            "brier": brier / total,
            "ece": np.abs(gaps).sum(axis=-1) / total,
        }
        return {name: figures[name] for name in SCALARS}

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.ranking.roc_auc)

    @cached_property
    def _values(self) -> np.ndarray:
        """Values that are only added up, float64 [5, N]; for the two ranking metrics the influence of each image."""
        return np.stack([self.images.in_top, self.images.log_loss, self.images.brier, *self.ranking.influence])

    @cached_property
    def _outcomes(self) -> np.ndarray:
        """Twice the true class, plus one where the prediction is right, int64 [N]."""
        return np.asarray(2 * self.targets.astype(np.int64) + (self.images.correct > 0))

    @cached_property
    def _gaps(self) -> np.ndarray:
        """The contribution of each image to the gap between accuracy and confidence, float64 [N]."""
        return np.asarray(self.images.correct - self.images.confidence)

    @cached_property
    def _bins(self) -> np.ndarray:
        """The bin of each confidence, int64 [N]."""
        return bins_of(self.images.confidence)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient, NaN where the denominator is 0."""
    undefined = np.full(np.shape(denominator), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=undefined, where=np.asarray(denominator > 0)))


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean over classes [...], weighted by [..., C] of which at least one is not 0."""
    return np.asarray((values * weights).sum(axis=-1) / weights.sum(axis=-1))


def _macro(values: np.ndarray) -> float:
    """Return the mean of the finite values of [C]; NaN where there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan
