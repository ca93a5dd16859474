"""The contribution of each image to the metrics, in one pass over the logits by blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from image_classifier.errors import DataError
from image_classifier.parallel import parallel_map, slices
from image_classifier.predictions import PredictionTable

TOP = 5
_BLOCK = 2**17  # values in a block of rows: 1 MB of float64 stays in a core's cache


@dataclass(frozen=True)
class PerImage:
    """The predictions of N images.

    Args:
        predicted: Predicted class, int64 [N].
        confidence: Probability of the predicted class, 0..1, float64 [N].
        correct: 1 where the prediction is right, else 0, float64 [N].
        in_top: 1 where the true class is among the five most probable, else 0, float64 [N].
        log_loss: Negative log-probability of the true class in nats, float64 [N].
        brier: Sum over all classes of (probability - truth)², 0..2, float64 [N].
        top: Largest logit, float64 [N].
        log_total: Log of the sum of exp(logit - top), float64 [N]; log p = logit - top - log_total.
    """

    predicted: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray
    in_top: np.ndarray
    log_loss: np.ndarray
    brier: np.ndarray
    top: np.ndarray
    log_total: np.ndarray


def evaluate_images(table: PredictionTable, threads: int | None = None) -> PerImage:
    """Return the predictions of a table row by row.

    Raises:
        DataError: There is no row, a logit is not a finite number, or a label is not a class of the table.
    """
    _check(table)
    columns = np.empty((9, len(table.targets)))
    blocks = list(slices(len(table.targets), _BLOCK // len(table.classes)))
    for rows, values in zip(blocks, parallel_map(lambda rows: _evaluate(table, rows), blocks, threads), strict=True):
        columns[:, rows] = values
    _check_finite(table, columns[0])
    return PerImage(columns[1].astype(np.int64), *columns[2:])


def _evaluate(table: PredictionTable, rows: slice) -> np.ndarray:
    """Return whether each of M rows is finite, then the columns of PerImage, float64 [9, M]."""
    # A copy of the logits [M, C], scaled by the temperature; it is overwritten below.
    logits = table.block(rows)
    targets = table.targets[rows]
    image = np.arange(len(logits))
    # Rows that are not finite are reported later, all together.
    finite = np.isfinite(logits).all(axis=1)
    logits[~finite] = 0
    # Prediction, and rank of the true class.
    predicted = logits.argmax(axis=1)
    truth = logits[image, targets]
    top = logits[image, predicted]
    in_top = _rank_of_truth(logits, truth, targets) < TOP
    # Softmax in place: subtract the largest logit, so that nothing overflows.
    logits -= top[:, None]
    shifted = logits[image, targets]
    exponents = np.exp(logits, out=logits)
    total = exponents.sum(axis=1)
    log_total = np.log(total)
    # Brier score: sum of p² - 2 p(truth) + 1, without a table of probabilities.
    squares = np.einsum("nc,nc->n", exponents, exponents) / total**2
    true_probability = exponents[image, targets] / total
    columns = (
        finite,
        predicted,
        1 / total,  # confidence: the largest exponent is exp(0)
        predicted == targets,
        in_top,
        log_total - shifted,
        squares - 2 * true_probability + 1,
        top,
        log_total,
    )
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns])


def _rank_of_truth(logits: np.ndarray, truth: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return how many classes precede the true one, int64 [M]; of equal logits the first precedes, as in argmax."""
    before = np.count_nonzero(logits > truth[:, None], axis=1)
    # Only rows with ties need a comparison of class numbers.
    tied = np.flatnonzero(np.count_nonzero(logits >= truth[:, None], axis=1) > before + 1)
    earlier = np.arange(logits.shape[1]) < targets[tied, None]
    before[tied] += ((logits[tied] == truth[tied, None]) & earlier).sum(axis=1)
    return np.asarray(before)


def _check(table: PredictionTable) -> None:
    count = len(table.targets)
    num_classes = len(table.classes)
    hint = "run the prediction again with the model that these classes belong to"
    if count == 0:
        raise DataError("no predictions to evaluate", "choose a split with at least one image")
    if table.logits.shape != (count, num_classes):
        fact = f"the logits have the shape {table.logits.shape}, but there are {count} labels and {num_classes} classes"
        raise DataError(fact, hint)
    bad = np.flatnonzero((table.targets < 0) | (table.targets >= num_classes))
    if len(bad):
        label = f"label {table.targets[bad[0]]} of {table.paths[bad[0]]!r}"
        raise DataError(f"invalid {label}: expected a class number from 0 to {num_classes - 1}", hint)


def _check_finite(table: PredictionTable, finite: np.ndarray) -> None:
    bad = np.flatnonzero(finite == 0)
    if len(bad):
        fact = f"the logits of {len(bad)} of {len(finite)} images are not finite numbers, first {table.paths[bad[0]]!r}"
        raise DataError(fact, "the model has diverged; train again with a lower learning rate")
