"""Accuracy on corrupted images, measured through the predictor, so that the same code evaluates every backend."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.errors import UnreadableImage
from image_classifier.evaluation.plots.robustness import plot_robustness
from image_classifier.inference.corruptions import CORRUPTIONS, SEVERITIES
from image_classifier.inference.predictor import Predictor

log = logging.getLogger(__name__)

_SEED = 0


@dataclass(frozen=True)
class Robustness:
    """Accuracy under corruptions. Its fields are in robustness.json.

    Args:
        accuracy: 0..1 by corruption and severity; severity "0" is the image as it is.
        images: Number of images it was measured on.
        of: Number of images of the split or folder.
        part: Name of the split or folder.
    """

    accuracy: Mapping[str, Mapping[str, float]]
    images: int
    of: int
    part: str = ""

    @property
    def clean(self) -> float:
        """Accuracy on the images as they are, 0..1."""
        return next(iter(self.accuracy.values()))["0"]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return {corruption: {severity: accuracy}}, ready for JSON, and under `about` the images behind it."""
        return {
            **{name: dict(row) for name, row in self.accuracy.items()},
            "about": {"part": self.part, "images": self.images, "of": self.of, "seed": _SEED},
        }

    def lines(self, split: str) -> Iterator[str]:
        """Yield the lines for a terminal, under names that a script may look for."""
        for name, row in self.accuracy.items():
            yield f"{split} accuracy_{name} {' '.join(f'{row[str(severity)]:.4f}' for severity in SEVERITIES)}"
        chosen = (
            f"{self.images} of the {self.of} images, stratified by class"
            if self.images < self.of
            else f"{self.images} images"
        )
        yield f"{len(self.accuracy)} corruptions, severities 1 to 3, measured on {chosen}; uncorrupted {self.clean:.4f}"

    def write(self, directory: Path, title: str) -> None:
        """Write robustness.json and robustness.png; StorageError where the disk refuses."""
        write_text(directory / "robustness.json", json.dumps(self.as_dict(), indent=2) + "\n")
        plot_robustness(self.accuracy, self.images, directory / "robustness.png", title)


def measure_robustness(
    predictor: Predictor, paths: Sequence[Path], targets: np.ndarray, limit: int, part: str = ""
) -> Robustness:
    """Measure the accuracy under each corruption on at most `limit` of the images, class indices `targets` [N].

    `part` is the name of the split or folder. Each image has its own random numbers, so that the figures depend neither
    on the batches nor on the other images.

    Raises:
        UnreadableImage: The first image that cannot be read.
    """
    rows = stratified(targets, limit)
    hits = dict.fromkeys([("", 0), *product(CORRUPTIONS, SEVERITIES)], 0)
    log.info("robustness: %d passes over %d images", len(hits), len(rows))
    with ThreadPoolExecutor(predictor.workers) as pool:
        for start in range(0, len(rows), predictor.batch_size):
            batch = rows[start : start + predictor.batch_size]
            pixels = [_readable(item) for item in pool.map(predictor.read, [paths[row] for row in batch])]
            for name, severity in hits:
                corrupted = list(pool.map(partial(_corrupted, name, severity), pixels, batch.tolist()))
                hits[name, severity] += int((predictor.logits(corrupted).argmax(axis=1) == targets[batch]).sum())
    clean = hits["", 0] / len(rows)
    accuracy = {
        name: {"0": clean, **{str(step): hits[name, step] / len(rows) for step in SEVERITIES}} for name in CORRUPTIONS
    }
    return Robustness(accuracy, len(rows), len(targets), part)


def stratified(targets: np.ndarray, limit: int) -> np.ndarray:
    """Return the rows, int64 ascending, of at most `limit` of the class indices [N], each class in proportion.

    A fixed seed chooses them.

    >>> import numpy as np
    >>> rows = stratified(np.array([0] * 80 + [1] * 20), 10)
    >>> int((rows < 80).sum()), int((rows >= 80).sum())
    (8, 2)
    """
    if len(targets) <= limit:
        return np.arange(len(targets))
    random = np.random.default_rng(_SEED)
    shuffled = random.permutation(len(targets))
    # Give each row a quantile within its class: the k-th of n shuffled rows gets (k + offset) / n.
    quantile = np.empty(len(targets), dtype=np.float64)
    for code in np.unique(targets):
        rows = shuffled[targets[shuffled] == code]
        quantile[rows] = (np.arange(len(rows)) + random.random()) / len(rows)
    # The lowest quantiles hold the same share of every class.
    return np.sort(np.argsort(quantile, kind="stable")[:limit])


def _readable(item: np.ndarray | UnreadableImage) -> np.ndarray:
    if isinstance(item, UnreadableImage):
        raise item
    return item


def _corrupted(name: str, severity: int, pixels: np.ndarray, row: int) -> np.ndarray:
    """Return one corrupted image; its random numbers are the same at each severity, so that signs stay the same."""
    return CORRUPTIONS[name](pixels, severity, np.random.default_rng([_SEED, row])) if name else pixels
