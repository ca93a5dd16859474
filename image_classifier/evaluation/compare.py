"""Comparison of two classifiers on the same images: paired bootstrap and McNemar's test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, logsumexp

from image_classifier.errors import DataError
from image_classifier.predictions import PredictionTable
from image_classifier.program import program

LEVEL = 0.95  # of every interval
METRICS = ("accuracy", "f1_macro", "log_loss")
LOWER_IS_BETTER = frozenset({"log_loss"})


@dataclass(frozen=True)
class SharedImages:
    """The N images that two tables have in common, with the classes of both.

    Args:
        paths: Paths of the images.
        classes: Classes of both tables, sorted.
        targets: True classes, int64 [N].
        predicted: Classes predicted by both, int64 [2, N].
        losses: Negative log-likelihood of the true class in nats, float64 [2, N].
        confidences: Probabilities of the predicted classes, float64 [2, N].
        num_unmatched: Number of images only in the first and only in the second table.
    """

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    targets: np.ndarray
    predicted: np.ndarray
    losses: np.ndarray
    confidences: np.ndarray
    num_unmatched: tuple[int, int]

    @property
    def right(self) -> np.ndarray:
        """Whether each prediction is right, bool [2, N]."""
        return np.asarray(self.predicted == self.targets)


@dataclass(frozen=True)
class PairedMetric:
    """One metric of both, and the difference (second minus first) with its 95 % interval."""

    metric: str
    values: tuple[float, float]
    difference: float
    interval: tuple[float, float]

    @property
    def gain(self) -> float:
        """The difference, positive if the second is better."""
        return -self.difference if self.metric in LOWER_IS_BETTER else self.difference

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "first": self.values[0],
            "second": self.values[1],
            "difference": self.difference,
            "interval": list(self.interval),
        }


@dataclass(frozen=True)
class Comparison:
    """The metrics of both by name, how many images only one of them has right, and McNemar's p-value of these."""

    shared: SharedImages
    paired: dict[str, PairedMetric]
    only_right: tuple[int, int]
    p_value: float
    resamples: int

    @property
    def better(self) -> int:
        """1 if the second is better, -1 if the first is, 0 if interval and test do not agree on either."""
        low, high = self.paired["accuracy"].interval
        if self.p_value >= 1 - LEVEL or low <= 0 <= high:
            return 0
        return 1 if low > 0 else -1


