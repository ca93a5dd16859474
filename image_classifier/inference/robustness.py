"""Accuracy on pictures made worse: through the predictor, so that every backend is judged by the same code."""

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
    """Accuracy 0..1 by corruption and severity ("0" is the picture as it is) on `images` of the `of` images that the `part` has."""

    accuracy: Mapping[str, Mapping[str, float]]
    images: int
    of: int
    part: str = ""

    @property
    def clean(self) -> float:
        return next(iter(self.accuracy.values()))["0"]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """{corruption: {severity: accuracy}}, ready for JSON, and under `about` what it rests on."""
        return {
            **{name: dict(row) for name, row in self.accuracy.items()},
            "about": {"part": self.part, "images": self.images, "of": self.of, "seed": _SEED},
        }

    def lines(self, split: str) -> Iterator[str]:
        """For a terminal, under names that a script may look for."""
        for name, row in self.accuracy.items():
            yield f"{split} accuracy_{name} {' '.join(f'{row[str(severity)]:.4f}' for severity in SEVERITIES)}"
        chosen = (
            f"{self.images} of the {self.of} images, every class in its share"
            if self.images < self.of
            else f"{self.images} images"
        )
        yield f"the {len(self.accuracy)} corruptions at severities 1 to 3 on {chosen}; uncorrupted {self.clean:.4f}"

    def write(self, directory: Path, title: str) -> None:
        """Write robustness.json and robustness.png; StorageError where the disk refuses."""
        write_text(directory / "robustness.json", json.dumps(self.as_dict(), indent=2) + "\n")
        plot_robustness(self.accuracy, self.images, directory / "robustness.png", title)


def measure_robustness(
    predictor: Predictor, paths: Sequence[Path], targets: np.ndarray, most: int, part: str = ""
) -> Robustness:
    """Accuracy of the predictor on at most `most` of the images of a part, class indices [N], under each corruption.

    Each image has random numbers of its own, so neither batches nor the other images change the figures.

    Raises:
        UnreadableImage: The first image that cannot be read.
    """
    rows = stratified(targets, most)
    hits = dict.fromkeys([("", 0), *product(CORRUPTIONS, SEVERITIES)], 0)
    log.info("robustness: %d passes over %d images", len(hits), len(rows))
    with ThreadPoolExecutor(predictor.workers) as pool:
        for start in range(0, len(rows), predictor.batch_size):
            batch = rows[start : start + predictor.batch_size]
            pixels = [_readable(item) for item in pool.map(predictor.read, [paths[row] for row in batch])]
            for name, severity in hits:
                seen = list(pool.map(partial(_corrupted, name, severity), pixels, batch.tolist()))
                hits[name, severity] += int((predictor.logits(seen).argmax(axis=1) == targets[batch]).sum())
    clean = hits["", 0] / len(rows)
    accuracy = {
        name: {"0": clean, **{str(step): hits[name, step] / len(rows) for step in SEVERITIES}} for name in CORRUPTIONS
    }
    return Robustness(accuracy, len(rows), len(targets), part)


def stratified(targets: np.ndarray, most: int) -> np.ndarray:
    """Positions int64, ascending, of at most `most` images of class indices [N]: every class in its share, which ones by a fixed seed."""
    if len(targets) <= most:
        return np.arange(len(targets))
    random = np.random.default_rng(_SEED)
    shuffled = random.permutation(len(targets))
    place = np.empty(len(targets), dtype=np.float64)
    for code in np.unique(targets):
        mine = shuffled[targets[shuffled] == code]
        place[mine] = (np.arange(len(mine)) + random.random()) / len(mine)  # its share of the class comes before it
    return np.sort(np.argsort(place, kind="stable")[:most])


def _readable(item: np.ndarray | UnreadableImage) -> np.ndarray:
    if isinstance(item, UnreadableImage):
        raise item
    return item


def _corrupted(name: str, severity: int, pixels: np.ndarray, row: int) -> np.ndarray:
    """One image made worse, by random numbers that are its own: the same sign at each severity."""
    return CORRUPTIONS[name](pixels, severity, np.random.default_rng([_SEED, row])) if name else pixels
