"""Predictions for images that the models were not trained on, read from the files of several folds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_classifier.errors import DataError
from image_classifier.predictions import PredictionTable, softmax


@dataclass(frozen=True)
class OutOfFoldPredictions:
    """Labels and probabilities of M images.

    Args:
        paths: M paths.
        targets: Class number of each label, int64 [M].
        probabilities: Probability of each class, float64 [M, C].
        classes: C names.
        splits: Split of each image, "" for none.
    """

    paths: Sequence[str]
    targets: np.ndarray
    probabilities: np.ndarray
    classes: Sequence[str]
    splits: Sequence[str]

    @property
    def given(self) -> np.ndarray:
        """The probability of each image's label, float64 [M]."""
        return np.asarray(self.probabilities[np.arange(len(self.targets)), self.targets])


def out_of_fold(
    directories: Iterable[Path], labels: dict[str, int], splits: dict[str, str], classes: Sequence[str]
) -> OutOfFoldPredictions:
    """Return the predictions of all folds in the order of `labels`, exactly one for each image.

    Args:
        directories: Folder with the predictions of each fold.
        labels: Path -> class number of every image in a fold.
        splits: Path -> split of the images that have one.
        classes: C names.

    Raises:
        DataError: An image has no prediction, or two, or the classes differ.
    """
    predicted: dict[str, np.ndarray] = {}
    for directory in directories:
        table = PredictionTable.read(directory)
        # Without temperature: each fold has another one.
        probabilities = softmax(table.logits)
        hint = f"remove {str(directory.parent)!r} and run again"
        if probabilities.shape[1] != len(classes):
            raise DataError(f"the predictions in {str(directory)!r} are for other classes", hint)
        twice = next((path for path in table.paths if path in predicted), None)
        if twice is not None:
            raise DataError(f"{twice!r} is in two folds", hint)
        predicted |= dict(zip(table.paths, probabilities, strict=True))
    if predicted.keys() != labels.keys():
        odd = min(predicted.keys() ^ labels.keys())
        fact = f"{odd!r} is only in the data set or only in a fold"
        raise DataError(fact, "the files have changed during the run: run the command again")
    targets = np.fromiter(labels.values(), dtype=np.int64, count=len(labels))
    return OutOfFoldPredictions(
        tuple(labels),
        targets,
        np.stack([predicted[path] for path in labels]),
        tuple(classes),
        [splits.get(path, "") for path in labels],
    )
