"""The parity gate of every export: the same images must get the same answers as from the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from image_classifier.errors import ParityError
from image_classifier.predictions import softmax

TOLERANCE = 1e-4
_NOT_EXPORTED = "nothing was exported"


@dataclass(frozen=True)
class Parity:
    """The comparison of two backends' probabilities on the same images. Its fields are in bundle.json.

    Args:
        images: Number of images.
        agreement: Share of them that get the same class, 0..1.
        largest_difference: Of a probability; infinite where one is not a number.
        worst_image: The image with the largest difference, among those with another class where there are any.
    """

    images: int
    agreement: float
    largest_difference: float
    worst_image: str

    @classmethod
    def of(cls, expected: np.ndarray, actual: np.ndarray, paths: Sequence[str], backend: str) -> Parity:
        """Compare probabilities [N, C]; ParityError where their shapes differ.

        >>> import numpy as np
        >>> Parity.of(np.array([[0.9, 0.1]]), np.array([[0.4, 0.6]]), ["a.png"], "onnx")
        Parity(images=1, agreement=0.0, largest_difference=0.5, worst_image='a.png')
        """
        if expected.shape != actual.shape:
            raise ParityError(
                f"{backend} answers in the shape {actual.shape} instead of {expected.shape}", _NOT_EXPORTED
            )
        # The largest difference of each image, [N]; what is not a number counts as infinite.
        differences = np.abs(expected - actual).max(axis=1)
        differences = np.where(np.isfinite(differences), differences, np.inf)
        # An image agrees where both give it the same class.
        same = (expected.argmax(axis=1) == actual.argmax(axis=1)) & np.isfinite(differences)
        # Probabilities differ by at most 1: adding 2 puts images with another class first.
        worst = int(np.where(same, differences, differences + 2).argmax())
        return cls(len(paths), float(same.mean()), float(differences.max()), paths[worst])

    def check(self, backend: str, tolerance: float = TOLERANCE, agreement: float = 1.0) -> Parity:
        """Return itself.

        Raises:
            ParityError: Too few images get the same class, or a probability differs by more than `tolerance`; it names
                the worst image.
        """
        if self.agreement < agreement:
            wrong = round((1 - self.agreement) * self.images)
            raise ParityError(
                f"{backend} gives another class on {wrong} of {self.images} images, worst on {self.worst_image!r}",
                _NOT_EXPORTED,
            )
        if not self.largest_difference <= tolerance:
            raise ParityError(
                f"{backend} differs by {self.largest_difference:.2g} in a probability on {self.worst_image!r} "
                f"(allowed {tolerance:g})",
                _NOT_EXPORTED,
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        difference = f"probabilities differ by at most {self.largest_difference:.1e} ({self.worst_image})"
        return f"{self.agreement:.2%} of {self.images} images get the same class, {difference}"


def check_parity(
    expected: np.ndarray, actual: np.ndarray, paths: Sequence[str], backend: str, tolerance: float = TOLERANCE
) -> float:
    """Return the largest difference of a probability between two backends' logits [N, C] on the same images.

    Raises:
        ParityError: As `Parity.check`.
    """
    if expected.shape != actual.shape:
        raise ParityError(
            f"{backend} returns logits of shape {actual.shape} instead of {expected.shape}", _NOT_EXPORTED
        )
    return Parity.of(softmax(expected), softmax(actual), paths, backend).check(backend, tolerance).largest_difference


def check_embeddings(
    expected: np.ndarray, actual: np.ndarray, paths: Sequence[str], backend: str, tolerance: float = 10 * TOLERANCE
) -> float:
    """Return the largest distance between two backends' embeddings [N, D] of the same images, relative to the longest.

    Raises:
        ParityError: It is more than `tolerance`; it names the worst image.
    """
    if expected.shape != actual.shape:
        raise ParityError(
            f"{backend} returns embeddings of shape {actual.shape} instead of {expected.shape}", _NOT_EXPORTED
        )
    longest = max(float(np.linalg.norm(expected, axis=1).max()), 1e-12)
    distances = np.linalg.norm(expected - actual, axis=1) / longest
    distances = np.where(np.isfinite(distances), distances, np.inf)
    worst = int(distances.argmax())
    if distances[worst] > tolerance:
        raise ParityError(
            f"{backend} differs by {distances[worst]:.2g} in the embedding of {paths[worst]!r} (allowed {tolerance:g})",
            _NOT_EXPORTED,
        )
    return float(distances[worst])
