"""The seam: a backend turns pixels into logits; everything around it exists once, here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from image_classifier.errors import UnreadableImage
from image_classifier.images import DEFAULT_LIMITS, DecodeLimits, Preprocess
from image_classifier.records import Prediction, PredictionTable, softmax


class Backend(Protocol):
    """Anything that turns pixels uint8 [N, 3, H, W] into logits float32 [N, C]."""

    def logits(self, pixels: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Predictor:
    """Images to Predictions: decode, preprocess, batch, ask the backend, softmax(logits / temperature)."""

    backend: Backend
    classes: tuple[str, ...]
    preprocess: Preprocess
    temperature: float = 1.0
    batch_size: int = 64
    workers: int = 2
    limits: DecodeLimits = DEFAULT_LIMITS

    def predict(self, paths: Iterable[Path]) -> Iterator[Prediction]:
        """One Prediction an image, in order; an unreadable image gets its reason instead of an answer."""
        for batch, pixels in self._batches(paths):
            readable = [row for row, item in enumerate(pixels) if isinstance(item, np.ndarray)]
            logits = self.logits([pixels[row] for row in readable])  # type: ignore[misc]
            answers = iter(softmax(logits, self.temperature)) if readable else iter(())
            for path, item in zip(batch, pixels, strict=True):
                yield Prediction(str(path), error=item.reason) if isinstance(item, UnreadableImage) else self._prediction(path, next(answers))

    def table(self, paths: Sequence[Path], names: Sequence[str], targets: np.ndarray) -> PredictionTable:
        """Logits and temperature for labelled images, named `names`; UnreadableImage for the first that cannot be read."""
        parts: list[np.ndarray] = [np.empty((0, len(self.classes)), np.float32)]
        for _, pixels in self._batches(paths):
            for item in pixels:
                if isinstance(item, UnreadableImage):
                    raise item
            parts.append(self.logits([item for item in pixels if isinstance(item, np.ndarray)]))
        return PredictionTable(tuple(names), targets, np.concatenate(parts), self.classes, self.temperature)

    def logits(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Logits float32 [N, C] of preprocessed images uint8 [S, S, 3]."""
        if not pixels:
            return np.empty((0, len(self.classes)), np.float32)
        return self.backend.logits(np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2)))

    def read(self, path: Path) -> np.ndarray | UnreadableImage:
        """The preprocessed pixels uint8 [S, S, 3] of one file, or why there are none."""
        try:
            return self.preprocess.read(path, self.limits)
        except UnreadableImage as error:
            return error

    def _batches(self, paths: Iterable[Path]) -> Iterator[tuple[list[Path], list[np.ndarray | UnreadableImage]]]:
        """Batches of images, the next one being decoded while the backend works on this one."""
        source = iter(paths)
        with ThreadPoolExecutor(self.workers) as pool:
            batch = list(islice(source, self.batch_size))
            waiting = [pool.submit(self.read, path) for path in batch]
            while batch:
                upcoming = list(islice(source, self.batch_size))
                following = [pool.submit(self.read, path) for path in upcoming]
                yield batch, [future.result() for future in waiting]
                batch, waiting = upcoming, following

    def _prediction(self, path: Path, probabilities: np.ndarray) -> Prediction:
        if not np.isfinite(probabilities).all():
            return Prediction(str(path), error="the model answers with numbers that are not finite")
        top = int(probabilities.argmax())
        return Prediction(str(path), self.classes[top], float(probabilities[top]), dict(zip(self.classes, probabilities.tolist(), strict=True)))
