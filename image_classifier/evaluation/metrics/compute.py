"""Metrics of a prediction table: everything is counted over the whole part, then divided once. docs/evaluation.md defines each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any

import numpy as np

from image_classifier.evaluation.counts import Counts
from image_classifier.evaluation.metrics.bootstrap import resample, share, spread
from image_classifier.evaluation.metrics.per_image import TOP, judge_images
from image_classifier.evaluation.metrics.ranking import rank_classes
from image_classifier.evaluation.metrics.sums import SCALARS, MetricSums
from image_classifier.predictions import PredictionTable

Interval = tuple[float, float]
Intervals = Mapping[str, Interval | None]

_RANGES = {"log_loss": (0.0, np.inf), "brier": (0.0, 2.0), "kappa": (-1.0, 1.0)}
_SHARES = {
    "accuracy": "accuracy",
    "recall_weighted": "accuracy",
    "top5_accuracy": "top5_accuracy",
}  # right answers among all images


@dataclass(frozen=True)
class ClassScore:
    """One class against all others, each score in 0..1; `support` counts its images. What cannot be divided is 0.

    `roc_auc` and `average_precision` are NaN where the part has no image of the class, or none of another; `intervals` has those of
    precision, recall and f1, None where there is nothing to divide by.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    roc_auc: float = nan
    average_precision: float = nan
    intervals: Intervals = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON: null for what is not defined."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class ClassificationMetrics:
    """How good the predictions of one part are.

    `log_loss` is in nats, `brier` the sum over classes of squared errors, 0..2; `confusion` counts images, int64 [C, C], rows truth, columns
    predicted; `absent` names the classes with no image in the part. Macro averages are over the classes seen or predicted,
    `balanced_accuracy` over the classes seen, `roc_auc` and `average_precision` over the classes that can be ranked. What is not defined is
    NaN: `top5_accuracy` of 5 classes or fewer, for one. `intervals` are 95 % intervals under the names of the scalars, none without
    resamples, None where all resamples are equal.
    """

    accuracy: float
    top5_accuracy: float
    balanced_accuracy: float
    precision_macro: float
    recall_macro: float
    f1_macro: float
    precision_weighted: float
    recall_weighted: float
    f1_weighted: float
    roc_auc: float
    average_precision: float
    log_loss: float
    brier: float
    ece: float
    kappa: float
    num_images: int
    per_class: tuple[ClassScore, ...]
    confusion: np.ndarray
    absent: tuple[str, ...]
    intervals: Intervals

    def scalars(self) -> dict[str, float]:
        """The single numbers under their stable names; those that are not defined are left out."""
        values = {name: getattr(self, name) for name in SCALARS}
        return {name: value for name, value in values.items() if isfinite(value)}

    def as_dict(self) -> dict[str, object]:
        """All of it, ready for JSON: null for what is not defined; `top5_accuracy` only where there are more than 5 classes."""
        names = [name for name in SCALARS if name != "top5_accuracy" or len(self.per_class) > TOP]
        return {
            **{name: _plain(getattr(self, name)) for name in names},
            "intervals": {name: _plain(self.intervals[name]) for name in names if name in self.intervals},
            "num_images": self.num_images,
            "absent": list(self.absent),
            "per_class": [score.as_dict() for score in self.per_class],
            "confusion": self.confusion.tolist(),
        }


def _plain(value: Any) -> Any:
    """The value as JSON has it: NaN as None, intervals as lists."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, float) and not isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value


def compute_metrics(table: PredictionTable, resamples: int = 1000, threads: int | None = None) -> ClassificationMetrics:
    """All metrics of one part with bootstrap 95 % intervals (0 resamples: none), the same for any number of threads.

    Raises:
        DataError: There is nothing to count, a logit is not a number, or a label is no class of the table.
    """
    images = judge_images(table, threads)
    part = MetricSums(table.targets, images, rank_classes(table, images, threads))
    sums = part.sums(np.ones(len(table.targets)))
    samples = resample(part.sums, len(table.targets), resamples, threads) if resamples else None
    scalars, counts = part.figures(sums), part.counts(sums)
    return ClassificationMetrics(
        **{name: float(value) for name, value in scalars.items()},
        num_images=len(table.targets),
        per_class=_class_scores(table.classes, part, counts, samples),
        confusion=_confusion(table.targets, images.predicted, len(table.classes)),
        absent=tuple(label for label, count in zip(table.classes, counts.support, strict=True) if count == 0),
        intervals={} if samples is None else _intervals(part, scalars, samples),
    )


def _intervals(part: MetricSums, scalars: Mapping[str, np.ndarray], samples: np.ndarray) -> Intervals:
    """The interval of each scalar, from the sums of resamples [R, S]."""
    found, total = {}, np.array(len(part.targets))
    for name, values in part.figures(samples).items():
        found[name] = spread(scalars[name], values, *_RANGES.get(name, (0.0, 1.0)))
        if name in _SHARES:
            found[name] = share(np.round(scalars[_SHARES[name]] * total), total, found[name])
    return {name: _interval(bounds) for name, bounds in found.items()}


def _class_scores(
    classes: tuple[str, ...], part: MetricSums, counts: Counts, samples: np.ndarray | None
) -> tuple[ClassScore, ...]:
    intervals = [{}] * len(classes) if samples is None else _class_intervals(counts, part.counts(samples))
    columns = (np.nan_to_num(values).tolist() for values in (counts.precision, counts.recall, counts.f1))
    ranked = (part.ranking.roc_auc.tolist(), part.ranking.average_precision.tolist())
    rows = zip(classes, *columns, counts.support.astype(int).tolist(), *ranked, intervals, strict=True)
    return tuple(ClassScore(*row) for row in rows)


def _class_intervals(counts: Counts, samples: Counts) -> list[Intervals]:
    """Those of precision, recall and F1 of each class, from the counts of resamples [R, C].

    F1 is 2 J / (1 + J) of the share J of hits among the images that are of the class or named so, hence its interval where they are few.
    """
    either = counts.support + counts.named - counts.hits
    precision = share(counts.hits, counts.named, spread(counts.precision, samples.precision))
    recall = share(counts.hits, counts.support, spread(counts.recall, samples.recall))
    f1 = spread(counts.f1, samples.f1)
    joint = share(counts.hits, either, f1 / (2 - f1))
    columns = {"precision": precision, "recall": recall, "f1": 2 * joint / (1 + joint)}
    return [{name: _interval(bounds[:, row]) for name, bounds in columns.items()} for row in range(len(either))]


def _interval(bounds: np.ndarray) -> Interval | None:
    low, high = bounds.tolist()
    return (low, high) if isfinite(low) else None


def _confusion(targets: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Images per (truth, predicted) pair, int64 [C, C], of class indices [N] and [N]."""
    pairs = targets.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)
