"""The gate of every export: the same images must get the same answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from image_classifier.errors import ParityError
from image_classifier.predictions import softmax

TOLERANCE = 1e-4


def check_parity(expected: np.ndarray, actual: np.ndarray, paths: Sequence[str], backend: str, tolerance: float = TOLERANCE) -> float:
    """The largest difference of a probability between two backends' logits [N, C] on the same images.

    Raises:
        ParityError: An image gets another class, or a probability differs by more than `tolerance`; it names the worst image.
    """
    if expected.shape != actual.shape:
        raise ParityError(f"{backend} returns logits of shape {actual.shape} instead of {expected.shape}", "nothing was exported")
    differences = np.abs(softmax(expected) - softmax(actual)).max(axis=1)
    differences = np.where(np.isfinite(differences), differences, np.inf)
    wrong = expected.argmax(axis=1) != actual.argmax(axis=1)
    if wrong.any():
        worst = int(np.flatnonzero(wrong)[differences[wrong].argmax()])
        raise ParityError(
            f"{backend} gives another class on {int(wrong.sum())} of {len(paths)} images, first {paths[worst]!r}", "nothing was exported"
        )
    worst = int(differences.argmax())
    if differences[worst] > tolerance:
        raise ParityError(
            f"{backend} differs by {differences[worst]:.2g} in a probability on {paths[worst]!r} (allowed {tolerance:g})", "nothing was exported"
        )
    return float(differences[worst])


def check_embeddings(expected: np.ndarray, actual: np.ndarray, paths: Sequence[str], backend: str, tolerance: float = 10 * TOLERANCE) -> float:
    """The largest distance between two backends' embeddings [N, D] of the same images, as a share of the longest.

    Raises:
        ParityError: It is more than `tolerance`; it names the worst image.
    """
    if expected.shape != actual.shape:
        raise ParityError(f"{backend} returns embeddings of shape {actual.shape} instead of {expected.shape}", "nothing was exported")
    distances = np.linalg.norm(expected - actual, axis=1) / max(float(np.linalg.norm(expected, axis=1).max()), 1e-12)
    distances = np.where(np.isfinite(distances), distances, np.inf)
    worst = int(distances.argmax())
    if distances[worst] > tolerance:
        raise ParityError(
            f"{backend} differs by {distances[worst]:.2g} in the embedding of {paths[worst]!r} (allowed {tolerance:g})", "nothing was exported"
        )
    return float(distances[worst])
