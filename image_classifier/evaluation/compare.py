"""Two classifiers on the same images: is one really better, or was it luck? Paired bootstrap and McNemar's test."""

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
class Shared:
    """What two tables say of the images that both judged, N of them, over the classes of either.

    Args:
        paths: The images.
        classes: Of both, sorted.
        targets: True classes, int64 [N].
        predicted: The two answers, int64 [2, N].
        losses: Negative log-likelihood of the true class in nats, float64 [2, N].
        confidences: Probability of the two answers, float64 [2, N].
        left: Images that only the first and only the second judged.
    """

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    targets: np.ndarray
    predicted: np.ndarray
    losses: np.ndarray
    confidences: np.ndarray
    left: tuple[int, int]

    @property
    def right(self) -> np.ndarray:
        """Which answers are right, bool [2, N]."""
        return np.asarray(self.predicted == self.targets)


@dataclass(frozen=True)
class Paired:
    """One metric of both, and the second's minus the first's with the interval that holds it in 95 of 100 draws of such images."""

    metric: str
    values: tuple[float, float]
    difference: float
    interval: tuple[float, float]

    @property
    def gain(self) -> float:
        """The difference, positive where the second is better."""
        return -self.difference if self.metric in LOWER_IS_BETTER else self.difference

    def as_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return {
            "first": self.values[0],
            "second": self.values[1],
            "difference": self.difference,
            "interval": list(self.interval),
        }


@dataclass(frozen=True)
class Comparison:
    """Both metrics by name; how many images only one of the two has right, and how probable so unequal a share is by chance alone."""

    shared: Shared
    paired: dict[str, Paired]
    only_right: tuple[int, int]
    p_value: float
    resamples: int

    @property
    def better(self) -> int:
        """1 where the second is better, -1 where the first is, 0 where it is not shown: interval and test must agree."""
        low, high = self.paired["accuracy"].interval
        if self.p_value >= 1 - LEVEL or low <= 0 <= high:
            return 0
        return 1 if low > 0 else -1


def compare(first: PredictionTable, second: PredictionTable, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Judge both on the images that both judged; DataError where there is none or a label differs."""
    shared = share(first, second)
    right = shared.right
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return Comparison(shared, paired_bootstrap(shared, resamples, seed), only, mcnemar(*only), resamples)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value: how probable it is that fair coins part the images that one of the two has right as unequally."""
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def share(first: PredictionTable, second: PredictionTable) -> Shared:
    """The images that both judged, in the first's order; DataError where there is none or one has two labels."""
    places = [_places(table) for table in (first, second)]
    both = [path for path in first.paths if path in places[1]]
    if not both:
        raise DataError(
            "the two have judged no image in common", "compare predictions of the same part of the same data set"
        )
    rows = np.array([[place[path] for path in both] for place in places], dtype=np.int64)
    classes = tuple(sorted({*first.classes, *second.classes}))
    codes = [np.array([classes.index(label) for label in table.classes], dtype=np.int64) for table in (first, second)]
    targets = np.stack(
        [code[table.targets[row]] for code, table, row in zip(codes, (first, second), rows, strict=True)]
    )
    _check_labels(both, targets, classes)
    answers = [_answers(table, row, code) for table, row, code in zip((first, second), rows, codes, strict=True)]
    predicted, losses, confidences = (np.stack(column) for column in zip(*answers, strict=True))
    left = len(first.paths) - len(both), len(second.paths) - len(both)
    return Shared(tuple(both), classes, targets[0], predicted, losses, confidences, left)


def _places(table: PredictionTable) -> dict[str, int]:
    """The row of each path; DataError where one stands twice."""
    places = {path: row for row, path in enumerate(table.paths)}
    if len(places) < len(table.paths):
        twice = next(path for row, path in enumerate(table.paths) if places[path] != row)
        raise DataError(f"the predictions name {twice!r} more than once", "give each image one row")
    return places


def _check_labels(paths: list[str], targets: np.ndarray, classes: tuple[str, ...]) -> None:
    differ = np.flatnonzero(targets[0] != targets[1])
    if len(differ):
        first, second = (classes[code] for code in targets[:, differ[0]])
        fact = f"{len(differ)} of {len(paths)} images have other labels in the two: {paths[differ[0]]!r} is {first!r} in one and {second!r} in the other"
        raise DataError(fact, f"judge both by the same labels: run `{program()} test` again for one of them")


def _answers(table: PredictionTable, rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answer, loss and confidence of these rows, each [N]; `codes` are the table's classes among those of both."""
    predicted, confidence = table.answers()
    losses = np.zeros(len(table.targets))
    for place, _ in table.blocks():
        logits = table.block(place)
        losses[place] = (
            logsumexp(logits[:, np.argsort(codes)], axis=1) - logits[np.arange(len(logits)), table.targets[place]]
        )
    return codes[predicted[rows]], losses[rows], confidence[rows]


def paired_bootstrap(shared: Shared, resamples: int, seed: int) -> dict[str, Paired]:
    """Accuracy, log loss and macro F1 of both with percentile intervals of their differences: every draw takes the same images for both."""
    num_images, generator = len(shared.targets), np.random.default_rng(seed)
    draws = (
        np.bincount(generator.integers(0, num_images, num_images), minlength=num_images).astype(np.float64)
        for _ in range(resamples)
    )
    drawn = np.stack([_scores(shared, weights) for weights in draws])
    whole = _scores(shared, np.ones(num_images))
    found = {}
    for row, name in enumerate(METRICS):
        first, second = whole[row].tolist()
        low, high = np.quantile(drawn[:, row, 1] - drawn[:, row, 0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        found[name] = Paired(name, (first, second), second - first, (low, high))
    return found


def _scores(shared: Shared, weights: np.ndarray) -> np.ndarray:
    """Accuracy, macro F1 and log loss of both, float64 [3, 2], each image counted `weights` [N] times."""
    right, total = shared.right, weights.sum()
    f1 = [
        _f1_macro(shared.targets, predicted, hits, weights, len(shared.classes))
        for predicted, hits in zip(shared.predicted, right, strict=True)
    ]
    return np.array([right @ weights / total, f1, shared.losses @ weights / total])


def _f1_macro(
    targets: np.ndarray, predicted: np.ndarray, hits: np.ndarray, weights: np.ndarray, num_classes: int
) -> float:
    """Macro F1 over the classes seen or predicted, as in `metrics`; all inputs [N]."""
    named = np.bincount(targets, weights, num_classes) + np.bincount(predicted, weights, num_classes)
    twice = 2 * np.bincount(targets[hits], weights[hits], num_classes)
    return float((twice[named > 0] / named[named > 0]).mean())
