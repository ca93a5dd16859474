"""What models said of images that they were not trained on, read back from the files of several parts or folds."""

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
        paths: M of them.
        targets: Class index of each image's label, int64 [M].
        probabilities: float64 [M, C].
        classes: C names.
        splits: Part of each image, "" where it is given none.
    """

    paths: Sequence[str]
    targets: np.ndarray
    probabilities: np.ndarray
    classes: Sequence[str]
    splits: Sequence[str]

    @property
    def given(self) -> np.ndarray:
        """The probability of each image's own label, float64 [M]."""
        return np.asarray(self.probabilities[np.arange(len(self.targets)), self.targets])


def out_of_fold(
    directories: Iterable[Path], labels: dict[str, int], splits: dict[str, str], classes: Sequence[str]
) -> OutOfFoldPredictions:
    """The answers of all folds together, in the order of `labels`, of which each image is answered exactly once.

    Args:
        directories: The predictions of each fold.
        labels: Path to class index of every image that is in a fold.
        splits: Path to the part that the images are given, where they are.
        classes: C names.

    Raises:
        DataError: An image has no answer, or two, or the classes are others.
    """
    answered: dict[str, np.ndarray] = {}
    for directory in directories:
        table = PredictionTable.read(directory)
        paths, probabilities = (
            table.paths,
            softmax(table.logits),
        )  # each fold has a temperature of its own: none is applied
        if probabilities.shape[1] != len(classes):
            raise DataError(
                f"the predictions in {str(directory)!r} are of other classes",
                f"remove {str(directory.parent)!r} and run again",
            )
        twice = next((path for path in paths if path in answered), None)
        if twice is not None:
            raise DataError(f"{twice!r} is in two folds", f"remove {str(directory.parent)!r} and run again")
        answered |= dict(zip(paths, probabilities, strict=True))
    if answered.keys() != labels.keys():
        odd = min(answered.keys() ^ labels.keys())
        raise DataError(
            f"{odd!r} is in the data set or in a fold, and not in both",
            "the files have changed meanwhile: run the command again",
        )
    targets = np.fromiter(labels.values(), dtype=np.int64, count=len(labels))
    return OutOfFoldPredictions(
        tuple(labels),
        targets,
        np.stack([answered[path] for path in labels]),
        tuple(classes),
        [splits.get(path, "") for path in labels],
    )
