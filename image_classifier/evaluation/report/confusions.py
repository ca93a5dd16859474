"""The confusion matrix as a page can show it: of many classes those that are mixed up most, and behind each cell its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from image_classifier.predictions import PredictionTable

MOST_CLASSES = 40  # rows and columns of the matrix
_PAIRS = 200  # rows of the list
_DEEP = 5  # shades of a cell


@dataclass(frozen=True)
class Pair:
    """One cell: true and predicted class, its images, and the share of the true class."""

    truth: int
    predicted: int
    count: int
    share: float

    @property
    def shade(self) -> int:
        """How dark the cell is, 1 to 5; by the square root, so that a few per cent are seen beside a full diagonal."""
        return max(1, min(_DEEP, int(np.ceil(np.sqrt(self.share) * _DEEP))))


@dataclass(frozen=True)
class Matrix:
    """The cells of the classes that are shown, None where no image is; `whole` says whether these are all."""

    classes: Sequence[int]
    rows: Sequence[Sequence[Pair | None]]
    whole: bool


def matrix(confusion: np.ndarray) -> Matrix:
    """Of counts [C, C], rows truth, columns predicted; above 40 classes those with most mistakes, in their order."""
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


def frequent(confusion: np.ndarray, limit: int = _PAIRS) -> list[Pair]:
    """The confusions with most images, first the largest."""
    wrong, totals = confusion - np.diag(np.diag(confusion)), confusion.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    places = (divmod(int(place), len(confusion)) for place in order if wrong.flat[place])
    return [
        Pair(truth, predicted, int(wrong[truth, predicted]), int(wrong[truth, predicted]) / int(totals[truth]))
        for truth, predicted in places
    ]


def images_of_cells(
    table: PredictionTable, confidence: np.ndarray, limit: int, each: int
) -> dict[tuple[int, int], list[int]]:
    """Rows of the table behind each cell, at most `limit` in all and `each` of one cell: mistakes before right answers, every cell in turn.

    Of mistakes the surest come first, of right answers the least sure; `confidence` [N] is of the answers.
    """
    predicted = table.logits.argmax(axis=1)
    right = predicted == table.targets
    chosen: dict[tuple[int, int], list[int]] = {}
    for rows, most in ((np.flatnonzero(~right), limit), (np.flatnonzero(right), limit // 4)):
        sure = confidence[rows] if right[rows[:1]].any() else -confidence[rows]
        cells = table.targets[rows] * len(table.classes) + predicted[rows]
        for row in _in_turn(rows, cells, sure, each)[: min(most, limit - sum(map(len, chosen.values())))].tolist():
            chosen.setdefault((int(table.targets[row]), int(predicted[row])), []).append(row)
    return chosen


def _in_turn(rows: np.ndarray, cells: np.ndarray, keys: np.ndarray, each: int) -> np.ndarray:
    """The first row of every cell, then the second, up to `each`; within a cell by `keys`, cells with many images first; all inputs [N]."""
    order = np.lexsort((keys, cells))
    rows, cells = rows[order], cells[order]
    turn = np.arange(len(rows)) - np.searchsorted(cells, cells)
    sizes = np.searchsorted(cells, cells, side="right") - np.searchsorted(cells, cells)
    return np.asarray(rows[np.lexsort((cells, -sizes, turn))][: int((turn < each).sum())])
