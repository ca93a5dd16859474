"""The seam: a backend turns pixels into logits; everything around it exists once, here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np

from image_classifier.errors import UnreadableImage
from image_classifier.evaluation.decision import Decision
from image_classifier.evaluation.ood import Detector, looks
from image_classifier.images import DEFAULT_LIMITS, DecodeLimits, Preprocess
from image_classifier.predictions import Prediction, PredictionTable, softmax


class Backend(Protocol):
    """Anything that turns pixels uint8 [N, 3, H, W] into logits float32 [N, C]."""

    def logits(self, pixels: np.ndarray) -> np.ndarray: ...


class EmbeddingBackend(Backend, Protocol):
    """A backend that also gives the embeddings float32 [N, D] of the images as they are."""

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@runtime_checkable
class Shaped(Protocol):
    """A backend whose file says for which squares and classes it was made."""

    def check(self, size: int, num_classes: int) -> None:
        """CheckpointError where it was made for others."""


@dataclass(frozen=True)
class Predictor:
    """Images to Predictions: decode, preprocess, batch, ask the backend, softmax(logits / temperature), label or abstain.

    With a `detector` the backend must be an EmbeddingBackend.
    """

    backend: Backend
    classes: tuple[str, ...]
    preprocess: Preprocess
    temperature: float = 1.0
    batch_size: int = 64
    workers: int = 2
    limits: DecodeLimits = DEFAULT_LIMITS
    decision: Decision | None = None
    detector: Detector | None = None

    def predict(self, paths: Iterable[Path]) -> Iterator[Prediction]:
        """One Prediction an image, in order; an unreadable image gets its reason instead of an answer."""
        for batch, pixels in self._batches(paths):
            readable = [(str(path), item) for path, item in zip(batch, pixels, strict=True) if isinstance(item, np.ndarray)]
            answers = iter(self.answers([path for path, _ in readable], [item for _, item in readable]))
            for path, item in zip(batch, pixels, strict=True):
                yield Prediction(str(path), error=item.reason) if isinstance(item, UnreadableImage) else next(answers)

    def answers(self, names: Sequence[str], pixels: Sequence[np.ndarray]) -> list[Prediction]:
        """The Predictions of preprocessed images uint8 [S, S, 3], under these names."""
        logits, scores = self.judge(pixels)
        probabilities = softmax(logits, self.temperature) if len(logits) else logits
        given = [None] * len(logits) if scores is None else scores.tolist()
        return [self._prediction(name, *answer) for name, *answer in zip(names, probabilities, given, strict=True)]

    def table(self, paths: Sequence[Path], names: Sequence[str], targets: np.ndarray) -> PredictionTable:
        """What is said of labelled images, named `names`; UnreadableImage for the first that cannot be read."""
        parts = [self.judge([])]
        for _, pixels in self._batches(paths):
            for item in pixels:
                if isinstance(item, UnreadableImage):
                    raise item
            parts.append(self.judge([item for item in pixels if isinstance(item, np.ndarray)]))
        logits = np.concatenate([part for part, _ in parts])
        scores = None if self.detector is None else np.concatenate([part for _, part in parts if part is not None])
        return PredictionTable(tuple(names), targets, logits, self.classes, self.temperature, scores)

    def judge(self, pixels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits float32 [N, C] of preprocessed images uint8 [S, S, 3], and with a detector their out-of-distribution scores float32 [N]."""
        if self.detector is None:
            return self.logits(pixels), None
        if not pixels:
            return self.logits(pixels), np.empty(0, np.float32)
        batch = _batch(pixels)
        logits, embeddings = cast(EmbeddingBackend, self.backend).logits_and_embeddings(batch)
        return logits, self.detector.scores(embeddings, looks(batch))

    def logits(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Logits float32 [N, C] of preprocessed images uint8 [S, S, 3]."""
        return self.backend.logits(_batch(pixels)) if pixels else np.empty((0, len(self.classes)), np.float32)

    def read(self, source: Path | bytes) -> np.ndarray | UnreadableImage:
        """The preprocessed pixels uint8 [S, S, 3] of one file or its bytes, or why there are none."""
        try:
            return self.preprocess.read(source, self.limits)
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

    def _prediction(self, path: str, probabilities: np.ndarray, ood_score: float | None) -> Prediction:
        if not np.isfinite(probabilities).all():
            return Prediction(path, error="the model answers with numbers that are not finite")
        top, ranked = int(probabilities.argmax()), dict(zip(self.classes, probabilities.tolist(), strict=True))
        answer = Prediction(path, self.classes[top], float(probabilities[top]), ranked)
        if self.decision is None:
            return answer
        may_be = tuple(self.classes[code] for code in self.decision.prediction_set(probabilities))
        return replace(answer, reason=self.decision.reason(answer.confidence, ood_score), prediction_set=may_be)


def _batch(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Images uint8 [S, S, 3] as one array [N, 3, S, S]."""
    return np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))
