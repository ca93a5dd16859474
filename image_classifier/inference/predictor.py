"""The seam: a backend turns pixels into logits; everything around it exists once, here."""

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

_AHEAD_BYTES = 2**28  # of archives, read and not decoded yet


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


def check_shapes(found: Mapping[str, Sequence[object]], size: int, num_classes: int, path: Path) -> None:
    """CheckpointError where pixels or logits of a graph have other sizes, but for the batch, than of such squares and so many classes.

    Sizes that are no integers are open.
    """
    for name, expected in {"pixels": [3, size, size], "logits": [num_classes]}.items():
        own = list(found[name])[1:]
        if len(own) != len(expected) or any(
            isinstance(side, int) and side != due for side, due in zip(own, expected, strict=True)
        ):
            raise CheckpointError(
                f"{name} of {str(path)!r} has the shape {own} an image, not {expected}", "use the bundle it came from"
            )


@dataclass(frozen=True)
class Predictor:
    """Images to Predictions: decode, preprocess, batch, ask the backend, softmax(logits / temperature), label or abstain.

    With a `detector` the backend must be an EmbeddingBackend. A confidence below `threshold` is an abstention, beside those of `decision`.
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
        """One Prediction an image, in order; an unreadable image gets its reason instead of an answer."""
        return (prediction for prediction, _ in self.answers(map(ImageSource.file, paths)))

    def answers(self, items: Iterable[ImageSource], keep: bool = False) -> Iterator[tuple[Prediction, Content]]:
        """The Prediction of each item, in order, and its file, or with `keep` its bytes where it has none (else b"")."""
        for batch in self._batches(items, keep):
            readable = [(name, pixels) for name, _, pixels in batch if isinstance(pixels, np.ndarray)]
            found = iter(self.predictions([name for name, _ in readable], [pixels for _, pixels in readable]))
            for name, content, pixels in batch:
                yield (
                    (Prediction(name, error=pixels.reason) if isinstance(pixels, UnreadableImage) else next(found)),
                    content,
                )

    def predictions(self, names: Sequence[str], pixels: Sequence[np.ndarray]) -> list[Prediction]:
        """The Predictions of preprocessed images uint8 [S, S, 3], under these names."""
        return self.named(names, *self.judge(pixels))

    def named(self, names: Sequence[str], logits: np.ndarray, scores: np.ndarray | None) -> list[Prediction]:
        """The Predictions that logits [N, C] and, with a detector, out-of-distribution scores [N] of images of these names mean."""
        probabilities = softmax(logits, self.temperature) if len(logits) else logits
        given = [None] * len(logits) if scores is None else scores.tolist()
        return [self._prediction(name, *answer) for name, *answer in zip(names, probabilities, given, strict=True)]

    def table(self, paths: Sequence[Path], names: Sequence[str], targets: np.ndarray) -> PredictionTable:
        """What is said of labelled images, named `names`; UnreadableImage for the first that cannot be read."""
        parts = [self.judge([])]
        for batch in self._batches(map(ImageSource.file, paths)):
            for _, _, pixels in batch:
                if isinstance(pixels, UnreadableImage):
                    raise pixels
            parts.append(self.judge([pixels for _, _, pixels in batch if isinstance(pixels, np.ndarray)]))
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

    def read(self, source: Content) -> np.ndarray | UnreadableImage:
        """The preprocessed pixels uint8 [S, S, 3] of one file or its bytes, or why there are none."""
        try:
            return self.preprocess.read(source, self.limits)
        except UnreadableImage as error:
            return error

    def _batches(self, items: Iterable[ImageSource], keep: bool = False) -> Iterator[list[_Read]]:
        """Batches of images; while the backend works on one, the next is decoded, and no more than that is read ahead."""
        source = iter(items)
        pool = ThreadPoolExecutor(self.workers)
        waiting: deque[Future[_Read]] = deque()
        unread: dict[Future[_Read], int] = {}
        try:
            while True:
                for item in islice(source, 2 * self.batch_size - len(waiting)):
                    waiting.append(pool.submit(self._read, item, keep))
                    if isinstance(item.source, bytes):
                        unread = _few({**unread, waiting[-1]: len(item.source)})
                if not waiting:
                    return
                yield [waiting.popleft().result() for _ in range(min(self.batch_size, len(waiting)))]
        finally:
            pool.shutdown(
                wait=False, cancel_futures=True
            )  # after Ctrl-C nobody waits for what a server has not sent yet

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
        top, ranked = int(probabilities.argmax()), dict(zip(self.classes, probabilities.tolist(), strict=True))
        confidence = float(probabilities[top])
        unsure = (
            f"not sure enough: confidence {confidence:.3f}, the limit is {self.threshold:.3f}"
            if confidence < self.threshold
            else ""
        )
        if self.decision is None:
            return Prediction(name, self.classes[top], confidence, ranked, reason=unsure)
        may_be = tuple(self.classes[code] for code in self.decision.prediction_set(probabilities))
        reason = self.decision.reason(confidence, ood_score) or unsure
        return Prediction(name, self.classes[top], confidence, ranked, reason=reason, prediction_set=may_be)


# An image's name, its content (as `answers` gives it) and its pixels uint8 [S, S, 3], or why there are none.
_Read = tuple[str, Content, np.ndarray | UnreadableImage]


def _few(unread: dict[Future[_Read], int]) -> dict[Future[_Read], int]:
    """Those that are not decoded yet, with the bytes of each: after a wait where they are more than may lie in memory."""
    while True:
        unread = {future: size for future, size in unread.items() if not future.done()}
        if sum(unread.values()) <= _AHEAD_BYTES:
            return unread
        wait(unread, return_when=FIRST_COMPLETED)


def _batch(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Images uint8 [S, S, 3] as one array [N, 3, S, S]."""
    return np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))
