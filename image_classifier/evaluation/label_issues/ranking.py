"""Which images are probably labelled wrong, by answers of models that never saw them: confident learning, highest loss, conflicting twins.

Knows predictions and paths, never a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from image_classifier.errors import DataError
from image_classifier.evaluation.label_issues.out_of_fold import OutOfFoldPredictions

CONFIDENT, LOSS, TWINS = "confident learning", "highest loss", "conflicting twins"
_CLOSE = 1e-6  # probabilities nearer to each other than this are equal


@dataclass(frozen=True, slots=True)
class Suspect:
    """An image whose label is in doubt.

    `score` is the quality of its label from 0 (surely wrong) to 1: the label's probability, or less where a twin speaks against it.
    `suggested` is the label that the models find likelier or that its twin has ("" where none is), `reasons` say why it is listed,
    and `note` what a person should know of it, such as the path of its twin.
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
    """What is being gathered about one row."""

    score: float
    suggested: int
    reasons: list[str] = field(default_factory=list)
    note: str = ""


def confident_errors(answers: OutOfFoldPredictions) -> np.ndarray:
    """The images that confident learning finds labelled wrong, bool [M].

    Northcutt, Jiang, Chuang: Confident Learning: Estimating Uncertainty in Dataset Labels (JAIR 70, 2021), section 3.2,
    "prune by noise rate": of the images with one label those that lean most towards another class, as many as
    `_counts_of_errors` says, but none whose label is the likeliest. These are what cleanlab finds; of equals, the first.

    Nothing can be learnt of classes that no label names: they are left out, and the rest of each row sums to 1 again.
    """
    present, targets = np.unique(answers.targets, return_inverse=True)
    wrong = np.zeros(len(targets), dtype=bool)
    if len(present) < 2:
        return wrong
    probabilities = np.maximum(answers.probabilities[:, present], 1e-12)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    counts = _counts_of_errors(targets, probabilities)
    for label in np.flatnonzero(counts.any(axis=1)).tolist():
        rows = np.flatnonzero(targets == label)
        for other in np.flatnonzero(counts[label]).tolist():
            leaning = np.argsort(probabilities[rows, label] - probabilities[rows, other], kind="stable")
            wrong[rows[leaning[: counts[label, other]]]] = True
    probabilities[np.arange(len(targets)), targets] += _CLOSE  # a tie speaks for the label
    wrong[probabilities.argmax(axis=1) == targets] = False
    return wrong


