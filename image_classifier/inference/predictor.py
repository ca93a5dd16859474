"""The predictor: everything around a backend, which only turns pixels into logits. It exists once, for all backends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np

from image_classifier.cpu import usable_cores
from image_classifier.errors import CheckpointError, UnreadableImage
from image_classifier.evaluation.reliability.abstention import Decision
from image_classifier.evaluation.reliability.ood import Detector, looks
from image_classifier.images import DEFAULT_LIMITS, DecodeLimits, Preprocess
from image_classifier.predictions import Prediction, PredictionTable, softmax
from image_classifier.sources.image_source import Content, ImageSource

_MAX_UNDECODED_BYTES = 2**28  # of images in archives, read and not decoded yet


class Backend(Protocol):
    """Anything that turns pixels uint8 [N, 3, H, W] into logits float32 [N, C]."""

    def logits(self, pixels: np.ndarray) -> np.ndarray: ...


class EmbeddingBackend(Backend, Protocol):
    """A backend that also returns the embeddings float32 [N, D] of the images."""

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@runtime_checkable
class Shaped(Protocol):
    """A backend whose file fixes the side of its squares and the number of its classes."""

    def check(self, size: int, num_classes: int) -> None:
        """Raise CheckpointError where it was made for others."""


def check_shapes(shapes: Mapping[str, Sequence[object]], size: int, num_classes: int, path: Path) -> None:
    """Raise CheckpointError where `pixels` or `logits` of a graph do not have the shape of such squares or classes.

    The first side, the batch, is not compared; sides that are not integers are open and fit any size.
    """
    for name, expected in {"pixels": [3, size, size], "logits": [num_classes]}.items():
        actual = list(shapes[name])[1:]
        if len(actual) != len(expected) or any(
            isinstance(side, int) and side != due for side, due in zip(actual, expected, strict=True)
        ):
            raise CheckpointError(
                f"{name} of {str(path)!r} has the shape {actual} per image, not {expected}",
                "use the bundle it came from",
            )


@dataclass(frozen=True)
class Predictor:
    """From images to Predictions.

    Decode, preprocess, batch, run the backend, softmax(logits / temperature), label or abstain.

    Args:
        workers: Threads that decode.
        limits: Limits of one file, checked before it is decoded.
        decision: When the model abstains, and its prediction sets.
        detector: Scores how unlike the training's an image is; then the backend must be an EmbeddingBackend.
        threshold: A confidence below it is an abstention, in addition to those of `decision`.
    """

    backend: Backend
    classes: tuple[str, ...]
    preprocess: Preprocess
    temperature: float = 1.0
    batch_size: int = 64
    workers: int = field(default_factory=usable_cores)
    limits: DecodeLimits = DEFAULT_LIMITS
    decision: Decision | None = None
    detector: Detector | None = None
    threshold: float = 0.0
    backend_name: str = ""

    def predict(self, paths: Iterable[Path]) -> Iterator[Prediction]:
        """Yield one Prediction an image, in order; an unreadable image gets the reason instead of an answer."""
        return (prediction for prediction, _ in self.answers(map(ImageSource.file, paths)))

    def answers(self, items: Iterable[ImageSource], keep: bool = False) -> Iterator[tuple[Prediction, Content]]:
        """Yield the Prediction of each item, in order, and its content.

        The content is the file; of an item without one its bytes with `keep`, else b"".
        """
        for batch in self._batches(items, keep):
            readable = [(name, pixels) for name, _, pixels in batch if isinstance(pixels, np.ndarray)]
            answered = iter(self.predictions([name for name, _ in readable], [pixels for _, pixels in readable]))
            for name, content, pixels in batch:
                if isinstance(pixels, UnreadableImage):
                    yield Prediction(name, error=pixels.reason), content
                else:
                    yield next(answered), content

    def predictions(self, names: Sequence[str], pixels: Sequence[np.ndarray]) -> list[Prediction]:
        """Return the Predictions of preprocessed images uint8 [S, S, 3], under these names."""
        return self.to_predictions(names, *self.logits_and_scores(pixels))

    def to_predictions(self, names: Sequence[str], logits: np.ndarray, scores: np.ndarray | None) -> list[Prediction]:
        """Return the Predictions for logits [N, C] and, with a detector, out-of-distribution scores [N]."""
        probabilities = softmax(logits, self.temperature) if len(logits) else logits
        ood_scores = [None] * len(logits) if scores is None else scores.tolist()
        rows = zip(names, probabilities, ood_scores, strict=True)
        return [self._prediction(name, row, score) for name, row, score in rows]

    def table(self, paths: Sequence[Path], names: Sequence[str], targets: np.ndarray) -> PredictionTable:
        """Return the answers for labelled images, named `names`; UnreadableImage for the first that cannot be read.

        `targets` are the indices of their classes, int64 [N].
        """
        answers = [self.logits_and_scores([])]  # of no image, so that the shapes are known where there is none
        for batch in self._batches(map(ImageSource.file, paths)):
            for _, _, pixels in batch:
                if isinstance(pixels, UnreadableImage):
                    raise pixels
            pixels_of_batch = [pixels for _, _, pixels in batch if isinstance(pixels, np.ndarray)]
            answers.append(self.logits_and_scores(pixels_of_batch))
        logits = np.concatenate([batch_logits for batch_logits, _ in answers])
        scores = None
        if self.detector is not None:
            scores = np.concatenate([batch_scores for _, batch_scores in answers if batch_scores is not None])
        return PredictionTable(tuple(names), targets, logits, self.classes, self.temperature, scores)

    def logits_and_scores(self, pixels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return logits float32 [N, C] of preprocessed images uint8 [S, S, 3].

        With a detector also their out-of-distribution scores float32 [N], else None.
        """
        if self.detector is None:
            return self.logits(pixels), None
        if not pixels:
            return self.logits(pixels), np.empty(0, np.float32)
        batch = _batch(pixels)
        logits, embeddings = cast(EmbeddingBackend, self.backend).logits_and_embeddings(batch)
        return logits, self.detector.scores(embeddings, looks(batch))

    def logits(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Return logits float32 [N, C] of preprocessed images uint8 [S, S, 3]."""
        return self.backend.logits(_batch(pixels)) if pixels else np.empty((0, len(self.classes)), np.float32)

    def read(self, source: Content) -> np.ndarray | UnreadableImage:
        """Return the preprocessed pixels uint8 [S, S, 3] of a file or its bytes, or why it cannot be read."""
        try:
            return self.preprocess.read(source, self.limits)
        except UnreadableImage as error:
            return error

    def _batches(self, items: Iterable[ImageSource], keep: bool = False) -> Iterator[list[_Read]]:
        """Yield batches of images; while the backend works on one, the next is decoded, and no more is read ahead."""
        source = iter(items)
        pool = ThreadPoolExecutor(self.workers)
        waiting: deque[Future[_Read]] = deque()  # in the order of the items
        undecoded: dict[Future[_Read], int] = {}  # bytes of images that came out of archives
        try:
            while True:
                # Keep two batches in the queue: one for the backend, one that is decoded meanwhile.
                for item in islice(source, 2 * self.batch_size - len(waiting)):
                    future = pool.submit(self._read, item, keep)
                    waiting.append(future)
                    # Bytes of an archive stay in memory until they are decoded: bound their sum.
                    if isinstance(item.source, bytes):
                        undecoded = _wait_for_memory({**undecoded, future: len(item.source)})
                if not waiting:
                    return
                # Results in order: a slow image holds up its batch, never the order of the answers.
                yield [waiting.popleft().result() for _ in range(min(self.batch_size, len(waiting)))]
        finally:
            # After Ctrl-C, do not wait for a server that has not sent its image yet.
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, item: ImageSource, keep: bool) -> _Read:
        try:
            content = item.content()
            pixels = self.preprocess.read(content, self.limits)
        except UnreadableImage as error:
            return item.name, b"", error
        return item.name, content if keep or isinstance(content, Path) else b"", pixels

    def _prediction(self, name: str, probabilities: np.ndarray, ood_score: float | None) -> Prediction:
        if not np.isfinite(probabilities).all():
            return Prediction(name, error="the model answers with numbers that are not finite")
        top = int(probabilities.argmax())
        by_class = dict(zip(self.classes, probabilities.tolist(), strict=True))
        confidence = float(probabilities[top])
        unsure = ""
        if confidence < self.threshold:
            unsure = f"not sure enough: confidence {confidence:.3f}, the limit is {self.threshold:.3f}"
        if self.decision is None:
            return Prediction(name, self.classes[top], confidence, by_class, reason=unsure)
        prediction_set = tuple(self.classes[code] for code in self.decision.prediction_set(probabilities))
        reason = self.decision.reason(confidence, ood_score) or unsure
        return Prediction(name, self.classes[top], confidence, by_class, reason=reason, prediction_set=prediction_set)


# An image's name, its content (as `answers` yields it) and its pixels uint8 [S, S, 3], or why it cannot be read.
_Read = tuple[str, Content, np.ndarray | UnreadableImage]


def _wait_for_memory(undecoded: dict[Future[_Read], int]) -> dict[Future[_Read], int]:
    """Return the images that are not decoded yet, with their bytes, once their sum is within the limit."""
    while True:
        undecoded = {future: size for future, size in undecoded.items() if not future.done()}
        if sum(undecoded.values()) <= _MAX_UNDECODED_BYTES:
            return undecoded
        wait(undecoded, return_when=FIRST_COMPLETED)


def _batch(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Return images uint8 [S, S, 3] as one array [N, 3, S, S]."""
    return np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))
