"""What each image adds to the metrics, in one pass over the logits by blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from image_classifier.errors import DataError
from image_classifier.evaluation.blocks import parallel_map, slices
from image_classifier.predictions import PredictionTable

TOP = 5
_BLOCK = 2**17  # values in a block of rows: 1 MB of float64 stays in a core's cache


@dataclass(frozen=True)
class PerImage:
    """The answers of N images: `predicted` class int64, `confidence` 0..1, `correct` and `in_top` (the true class among the five most
    probable) as 0 or 1, `log_loss` in nats, `brier` the sum over all classes of (probability - truth)², 0..2; all float64 [N].

    `top` and `log_total` [N] make probabilities: log p = logit - top - log_total.
    """

    predicted: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray
    in_top: np.ndarray
    log_loss: np.ndarray
    brier: np.ndarray
    top: np.ndarray
    log_total: np.ndarray


def judge_images(table: PredictionTable, threads: int | None = None) -> PerImage:
    """The answers of a table, row by row; DataError where there is nothing to judge, or a logit or a label is none."""
    _check(table)
    columns = np.empty((9, len(table.targets)))
    blocks = list(slices(len(table.targets), _BLOCK // len(table.classes)))
    for rows, values in zip(blocks, parallel_map(lambda rows: _judge(table, rows), blocks, threads), strict=True):
        columns[:, rows] = values
    _check_finite(table, columns[0])
    return PerImage(columns[1].astype(np.int64), *columns[2:])


def _judge(table: PredictionTable, rows: slice) -> np.ndarray:
    """Whether the row is finite and then the columns of PerImage, float64 [9, M], for a block of M rows."""
    logits, targets = table.block(rows), table.targets[rows]
    finite = np.isfinite(logits).all(axis=1)
    logits[~finite] = 0  # said afterwards, with how many they are
    image = np.arange(len(logits))
    predicted = logits.argmax(axis=1)
    truth, top = logits[image, targets], logits[image, predicted]
    in_top = _place(logits, truth, targets) < TOP
    logits -= top[:, None]
    shifted = logits[image, targets]
    exponents = np.exp(logits, out=logits)
    total = exponents.sum(axis=1)
    squares = np.einsum("nc,nc->n", exponents, exponents) / total**2
    log_total, hit = np.log(total), exponents[image, targets] / total
    columns = (
        finite,
        predicted,
        1 / total,
        predicted == targets,
        in_top,
        log_total - shifted,
        squares - 2 * hit + 1,
        top,
        log_total,
    )
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns])


def _place(logits: np.ndarray, truth: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How many classes come before the true one, int64 [M]; of equal logits the first class comes first, as in argmax."""
    before = np.count_nonzero(logits > truth[:, None], axis=1)
    tied = np.flatnonzero(np.count_nonzero(logits >= truth[:, None], axis=1) > before + 1)
    earlier = np.arange(logits.shape[1]) < targets[tied, None]
    before[tied] += ((logits[tied] == truth[tied, None]) & earlier).sum(axis=1)
    return np.asarray(before)


def _check(table: PredictionTable) -> None:
    count, num_classes = len(table.targets), len(table.classes)
    if count == 0:
        raise DataError("there is no prediction to evaluate", "give a part that holds at least one image")
    if table.logits.shape != (count, num_classes):
        fact = f"the logits are a table of {table.logits.shape}, but there are {count} labels and {num_classes} classes"
        raise DataError(fact, "predict the part anew with the model that these classes belong to")
    bad = np.flatnonzero((table.targets < 0) | (table.targets >= num_classes))
    if len(bad):
        fact = f"the label of {table.paths[bad[0]]!r} is class number {table.targets[bad[0]]}, but the {num_classes} classes count from 0"
        raise DataError(fact, "predict the part anew with the model that these classes belong to")


def _check_finite(table: PredictionTable, finite: np.ndarray) -> None:
    bad = np.flatnonzero(finite == 0)
    if len(bad):
        fact = f"the logits of {len(bad)} of {len(finite)} images are not numbers, first {table.paths[bad[0]]!r}"
        raise DataError(fact, "the model has diverged; train again with a lower learning rate")
