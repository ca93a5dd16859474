"""What models said of images that they were not trained on, read back from the files of several parts or folds."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_classifier.errors import DataError
from image_classifier.predictions import softmax


@dataclass(frozen=True)
class Answers:
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


def read_probabilities(directory: Path) -> tuple[list[str], np.ndarray]:
    """Paths and probabilities float64 [N, C] that `PredictionTable.write` put into a folder.

    Raises:
        DataError: One of the two files is missing or damaged, or they are not of the same images.
    """
    try:
        with (directory / "predictions.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            paths = [row["path"] for row in csv.DictReader(file)]
        logits = np.load(directory / "logits.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"there are no predictions to read in {str(directory)!r} ({error})", "run the command that writes them again") from error
    if logits.ndim != 2 or len(logits) != len(paths):
        raise DataError(f"predictions.csv and logits.npy in {str(directory)!r} are not of the same images", "run the command that writes them again")
    return paths, softmax(logits)


def out_of_fold(directories: Iterable[Path], labels: dict[str, int], splits: dict[str, str], classes: Sequence[str]) -> Answers:
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
        paths, probabilities = read_probabilities(directory)
        if probabilities.shape[1] != len(classes):
            raise DataError(f"the predictions in {str(directory)!r} are of other classes", f"remove {str(directory.parent)!r} and run again")
        twice = next((path for path in paths if path in answered), None)
        if twice is not None:
            raise DataError(f"{twice!r} is in two folds", f"remove {str(directory.parent)!r} and run again")
        answered |= dict(zip(paths, probabilities, strict=True))
    if answered.keys() != labels.keys():
        odd = min(answered.keys() ^ labels.keys())
        raise DataError(f"{odd!r} is in the data set or in a fold, and not in both", "the files have changed meanwhile: run the command again")
    targets = np.fromiter(labels.values(), dtype=np.int64, count=len(labels))
    return Answers(tuple(labels), targets, np.stack([answered[path] for path in labels]), tuple(classes), [splits.get(path, "") for path in labels])
