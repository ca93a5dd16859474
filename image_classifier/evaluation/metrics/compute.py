"""Metrics of a prediction table, counted over all images and divided once. docs/evaluation.md defines each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any

import numpy as np

from image_classifier.evaluation.metrics.bootstrap import percentile_interval, proportion_interval, resample
from image_classifier.evaluation.metrics.per_image import TOP, evaluate_images
from image_classifier.evaluation.metrics.ranking import rank_classes
from image_classifier.evaluation.metrics.sums import SCALARS, Counts, MetricSums
from image_classifier.predictions import PredictionTable

Interval = tuple[float, float]
Intervals = Mapping[str, Interval | None]

_RANGES = {"log_loss": (0.0, np.inf), "brier": (0.0, 2.0), "kappa": (-1.0, 1.0)}
# Metrics that are a share of right predictions among all images, and the metric that gives their number.
_SHARES = {"accuracy": "accuracy", "recall_weighted": "accuracy", "top5_accuracy": "top5_accuracy"}


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class against all others, each 0..1, and 0 where the divisor is 0; `support` counts its images.

    `roc_auc` and `average_precision` are NaN where the split has no image of the class, or none of another class.
    `intervals` holds those of precision, recall and f1, None where the divisor is 0.
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
        """Return all fields for JSON, null where a value is not defined."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class ClassificationMetrics:
    """The metrics of the predictions for one split.

    `log_loss` is in nats, `brier` the sum over classes of squared errors, 0..2. `confusion` counts images, int64
    [C, C], rows true, columns predicted. `absent` names the classes without images in the split.

    Macro averages are over the classes present or predicted, `balanced_accuracy` over the classes present, `roc_auc`
    and `average_precision` over the classes that can be ranked. A metric that is not defined is NaN, such as
    `top5_accuracy` with 5 classes or fewer. `intervals` are 95 % intervals by name of the metric: empty without
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
        """Return the metrics that are defined, by name."""
        values = {name: getattr(self, name) for name in SCALARS}
        return {name: value for name, value in values.items() if isfinite(value)}

    def as_dict(self) -> dict[str, object]:
        """Return all fields for JSON, null where a metric is not defined; `top5_accuracy` only above 5 classes."""
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
    """Return the value for JSON: NaN as None, intervals as lists."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, float) and not isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value


def compute_metrics(table: PredictionTable, resamples: int = 1000, threads: int | None = None) -> ClassificationMetrics:
    """Compute all metrics of one split with bootstrap 95 % intervals; the number of threads changes nothing.

    With 0 resamples there are no intervals.

    Raises:
        DataError: There is no row, a logit is not a finite number, or a label is not a class of the table.
    """
    images = evaluate_images(table, threads)
    split = MetricSums(table.targets, images, rank_classes(table, images, threads))
    # The sums of the split itself, then of its resamples.
    sums = split.sums(np.ones(len(table.targets)))
    samples = resample(split.sums, len(table.targets), resamples, threads) if resamples else None
    scalars = split.figures(sums)
    counts = split.counts(sums)
    return ClassificationMetrics(
        **{name: float(value) for name, value in scalars.items()},
        num_images=len(table.targets),
        per_class=_class_scores(table.classes, split, counts, samples),
        confusion=_confusion(table.targets, images.predicted, len(table.classes)),
        absent=tuple(label for label, count in zip(table.classes, counts.support, strict=True) if count == 0),
        intervals={} if samples is None else _intervals(split, scalars, samples),
    )


def _intervals(split: MetricSums, scalars: Mapping[str, np.ndarray], samples: np.ndarray) -> Intervals:
    """Return the interval of each metric, from the sums of resamples [R, S]."""
    intervals = {}
    total = np.array(len(split.targets))
    for name, values in split.figures(samples).items():
        bounds = percentile_interval(scalars[name], values, *_RANGES.get(name, (0.0, 1.0)))
        if name in _SHARES:
            bounds = proportion_interval(np.round(scalars[_SHARES[name]] * total), total, bounds)
        intervals[name] = _interval(bounds)
    return intervals


def _class_scores(
    classes: tuple[str, ...], split: MetricSums, counts: Counts, samples: np.ndarray | None
) -> tuple[ClassScore, ...]:
    intervals = [{}] * len(classes) if samples is None else _class_intervals(counts, split.counts(samples))
    columns = (np.nan_to_num(values).tolist() for values in (counts.precision, counts.recall, counts.f1))
    ranked = (split.ranking.roc_auc.tolist(), split.ranking.average_precision.tolist())
    rows = zip(classes, *columns, counts.support.astype(int).tolist(), *ranked, intervals, strict=True)
    return tuple(ClassScore(*row) for row in rows)


def _class_intervals(counts: Counts, samples: Counts) -> list[Intervals]:
    """Return the intervals of precision, recall and F1 of each class, from the counts of resamples [R, C].

    With J the share of hits among the images that are of the class or predicted as it, F1 is 2 J / (1 + J). This gives
    F1 an interval where the images are few.
    """
    either = counts.support + counts.predicted - counts.hits
    precision = percentile_interval(counts.precision, samples.precision)
    precision = proportion_interval(counts.hits, counts.predicted, precision)
    recall = percentile_interval(counts.recall, samples.recall)
    recall = proportion_interval(counts.hits, counts.support, recall)
    f1 = percentile_interval(counts.f1, samples.f1)
    joint = proportion_interval(counts.hits, either, f1 / (2 - f1))
    columns = {"precision": precision, "recall": recall, "f1": 2 * joint / (1 + joint)}
    return [{name: _interval(bounds[:, row]) for name, bounds in columns.items()} for row in range(len(either))]


def _interval(bounds: np.ndarray) -> Interval | None:
    low, high = bounds.tolist()
    return (low, high) if isfinite(low) else None


def _confusion(targets: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the number of images for each (true, predicted) pair, int64 [C, C], from class numbers [N] and [N]."""
    pairs = targets.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)
