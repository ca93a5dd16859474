"""Images that are probably labelled wrong, found in out-of-fold predictions.

There are three reasons: confident learning, highest loss, and near-duplicates with another label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from image_classifier.errors import DataError
from image_classifier.evaluation.label_issues.out_of_fold import OutOfFoldPredictions

CONFIDENT, LOSS, DUPLICATES = "confident learning", "highest loss", "conflicting duplicates"
_CLOSE = 1e-6  # probabilities nearer to each other than this are equal


@dataclass(frozen=True, slots=True)
class Suspect:
    """An image whose label is in doubt.

    `score` is the quality of its label from 0 (certainly wrong) to 1: the label's probability, or less if a
    near-duplicate has another label. `suggested` is the more probable label, or that of a near-duplicate ("" for none),
    `reasons` are why it is listed, and `note` is a detail such as the path of its near-duplicate.
    """

    path: str
    split: str
    label: str
    suggested: str
    score: float
    reasons: tuple[str, ...]
    probability: float
    suggested_probability: float
    note: str = ""

    @property
    def reason(self) -> str:
        """The reasons as one text."""
        return "; ".join(self.reasons) + (f" ({self.note})" if self.note else "")


@dataclass
class _Doubt:
    """The reasons to doubt the label of one row."""

    score: float
    suggested: int
    reasons: list[str] = field(default_factory=list)
    note: str = ""


def confident_errors(predictions: OutOfFoldPredictions) -> np.ndarray:
    """Return the images that confident learning finds labelled wrong, bool [M].

    Northcutt, Jiang, Chuang: Confident Learning: Estimating Uncertainty in Dataset Labels (JAIR 70, 2021), section 3.2,
    "prune by noise rate": for each label and other class, the images of the label that lean most towards the other
    class, as many as `_estimated_errors` says, but none whose label is the most probable class. The result is that of
    cleanlab; of equal images it takes the first.

    Classes that no label names are left out, and the rest of each row is scaled to a sum of 1.
    """
    present, targets = np.unique(predictions.targets, return_inverse=True)
    wrong = np.zeros(len(targets), dtype=bool)
    if len(present) < 2:
        return wrong
    probabilities = np.maximum(predictions.probabilities[:, present], 1e-12)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    # How many images of each label to flag for each other class; then those that lean most towards it.
    counts = _estimated_errors(targets, probabilities)
    for label in np.flatnonzero(counts.any(axis=1)).tolist():
        rows = np.flatnonzero(targets == label)
        for other in np.flatnonzero(counts[label]).tolist():
            leaning = np.argsort(probabilities[rows, label] - probabilities[rows, other], kind="stable")
            wrong[rows[leaning[: counts[label, other]]]] = True
    # Never flag a label that is the most probable class; a tie counts for the label.
    probabilities[np.arange(len(targets)), targets] += _CLOSE
    wrong[probabilities.argmax(axis=1) == targets] = False
    return wrong


def _estimated_errors(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return how many images of each label (row) belong to each other class (column), int [K, K] (section 3.1).

    An image counts for a class that is at least as probable as it is on average among the images with that label. The
    counts are scaled to the number of images of each label and rounded; no label loses its last image.
    """
    number = probabilities.shape[1]
    sizes = np.bincount(targets)
    # Threshold of each class [K]: its mean probability among the images with this label.
    averages = np.array([probabilities[targets == code, code].mean() for code in range(number)])
    confident = probabilities >= np.maximum(averages, 2 * _CLOSE) - _CLOSE
    # With several classes above their thresholds, cleanlab takes the most probable class of all; the paper takes the
    # most probable of these.
    best = np.where(confident.sum(axis=1) > 1, probabilities.argmax(axis=1), confident.argmax(axis=1))
    sure = confident.any(axis=1)
    # Confident joint [class, label]: counts, scaled to the labels' sizes, then to the number of images.
    joint = np.zeros((number, number))
    np.add.at(joint, (best[sure], targets[sure]), 1)
    np.fill_diagonal(joint, np.maximum(joint.diagonal(), 1))
    joint = joint / joint.sum(axis=0) * sizes
    joint = joint / joint.sum() * len(targets)  # changes the last digit at most, as in cleanlab
    counts = np.array([_rounded(row) for row in joint.T])
    # Keep one image of a label that would lose all.
    counts[counts.diagonal() == 0] -= 1
    np.fill_diagonal(counts, 0)
    return counts.clip(min=0)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Return integers with the same sum; the difference goes to the values that rounding changed most.

    >>> _rounded(np.array([0.4, 0.4, 1.2])).tolist()
    [0, 1, 1]
    """
    rounded = values.round()
    difference = int(values.sum().round() - rounded.sum())
    order = np.argsort(values - rounded, kind="stable")
    changed = order[::-1] if difference > 0 else order
    rounded[changed[: abs(difference)]] += np.sign(difference)
    return rounded.astype(int)


def highest_losses(predictions: OutOfFoldPredictions, share: float) -> np.ndarray:
    """Return the `share` of rows with the highest cross-entropy, bool [M]; of equals the first by path."""
    count = min(len(predictions.paths), int(np.ceil(share * len(predictions.paths))))
    order: list[int] = []
    if count:
        given = predictions.given
        order = sorted(range(len(predictions.paths)), key=lambda row: (given[row], predictions.paths[row]))
    chosen = np.zeros(len(predictions.paths), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def find_suspects(
    predictions: OutOfFoldPredictions, duplicates: Iterable[Sequence[tuple[str, str]]] = (), share: float = 0.1
) -> list[Suspect]:
    """Return all images with a doubtful label, worst first, equals by path: the same list on any machine.

    Args:
        predictions: Predictions of models that saw neither the image nor a near-duplicate of it in training.
        duplicates: Groups of images (path, label) that show the same picture with several labels; some may have no
            prediction.
        share: Share of the images to list for their loss alone.

    Raises:
        DataError: A probability is not finite.
    """
    if not np.isfinite(predictions.probabilities).all():
        raise DataError("some probabilities are not finite", "train again, if needed with trainer.precision=32-true")
    quality = predictions.given
    likeliest = predictions.probabilities.argmax(axis=1)
    doubts: dict[int, _Doubt] = {}

    def doubt(row: int) -> _Doubt:
        return doubts.setdefault(row, _Doubt(float(quality[row]), int(likeliest[row])))

    for reason, chosen in ((CONFIDENT, confident_errors(predictions)), (LOSS, highest_losses(predictions, share))):
        for row in np.flatnonzero(chosen).tolist():
            doubt(row).reasons.append(reason)
    row_of = {path: row for row, path in enumerate(predictions.paths)}
    for group in duplicates:
        for row, shared, best in _judged_duplicates(predictions, group, row_of):
            entry = doubt(row)
            entry.reasons.append(DUPLICATES)
            entry.score = min(entry.score, shared)
            entry.suggested = best
            entry.note = _note(predictions.classes[predictions.targets[row]], group)
    suspects = [_suspect(predictions, row, entry) for row, entry in doubts.items()]
    return sorted(suspects, key=lambda suspect: (suspect.score, suspect.path))


def _judged_duplicates(
    predictions: OutOfFoldPredictions, group: Sequence[tuple[str, str]], row_of: Mapping[str, int]
) -> list[tuple[int, float, int]]:
    """Return row, probability of its label and most probable label for each copy of one picture with a prediction.

    The probabilities are the mean over the copies, among the labels that the copies have.
    """
    rows = [row_of[path] for path, _ in group if path in row_of]
    labels = sorted({predictions.classes.index(label) for _, label in group if label in predictions.classes})
    if len(labels) < 2 or not rows:
        return []
    belief = predictions.probabilities[rows][:, labels].mean(axis=0)
    belief = belief / belief.sum() if belief.sum() > 0 else np.full(len(labels), 1 / len(labels))
    best = labels[int(belief.argmax())]
    return [(row, float(belief[labels.index(int(predictions.targets[row]))]), best) for row in rows]


def _note(label: str, group: Sequence[tuple[str, str]]) -> str:
    others = [(path, other) for path, other in group if other != label]
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"like {others[0][0]}, labelled {others[0][1]}{more}"


def _suspect(predictions: OutOfFoldPredictions, row: int, doubt: _Doubt) -> Suspect:
    label = int(predictions.targets[row])
    suggested = "" if doubt.suggested == label else predictions.classes[doubt.suggested]
    given, other = (float(predictions.probabilities[row, code]) for code in (label, doubt.suggested))
    reasons, note = tuple(doubt.reasons), doubt.note
    return Suspect(
        predictions.paths[row],
        predictions.splits[row],
        predictions.classes[label],
        suggested,
        doubt.score,
        reasons,
        given,
        other,
        note,
    )
