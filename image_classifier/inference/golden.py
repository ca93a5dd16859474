"""The golden images of a bundle, and the comparison of a backend's answers for them with the checkpoint's."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from image_classifier.bundle import Bundle, read_arrays
from image_classifier.errors import CheckpointError
from image_classifier.inference.predictor import Backend
from image_classifier.predictions import softmax

_MAX_IMAGES = 64  # a backend answers all of them in one batch; training keeps 8


@dataclass(frozen=True)
class Golden:
    """Preprocessed images uint8 [N, 3, S, S] of a bundle, and the checkpoint's logits [N, C] and embeddings [N, D]."""

    pixels: np.ndarray
    logits: np.ndarray
    embeddings: np.ndarray

    @classmethod
    def of(cls, bundle: Bundle) -> Golden:
        """Return those of a bundle; CheckpointError where golden.npz is damaged, or of another model."""
        golden = cls(
            **read_arrays(
                bundle.path("golden.npz"),
                {"pixels": ("uint8", 4), "logits": ("float32", 2), "embeddings": ("float32", 2)},
            )
        )
        count = len(golden.pixels)
        classes = len(bundle.info.classes)
        side = bundle.info.preprocess.get("size")
        if (
            count > _MAX_IMAGES
            or golden.pixels.shape[1:] != (3, side, side)
            or golden.logits.shape != (count, classes)
            or len(golden.embeddings) != count
        ):
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in vars(golden).items())
            raise CheckpointError(
                f"golden.npz of {str(bundle.directory)!r} belongs to another model ({shapes})", "copy the bundle again"
            )
        return golden


@dataclass(frozen=True)
class Check:
    """A backend's answers for the golden images, compared with the checkpoint's.

    Args:
        agreement: Share of images that get the same class, 0..1.
        largest_difference: Of a probability; infinite where one is not a number or the shapes differ.
        milliseconds: For one image, in a batch of all golden images.
    """

    backend: str
    images: int
    agreement: float
    largest_difference: float
    milliseconds: float

    def fails(self, tolerance: float, min_agreement: float = 1.0) -> bool:
        """Return whether too few images get the checkpoint's class, or a probability differs by more than `tolerance`.

        >>> Check("onnx", 8, 1.0, 1e-5, 0.3).fails(1e-4), Check("onnx", 8, 1.0, float("inf"), 0.3).fails(1e-4)
        (False, True)
        """
        return self.agreement < min_agreement or not self.largest_difference <= tolerance


def check_golden(name: str, backend: Backend, golden: Golden, temperature: float) -> Check:
    """Compare a backend's answers for the golden images with the checkpoint's, and time it once it is warm."""
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
