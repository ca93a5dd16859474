"""ROC-AUC and average precision of each class, and the influence of each image on them.

For one class, the sorted distinct scores of its images are u[0] < u[1] < … < u[K-1]. They divide the scores of all
images into cells: cell 2j holds the scores between u[j-1] and u[j], cell 2j - 1 those equal to u[j-1]. Both metrics and
their derivatives are sums over these cells, exact with ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from image_classifier.evaluation.metrics.per_image import PerImage
from image_classifier.parallel import parallel_map, slices
from image_classifier.predictions import PredictionTable

_BLOCK = 2**25  # values in a block of columns, 128 MB of float32
_ROWS = 4096  # transposed at a time
_GRID = 2**16
_LOWEST = float(np.finfo(np.float32).min)
_FEW = 20_000  # scores below which a grid costs more than it saves


@dataclass(frozen=True)
class Ranking:
    """ROC-AUC and average precision of each class against the rest, [C]; NaN for a class with no image or all of them.

    `influence` [2, N] is the derivative of the two macro means by the weight of each image (Efron's infinitesimal
    jackknife; for ROC-AUC the placement values of DeLong et al., 1988). Each row sums to 0.
    """

    roc_auc: np.ndarray
    average_precision: np.ndarray
    influence: np.ndarray


def rank_classes(table: PredictionTable, images: PerImage, threads: int | None = None) -> Ranking:
    """Return both metrics of every class, ranked by log-probability in float32: near 1 it is finer than probability."""
    num_images = len(table.targets)
    num_classes = len(table.classes)
    scores = np.full((2, num_classes), np.nan)
    influence = np.zeros((2, num_images))
    blocks = list(slices(num_classes, _BLOCK // num_images))
    for columns, (values, added) in zip(
        blocks, parallel_map(lambda columns: _rank(table, images, columns), blocks, threads), strict=True
    ):
        scores[:, columns] = values
        influence += added
    return Ranking(scores[0], scores[1], influence / max(1, np.isfinite(scores[0]).sum()))


def _rank(table: PredictionTable, images: PerImage, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return both metrics of a block of B classes, [2, B], and the summed influence of the images, [2, N]."""
    block = _log_probabilities(table, images, columns)
    values = np.full((2, len(block)), np.nan)
    influence = np.zeros((2, block.shape[1]))
    for position, scores in enumerate(block):
        members = np.flatnonzero(table.targets == columns.start + position)
        if 0 < len(members) < len(scores):
            values[:, position] = _add_class(scores, members, influence)
    return values, influence


def _log_probabilities(table: PredictionTable, images: PerImage, columns: slice) -> np.ndarray:
    """Return the log-probabilities of a block of classes, one row for each class, float32 [B, N]."""
    block = np.empty((columns.stop - columns.start, len(table.targets)), dtype=np.float32)
    for rows in slices(len(table.targets), _ROWS):
        values = table.block(rows, columns)
        values -= images.top[rows, None]
        values -= images.log_total[rows, None]
        block[:, rows] = np.maximum(values, _LOWEST, out=values).T
    return block


def _add_class(scores: np.ndarray, members: np.ndarray, influence: np.ndarray) -> tuple[float, float]:
    """Return ROC-AUC and average precision of one class with scores [N]; add to the influence [2, N].

    `members` are the rows of the class's images.
    """
    # Cells between and on the distinct scores of the class's own images.
    steps, repeats = np.unique(scores[members], return_counts=True)
    cells = _cells(scores, steps)
    # Images of each cell: all of them, and those of the class, which are only on the steps.
    counts = np.bincount(cells, minlength=2 * len(steps) + 1).astype(np.float64)
    positives = np.zeros(len(counts))
    positives[1::2] = repeats
    results = []
    for row, metric in enumerate((_roc_auc, _average_precision)):
        value, of_positive, of_negative = metric(positives, counts)
        # Add the influence of a negative for every image, then correct it for those of the class.
        influence[row] += of_negative[cells]
        influence[row, members] += (of_positive - of_negative)[cells[members]]
        results.append(value)
    return results[0], results[1]


def _roc_auc(positives: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the chance that an image of the class outranks another, and the influence of a positive and a negative.

    Inputs and influences are by cell, [K']; ties count half.
    """
    negatives = counts - positives
    num_positives = positives.sum()
    num_negatives = negatives.sum()
    below = (np.cumsum(negatives) - negatives / 2) / num_negatives
    above = (num_positives - np.cumsum(positives) + positives / 2) / num_positives
    value = float(positives @ below / num_positives)
    return value, (below - value) / num_positives, (above - value) / num_negatives


def _average_precision(positives: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the mean precision at the rank of each positive, and the influence of a positive and a negative.

    Inputs and influences are by cell, [K'].
    """
    num_positives = positives.sum()
    # Images with this score or a higher one.
    positives_above = np.cumsum(positives[::-1])[::-1]
    all_above = np.cumsum(counts[::-1])[::-1]
    all_above = np.maximum(all_above, 1)  # the highest cell may be empty
    precision = positives_above / all_above
    value = float(positives @ precision / num_positives)
    # An image raises the precision at all lower positives if it is one itself, and lowers it in any case.
    gain = np.cumsum(positives / all_above)
    loss = np.cumsum(positives * precision / all_above)
    return value, (precision - value + gain - loss) / num_positives, -loss / num_positives


def _cells(scores: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return the cell of each score [N] among distinct sorted steps [K], int64 [N].

    A grid over the steps separates most scores at once. Only scores that share a square with a step are searched.
    """
    with np.errstate(over="ignore"):
        scale = np.float32(_GRID) / (steps[-1] - steps[0]) if len(steps) > 1 else np.float32(np.inf)
    if len(scores) < _FEW or not np.isfinite(scale):
        return _searched(scores, steps)
    # Squares of the grid for scores and steps.
    score_squares = _squares(scores, steps[0], scale)
    step_squares = _squares(steps, steps[0], scale)
    # Number of steps in each square; a score in a square without steps is between the steps below and above it.
    num_steps = np.bincount(step_squares, minlength=_GRID + 3)
    cells = np.asarray(2 * (np.cumsum(num_steps) - num_steps))[score_squares]
    # The rest by binary search.
    shared = np.flatnonzero((num_steps > 0)[score_squares])
    cells[shared] = _searched(scores[shared], steps)
    return np.asarray(cells)


def _squares(scores: np.ndarray, low: np.float32, scale: np.float32) -> np.ndarray:
    """Return the square of each score, 0 below the grid; rounding keeps the order, so a higher score is never lower."""
    with np.errstate(over="ignore"):
        positions = (scores - low) * scale
    positions += np.float32(1)
    return np.clip(positions, 0, _GRID + 2, out=positions).astype(np.int64)


def _searched(scores: np.ndarray, steps: np.ndarray) -> np.ndarray:
    reached = np.searchsorted(steps, scores, side="right")
    return np.asarray(2 * reached - (steps[np.maximum(reached, 1) - 1] == scores))
