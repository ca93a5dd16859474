"""The golden images that a bundle keeps, and whether a backend still answers them as the checkpoint did."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from image_classifier.bundle import Bundle, read_arrays
from image_classifier.errors import CheckpointError
from image_classifier.inference.predictor import Backend
from image_classifier.predictions import softmax

_MOST_IMAGES = 64  # a backend answers all of them at once; training keeps 8


@dataclass(frozen=True)
class Golden:
    """Preprocessed images uint8 [N, 3, S, S] that a bundle keeps, and the checkpoint's logits [N, C] and embeddings [N, D] for them."""

    pixels: np.ndarray
    logits: np.ndarray
    embeddings: np.ndarray

    @classmethod
    def of(cls, bundle: Bundle) -> Golden:
        """Those of a bundle; CheckpointError where golden.npz is damaged, or of another model."""
        golden = cls(
            **read_arrays(
                bundle.path("golden.npz"),
                {"pixels": ("uint8", 4), "logits": ("float32", 2), "embeddings": ("float32", 2)},
            )
        )
        count, classes, side = len(golden.pixels), len(bundle.info.classes), bundle.info.preprocess.get("size")
        if (
            count > _MOST_IMAGES
            or golden.pixels.shape[1:] != (3, side, side)
            or golden.logits.shape != (count, classes)
            or len(golden.embeddings) != count
        ):
            shapes = f"pixels {list(golden.pixels.shape)}, logits {list(golden.logits.shape)}, embeddings {list(golden.embeddings.shape)}"
            raise CheckpointError(
                f"golden.npz of {str(bundle.directory)!r} is of another model ({shapes})", "copy the bundle anew"
            )
        return golden


@dataclass(frozen=True)
class Check:
    """What one backend answers for the golden images: share of equal classes, largest difference of a probability, milliseconds an image."""

    backend: str
    images: int
    agreement: float
    largest_difference: float
    milliseconds: float

    def fails(self, tolerance: float, least_agreement: float = 1.0) -> bool:
        """Whether fewer images get the checkpoint's class than must, or a probability differs by more than `tolerance`."""
        return self.agreement < least_agreement or not self.largest_difference <= tolerance


def checked(name: str, backend: Backend, golden: Golden, temperature: float) -> Check:
    """What a backend answers for the golden images, and how fast, once warm."""
    actual = backend.logits(golden.pixels)
    start = time.perf_counter()
    backend.logits(golden.pixels)
    seconds = (time.perf_counter() - start) / len(golden.pixels)
    if actual.shape != golden.logits.shape:
        return Check(name, len(golden.pixels), 0.0, float("inf"), 1000 * seconds)
    difference = np.abs(softmax(actual, temperature) - softmax(golden.logits, temperature)).max()
    agreement = float((actual.argmax(axis=1) == golden.logits.argmax(axis=1)).mean())
    return Check(
        name,
        len(golden.pixels),
        agreement,
        float(difference) if np.isfinite(difference) else float("inf"),
        1000 * seconds,
    )