def compare(first: PredictionTable, second: PredictionTable, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compare both on the images that they have in common.

    Raises:
        DataError: There is no such image, or a label differs.
    """
    shared = shared_images(first, second)
    right = shared.right
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return Comparison(shared, paired_bootstrap(shared, resamples, seed), only, mcnemar(*only), resamples)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: the chance that fair coins divide so unequally.

    The arguments are the numbers of images that only the first and only the second has right.

    >>> round(mcnemar(2, 10), 4), mcnemar(0, 0)
    (0.0386, 1.0)
    """
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def shared_images(first: PredictionTable, second: PredictionTable) -> SharedImages:
    """Return the images that both tables hold, in the order of the first.

    Raises:
        DataError: There is no such image, or one has two labels.
    """
    row_of = [_row_of(table) for table in (first, second)]
    both = [path for path in first.paths if path in row_of[1]]
    if not both:
        hint = "compare predictions for the same split of the same data set"
        raise DataError("the two runs have no image in common", hint)
    # Rows of the shared images in each table, int64 [2, N], and their targets as numbers of the common classes.
    rows = np.array([[row_by_path[path] for path in both] for row_by_path in row_of], dtype=np.int64)
    classes = tuple(sorted({*first.classes, *second.classes}))
    codes = [np.array([classes.index(label) for label in table.classes], dtype=np.int64) for table in (first, second)]
    targets = np.stack(
        [code[table.targets[row]] for code, table, row in zip(codes, (first, second), rows, strict=True)]
    )
    _check_labels(both, targets, classes)
    columns = [_columns(table, row, code) for table, row, code in zip((first, second), rows, codes, strict=True)]
    predicted, losses, confidences = (np.stack(column) for column in zip(*columns, strict=True))
    num_unmatched = len(first.paths) - len(both), len(second.paths) - len(both)
    return SharedImages(tuple(both), classes, targets[0], predicted, losses, confidences, num_unmatched)


def _row_of(table: PredictionTable) -> dict[str, int]:
    """Return the row of each path; DataError if a path is there twice."""
    row_of = {path: row for row, path in enumerate(table.paths)}
    if len(row_of) < len(table.paths):
        twice = next(path for row, path in enumerate(table.paths) if row_of[path] != row)
        raise DataError(f"the predictions name {twice!r} more than once", "give each image one row")
    return row_of


def _check_labels(paths: list[str], targets: np.ndarray, classes: tuple[str, ...]) -> None:
    differ = np.flatnonzero(targets[0] != targets[1])
    if len(differ):
        first, second = (classes[code] for code in targets[:, differ[0]])
        example = f"{paths[differ[0]]!r} is {first!r} in one and {second!r} in the other"
        fact = f"the labels of {len(differ)} of {len(paths)} images differ: {example}"
        raise DataError(fact, f"use the same labels for both: run `{program()} test` again for one of them")


def _columns(table: PredictionTable, rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return prediction, loss and confidence of these rows, each [N].

    `codes` are the numbers of the table's classes among the common classes.
    """
    predicted, confidence = table.answers()
    losses = np.zeros(len(table.targets))
    for block, _ in table.blocks():
        logits = table.block(block)
        truth = logits[np.arange(len(logits)), table.targets[block]]
        # Sum in the order of the common classes, so that the rounding does not depend on the table's order.
        losses[block] = logsumexp(logits[:, np.argsort(codes)], axis=1) - truth
    return codes[predicted[rows]], losses[rows], confidence[rows]


def paired_bootstrap(shared: SharedImages, resamples: int, seed: int) -> dict[str, PairedMetric]:
    """Return accuracy, macro F1 and log loss of both, with percentile intervals of their differences.

    Each resample draws the same images for both.
    """
    num_images = len(shared.targets)
    generator = np.random.default_rng(seed)
    draws = (
        np.bincount(generator.integers(0, num_images, num_images), minlength=num_images).astype(np.float64)
        for _ in range(resamples)
    )
    # Scores of the resamples [R, 3, 2] and of all images [3, 2].
    drawn = np.stack([_scores(shared, weights) for weights in draws])
    scores = _scores(shared, np.ones(num_images))
    paired = {}
    for row, name in enumerate(METRICS):
        first, second = scores[row].tolist()
        low, high = np.quantile(drawn[:, row, 1] - drawn[:, row, 0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        paired[name] = PairedMetric(name, (first, second), second - first, (low, high))
    return paired


def _scores(shared: SharedImages, weights: np.ndarray) -> np.ndarray:
    """Return accuracy, macro F1 and log loss of both, float64 [3, 2], each image counted `weights` [N] times."""
    right = shared.right
    total = weights.sum()
    f1 = [
        _f1_macro(shared.targets, predicted, hits, weights, len(shared.classes))
        for predicted, hits in zip(shared.predicted, right, strict=True)
    ]
    return np.array([right @ weights / total, f1, shared.losses @ weights / total])


def _f1_macro(
    targets: np.ndarray, predicted: np.ndarray, hits: np.ndarray, weights: np.ndarray, num_classes: int
) -> float:
    """Return the macro F1 over the classes present or predicted, as in `metrics`; all inputs are [N]."""
    either = np.bincount(targets, weights, num_classes) + np.bincount(predicted, weights, num_classes)
    twice = 2 * np.bincount(targets[hits], weights[hits], num_classes)
    return float((twice[either > 0] / either[either > 0]).mean())
