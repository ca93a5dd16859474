"""Classes of unequal size: drawn equally often, or weighed in the loss, by their training images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def balanced_rows(rows: np.ndarray, targets: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return as many rows as there are, each class equally often, int64 [N], in an order decided by (seed, epoch).

    Each class is drawn without replacement and shuffled again when it is used up; an epoch continues where the last
    one stopped. So no image comes twice before all images of its class have come once.

    Args:
        rows: Training rows, int64 [N].
        targets: Their classes, int64 [N].
        seed: Of the run.
        epoch: Counted from 0.

    >>> rows, targets = np.arange(6), np.array([0, 0, 0, 0, 0, 1])
    >>> np.bincount(targets[balanced_rows(rows, targets, seed=0, epoch=0)]).tolist()
    [3, 3]
    """
    present = np.unique(targets)
    # Each class gets a rank, by which the remainder of N / C goes round the classes from epoch to epoch.
    ranks = np.random.default_rng((seed, 0, 0, 1)).permutation(len(present)).tolist()
    drawn: list[np.ndarray] = []
    for code, rank in zip(present.tolist(), ranks, strict=True):
        # How many rows of this class are drawn before this epoch and after it. The differences of all classes add up to
        # N (Hermite's identity).
        first, last = ((number * len(rows) + rank) // len(present) for number in (epoch, epoch + 1))
        drawn += _draws(rows[targets == code], code, first, last, seed)
    return np.random.default_rng((seed, epoch)).permutation(np.concatenate(drawn))


def _draws(rows: np.ndarray, code: int, first: int, last: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the draws `first` to `last` of one class: all its rows, shuffled again for each cycle."""
    while first < last:
        cycle, start = divmod(first, len(rows))
        stop = min(len(rows), start + last - first)
        yield np.random.default_rng((seed, code, cycle, 2)).permutation(rows)[start:stop]
        first += stop - start


def class_weights(targets: np.ndarray, num_classes: int) -> np.ndarray:
    """Return weights inverse to the classes' frequencies, float32 [C]: their mean over the images is 1.

    A class without images has the weight 0.

    >>> class_weights(np.array([0, 0, 1, 2, 2, 2]), num_classes=3).tolist()
    [1.0, 2.0, 0.6666666865348816]
    """
    counts = np.bincount(targets, minlength=num_classes)
    weights = len(targets) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0.0).astype(np.float32)


def describe(choice: str, targets: np.ndarray, classes: tuple[str, ...]) -> str:
    """Return a line for the log: the choice, and the smallest and the largest class of the training images."""
    counts = np.bincount(targets, minlength=len(classes))
    small, large = int(counts.argmin()), int(counts.argmax())
    if counts[small] == counts[large]:
        return f"balance: {choice} (every class has {counts[small]} training images)"
    fewest, most = f"{counts[small]} of {classes[small]!r}", f"{counts[large]} of {classes[large]!r}"
    return f"balance: {choice} (training images per class: {fewest} to {most})"