def _counts_of_errors(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """How many images of each label (row) belong to each other class (column), int [K, K]: section 3.1 of the paper.

    An image counts for a class that is at least as probable as it is on average where it is the label. The counts are
    scaled to the size of each label and rounded; no label loses its last image.
    """
    number, sizes = probabilities.shape[1], np.bincount(targets)
    averages = np.array([probabilities[targets == code, code].mean() for code in range(number)])
    confident = probabilities >= np.maximum(averages, 2 * _CLOSE) - _CLOSE
    # Of several, cleanlab takes the likeliest class of all; the paper takes the likeliest of those.
    best = np.where(confident.sum(axis=1) > 1, probabilities.argmax(axis=1), confident.argmax(axis=1))
    sure = confident.any(axis=1)
    joint = np.zeros((number, number))  # class, label
    np.add.at(joint, (best[sure], targets[sure]), 1)
    np.fill_diagonal(joint, np.maximum(joint.diagonal(), 1))
    joint = joint / joint.sum(axis=0) * sizes
    joint = joint / joint.sum() * len(targets)  # which changes the last digit at most, as in cleanlab
    counts = np.array([_rounded(row) for row in joint.T])
    counts[counts.diagonal() == 0] -= 1
    np.fill_diagonal(counts, 0)
    return counts.clip(min=0)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Whole numbers of the same sum: what is lacking or too much goes to those that rounding changed most."""
    whole = values.round()
    lacking = int(values.sum().round() - whole.sum())
    order = np.argsort(values - whole, kind="stable")
    changed = order[::-1] if lacking > 0 else order
    whole[changed[: abs(lacking)]] += np.sign(lacking)
    return whole.astype(int)


def highest_losses(answers: OutOfFoldPredictions, share: float) -> np.ndarray:
    """The rows of the `share` with the highest cross-entropy, bool [M]; of equals the first by path."""
    count = min(len(answers.paths), int(np.ceil(share * len(answers.paths))))
    order = sorted(range(len(answers.paths)), key=lambda row: (answers.given[row], answers.paths[row])) if count else []
    chosen = np.zeros(len(answers.paths), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def find_suspects(
    answers: OutOfFoldPredictions, twins: Iterable[Sequence[tuple[str, str]]] = (), share: float = 0.1
) -> list[Suspect]:
    """All images in doubt, the worst first, equals by path: the same list on any machine for the same answers.

    Args:
        answers: Of models that never saw the image, nor a twin of it.
        twins: Groups of images, each path and label, that show the same picture under several labels; some may have no answer.
        share: Of the images, that are listed for their loss alone.

    Raises:
        DataError: A probability is not finite.
    """
    if not np.isfinite(answers.probabilities).all():
        raise DataError(
            "there are probabilities that are not finite", "train again, with trainer.precision=32-true if need be"
        )
    quality, likeliest = answers.given, answers.probabilities.argmax(axis=1)
    doubts: dict[int, _Doubt] = {}

    def doubt(row: int) -> _Doubt:
        return doubts.setdefault(row, _Doubt(float(quality[row]), int(likeliest[row])))

    for reason, chosen in ((CONFIDENT, confident_errors(answers)), (LOSS, highest_losses(answers, share))):
        for row in np.flatnonzero(chosen).tolist():
            doubt(row).reasons.append(reason)
    places = {path: row for row, path in enumerate(answers.paths)}
    for group in twins:
        for row, shared, best in _judged_twins(answers, group, places):
            entry = doubt(row)
            entry.reasons.append(TWINS)
            entry.score, entry.suggested = min(entry.score, shared), best
            entry.note = _note(answers.classes[answers.targets[row]], group)
    found = [_suspect(answers, row, entry) for row, entry in doubts.items()]
    return sorted(found, key=lambda suspect: (suspect.score, suspect.path))


def _judged_twins(
    answers: OutOfFoldPredictions, group: Sequence[tuple[str, str]], places: Mapping[str, int]
) -> list[tuple[int, float, int]]:
    """Row, share of belief in its label and likeliest label of each answered copy of one picture: a label is as probable as it is on average."""
    rows = [places[path] for path, _ in group if path in places]
    labels = sorted({answers.classes.index(label) for _, label in group if label in answers.classes})
    if len(labels) < 2 or not rows:
        return []
    belief = answers.probabilities[rows][:, labels].mean(axis=0)
    belief = belief / belief.sum() if belief.sum() > 0 else np.full(len(labels), 1 / len(labels))
    best = labels[int(belief.argmax())]
    return [(row, float(belief[labels.index(int(answers.targets[row]))]), best) for row in rows]


def _note(label: str, group: Sequence[tuple[str, str]]) -> str:
    others = [(path, other) for path, other in group if other != label]
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"like {others[0][0]}, labelled {others[0][1]}{more}"


def _suspect(answers: OutOfFoldPredictions, row: int, doubt: _Doubt) -> Suspect:
    label = int(answers.targets[row])
    suggested = "" if doubt.suggested == label else answers.classes[doubt.suggested]
    given, other = (float(answers.probabilities[row, code]) for code in (label, doubt.suggested))
    reasons, note = tuple(doubt.reasons), doubt.note
    return Suspect(
        answers.paths[row],
        answers.splits[row],
        answers.classes[label],
        suggested,
        doubt.score,
        reasons,
        given,
        other,
        note,
    )
