"""How well each class's probability ranks its images before the others: ROC-AUC and average precision, and what each image adds to them.

A class's scores meet the sorted distinct scores u[0] < u[1] < … of its own K images once: cell 2j holds the scores between u[j-1] and u[j],
cell 2j - 1 those equal to u[j-1]. Both figures and their derivatives are then sums over cells, exact with ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from image_classifier.evaluation.blocks import parallel_map, slices
from image_classifier.evaluation.metrics.per_image import PerImage
from image_classifier.predictions import PredictionTable

_BLOCK = 2**25  # values in a block of columns, 128 MB of float32
_ROWS = 4096  # turned from rows into columns at a time
_GRID = 2**16
_LOWEST = float(np.finfo(np.float32).min)
_FEW = 20_000  # scores that are not worth a grid


@dataclass(frozen=True)
class Ranking:
    """ROC-AUC and average precision of each class against the rest, [C], NaN where a class has no image or all of them.

    `influence` [2, N] is what the two macro means gain when an image is counted a bit more: the derivative by its weight (Efron's
    infinitesimal jackknife; for ROC-AUC the placement values of DeLong et al., 1988). Each row sums to 0.
    """

    roc_auc: np.ndarray
    average_precision: np.ndarray
    influence: np.ndarray


def rank_classes(table: PredictionTable, images: PerImage, threads: int | None = None) -> Ranking:
    """Both figures of every class, ranked by log-probability (float32), which is finer than a probability near 1."""
    num_images, num_classes = len(table.targets), len(table.classes)
    scores, influence = np.full((2, num_classes), np.nan), np.zeros((2, num_images))
    blocks = list(slices(num_classes, _BLOCK // num_images))
    for columns, (values, added) in zip(
        blocks, parallel_map(lambda columns: _rank(table, images, columns), blocks, threads), strict=True
    ):
        scores[:, columns] = values
        influence += added
    return Ranking(scores[0], scores[1], influence / max(1, np.isfinite(scores[0]).sum()))


def _rank(table: PredictionTable, images: PerImage, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """ROC-AUC and average precision of a block of B classes, [2, B], and the sum of their images' influence, [2, N]."""
    block = _log_probabilities(table, images, columns)
    values, influence = np.full((2, len(block)), np.nan), np.zeros((2, block.shape[1]))
    for position, scores in enumerate(block):
        own = np.flatnonzero(table.targets == columns.start + position)
        if 0 < len(own) < len(scores):
            values[:, position] = _add_class(scores, own, influence)
    return values, influence


def _log_probabilities(table: PredictionTable, images: PerImage, columns: slice) -> np.ndarray:
    """Log-probabilities of a block of classes, one row a class, float32 [B, N]."""
    block = np.empty((columns.stop - columns.start, len(table.targets)), dtype=np.float32)
    for rows in slices(len(table.targets), _ROWS):
        values = table.block(rows, columns)
        values -= images.top[rows, None]
        values -= images.log_total[rows, None]
        block[:, rows] = np.maximum(values, _LOWEST, out=values).T
    return block


def _add_class(scores: np.ndarray, own: np.ndarray, influence: np.ndarray) -> tuple[float, float]:
    """ROC-AUC and average precision of one class with scores [N], `own` the rows of its images; adds to the influence [2, N]."""
    steps, repeats = np.unique(scores[own], return_counts=True)
    cells = _cells(scores, steps)
    every = np.bincount(cells, minlength=2 * len(steps) + 1).astype(np.float64)
    mine = np.zeros(len(every))
    mine[1::2] = repeats
    results = []
    for kind, figure in enumerate((_roc_auc, _average_precision)):
        value, of_own, of_others = figure(mine, every)
        influence[kind] += of_others[cells]
        influence[kind, own] += (of_own - of_others)[cells[own]]
        results.append(value)
    return results[0], results[1]


def _roc_auc(mine: np.ndarray, every: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Chance that an image of the class outranks another, ties for half, of counts by cell [K']; and the influence of either by cell."""
    others = every - mine
    num_mine, num_others = mine.sum(), others.sum()
    below = (np.cumsum(others) - others / 2) / num_others
    above = (num_mine - np.cumsum(mine) + mine / 2) / num_mine
    value = float(mine @ below / num_mine)
    return value, (below - value) / num_mine, (above - value) / num_others


def _average_precision(mine: np.ndarray, every: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean over the class's images of the precision among all ranked as high, of counts by cell [K']; and the influence of either by cell."""
    num_mine = mine.sum()
    found, listed = (np.cumsum(counts[::-1])[::-1] for counts in (mine, every))
    listed = np.maximum(listed, 1)  # the cell above all may be empty
    precision = found / listed
    value = float(mine @ precision / num_mine)
    gain, loss = np.cumsum(mine / listed), np.cumsum(mine * precision / listed)
    return value, (precision - value + gain - loss) / num_mine, -loss / num_mine


def _cells(scores: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The cell of each score [N] among distinct sorted steps [K], int64 [N].

    A grid over the steps tells most scores apart at once; only those that share a square of it with a step are searched for.
    """
    with np.errstate(over="ignore"):
        scale = np.float32(_GRID) / (steps[-1] - steps[0]) if len(steps) > 1 else np.float32(np.inf)
    if len(scores) < _FEW or not np.isfinite(scale):
        return _searched(scores, steps)
    squares, edges = _squares(scores, steps[0], scale), _squares(steps, steps[0], scale)
    held = np.bincount(edges, minlength=_GRID + 3)
    cells = np.asarray(2 * (np.cumsum(held) - held))[squares]
    shared = np.flatnonzero((held > 0)[squares])
    cells[shared] = _searched(scores[shared], steps)
    return np.asarray(cells)


def _squares(scores: np.ndarray, low: np.float32, scale: np.float32) -> np.ndarray:
    """Squares of the grid, 0 for what is below it; rounding keeps the order, so that an equal or greater score is never in a lower one."""
    with np.errstate(over="ignore"):
        places = (scores - low) * scale
    places += np.float32(1)
    return np.clip(places, 0, _GRID + 2, out=places).astype(np.int64)


def _searched(scores: np.ndarray, steps: np.ndarray) -> np.ndarray:
    reached = np.searchsorted(steps, scores, side="right")
    return np.asarray(2 * reached - (steps[np.maximum(reached, 1) - 1] == scores))
