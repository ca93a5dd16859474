"""The confusion matrix for a page: with many classes those that are confused most, and the images of each cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from image_classifier.predictions import PredictionTable

MOST_CLASSES = 40  # rows and columns of the matrix
_MAX_PAIRS = 200  # rows of the list
_SHADES = 5


@dataclass(frozen=True)
class Pair:
    """One cell: true and predicted class, number of images, and their share of the true class."""

    truth: int
    predicted: int
    count: int
    share: float

    @property
    def shade(self) -> int:
        """The darkness of the cell, 1 to 5, by the square root: a few per cent are visible next to a full diagonal."""
        return max(1, min(_SHADES, int(np.ceil(np.sqrt(self.share) * _SHADES))))


@dataclass(frozen=True)
class Matrix:
    """The cells of the classes that are shown, None without images; `complete` is whether these are all classes."""

    classes: Sequence[int]
    rows: Sequence[Sequence[Pair | None]]
    complete: bool


def matrix(confusion: np.ndarray) -> Matrix:
    """Return the matrix of counts [C, C], rows true, columns predicted; above 40 classes those with most mistakes."""
    number = len(confusion)
    wrong = confusion - np.diag(np.diag(confusion))
    chosen = np.arange(number)
    if number > MOST_CLASSES:
        chosen = np.sort(np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:MOST_CLASSES])
    totals = confusion.sum(axis=1)
    rows = [[_pair(confusion, totals, row, column) for column in chosen.tolist()] for row in chosen.tolist()]
    return Matrix(chosen.tolist(), rows, number <= MOST_CLASSES)


def _pair(confusion: np.ndarray, totals: np.ndarray, truth: int, predicted: int) -> Pair | None:
    count = int(confusion[truth, predicted])
    return Pair(truth, predicted, count, count / int(totals[truth])) if count else None


def frequent(confusion: np.ndarray, limit: int = _MAX_PAIRS) -> list[Pair]:
    """Return the confusions with most images, largest first."""
    wrong = confusion - np.diag(np.diag(confusion))
    totals = confusion.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    cells = (divmod(int(index), len(confusion)) for index in order if wrong.flat[index])
    return [
        Pair(truth, predicted, int(wrong[truth, predicted]), int(wrong[truth, predicted]) / int(totals[truth]))
        for truth, predicted in cells
    ]


def images_of_cells(
    table: PredictionTable, confidence: np.ndarray, limit: int, each: int
) -> dict[tuple[int, int], list[int]]:
    """Return rows of the table for each cell, at most `limit` in total and `each` for one cell.

    Mistakes come before right predictions, and cells take turns. Of mistakes the most confident come first, of right
    predictions the least confident; `confidence` is [N].
    """
    predicted = table.logits.argmax(axis=1)
    right = predicted == table.targets
    chosen: dict[tuple[int, int], list[int]] = {}
    for rows, max_rows in ((np.flatnonzero(~right), limit), (np.flatnonzero(right), limit // 4)):
        keys = confidence[rows] if right[rows[:1]].any() else -confidence[rows]
        cells = table.targets[rows] * len(table.classes) + predicted[rows]
        for row in _in_turn(rows, cells, keys, each)[: min(max_rows, limit - sum(map(len, chosen.values())))].tolist():
            chosen.setdefault((int(table.targets[row]), int(predicted[row])), []).append(row)
    return chosen


def _in_turn(rows: np.ndarray, cells: np.ndarray, keys: np.ndarray, each: int) -> np.ndarray:
    """Return the first row of every cell, then the second, up to `each`; all inputs are [N].

    Within a cell rows are ordered by `keys`; cells with many images come first.
    """
    order = np.lexsort((keys, cells))
    rows, cells = rows[order], cells[order]
    turn = np.arange(len(rows)) - np.searchsorted(cells, cells)
    sizes = np.searchsorted(cells, cells, side="right") - np.searchsorted(cells, cells)
    return np.asarray(rows[np.lexsort((cells, -sizes, turn))][: int((turn < each).sum())])
