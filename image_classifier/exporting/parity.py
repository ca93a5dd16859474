"""The gate of every export: the same images must get the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from image_classifier.errors import ParityError
from image_classifier.predictions import softmax

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """How two backends' probabilities compare on the same images.

    Args:
        images: How many.
        agreement: Share of them that get the same class.
        largest_difference: Of a probability; infinite where one is no number.
        worst_image: Where that is.
    """

    images: int
    agreement: float
    largest_difference: float
    worst_image: str

    @classmethod
    def of(cls, expected: np.ndarray, actual: np.ndarray, paths: Sequence[str], backend: str) -> Parity:
        """Compare probabilities [N, C]; ParityError where their shapes differ."""
        if expected.shape != actual.shape:
            raise ParityError(
                f"{backend} answers in the shape {actual.shape} instead of {expected.shape}", "nothing was exported"
            )
        differences = np.abs(expected - actual).max(axis=1)
        differences = np.where(np.isfinite(differences), differences, np.inf)
        same = (expected.argmax(axis=1) == actual.argmax(axis=1)) & np.isfinite(differences)
        worst = int(
            np.where(same, differences, differences + 2).argmax()
        )  # of those with another class, if there are any
        return cls(len(paths), float(same.mean()), float(differences.max()), paths[worst])

    def check(self, backend: str, tolerance: float = TOLERANCE, agreement: float = 1.0) -> Parity:
        """Itself.

        Raises:
            ParityError: Fewer than that share get the same class, or a probability differs by more than `tolerance`; the worst image is named.
        """
        if self.agreement < agreement:
            wrong = round((1 - self.agreement) * self.images)
            raise ParityError(
                f"{backend} gives another class on {wrong} of {self.images} images, worst on {self.worst_image!r}",
                "nothing was exported",
            )
        if not self.largest_difference <= tolerance:
            fact = f"{backend} differs by {self.largest_difference:.2g} in a probability on {self.worst_image!r} (allowed {tolerance:g})"
            raise ParityError(fact, "nothing was exported")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        difference = f"largest difference of a probability {self.largest_difference:.1e} ({self.worst_image})"
        return f"{self.agreement:.2%} of {self.images} images get the same class, {difference}"


def check_parity(
    expected: np.ndarray, actual: np.ndarray, paths: Sequence[str], backend: str, tolerance: float = TOLERANCE
) -> float:
    """The largest difference of a probability between two backends' logits [N, C] on the same images; ParityError as `Parity.check`."""
    if expected.shape != actual.shape:
        raise ParityError(
            f"{backend} returns logits of shape {actual.shape} instead of {expected.shape}", "nothing was exported"
        )
    return Parity.of(softmax(expected), softmax(actual), paths, backend).check(backend, tolerance).largest_difference


def check_embeddings(
    expected: np.ndarray, actual: np.ndarray, paths: Sequence[str], backend: str, tolerance: float = 10 * TOLERANCE
) -> float:
    """The largest distance between two backends' embeddings [N, D] of the same images, as a share of the longest.

    Raises:
        ParityError: It is more than `tolerance`; it names the worst image.
    """
    if expected.shape != actual.shape:
        raise ParityError(
            f"{backend} returns embeddings of shape {actual.shape} instead of {expected.shape}", "nothing was exported"
        )
    distances = np.linalg.norm(expected - actual, axis=1) / max(float(np.linalg.norm(expected, axis=1).max()), 1e-12)
    distances = np.where(np.isfinite(distances), distances, np.inf)
    worst = int(distances.argmax())
    if distances[worst] > tolerance:
        raise ParityError(
            f"{backend} differs by {distances[worst]:.2g} in the embedding of {paths[worst]!r} (allowed {tolerance:g})",
            "nothing was exported",
        )
    return float(distances[worst])
