"""Classes of unequal size: drawn equally often, or weighed in the loss. Only rows of the train part are looked at, and nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def balanced_rows(rows: np.ndarray, targets: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """As many rows as there are, classes equally often, int64 [N], in a random order decided by (seed, epoch).

    Each class deals its own rows like a deck of cards that is shuffled when it is used up, and goes on dealing where the last epoch
    stopped: no image comes twice before all of its class have come once.

    Args:
        rows: Rows of the train part, int64 [N].
        targets: Their classes, int64 [N].
        seed: Of the run.
        epoch: Counted from 0.
    """
    present = np.unique(targets)
    place = np.random.default_rng((seed, 0, 0, 1)).permutation(len(present)).tolist()
    drawn = []
    for code, rank in zip(present.tolist(), place, strict=True):
        # The remainder of N / C goes round the classes; over all of them these floors add up to N each epoch (Hermite's identity).
        first, last = ((number * len(rows) + rank) // len(present) for number in (epoch, epoch + 1))
        drawn += list(_dealt(rows[targets == code], code, first, last, seed))
    return np.random.default_rng((seed, epoch)).permutation(np.concatenate(drawn))


def _dealt(deck: np.ndarray, code: int, first: int, last: int, seed: int) -> Iterator[np.ndarray]:
    """Cards `first` to `last` of a class's endless deal."""
    while first < last:
        cycle, start = divmod(first, len(deck))
        stop = min(len(deck), start + last - first)
        yield np.random.default_rng((seed, code, cycle, 2)).permutation(deck)[start:stop]
        first += stop - start


def class_weights(targets: np.ndarray, num_classes: int) -> np.ndarray:
    """Weights inverse to the classes' frequencies, float32 [C], their mean over the images 1; 0 for a class without images."""
    counts = np.bincount(targets, minlength=num_classes)
    weights = len(targets) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0.0).astype(np.float32)


def describe(choice: str, targets: np.ndarray, classes: tuple[str, ...]) -> str:
    """One line for the log: the choice, and the smallest and the largest class of the train part."""
    counts = np.bincount(targets, minlength=len(classes))
    small, large = int(counts.argmin()), int(counts.argmax())
    if counts[small] == counts[large]:
        return f"balance: {choice} (every class has {counts[small]} training images)"
    return f"balance: {choice} (training images a class: {counts[small]} of {classes[small]!r} to {counts[large]} of {classes[large]!r})"
