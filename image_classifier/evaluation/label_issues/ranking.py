"""Which images are probably labelled wrong, by answers of models that never saw them: confident learning, highest loss, conflicting twins.

Knows predictions and paths, never a model. Confident learning: Northcutt, Jiang, Chuang: Confident Learning, 2021 (cleanlab).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from image_classifier.errors import DataError
from image_classifier.evaluation.label_issues.out_of_fold import OutOfFoldPredictions

CONFIDENT, LOSS, TWINS = "confident learning", "highest loss", "conflicting twins"


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

    Of classes that no label names nothing can be learnt: they are left out, and what is left of each row sums to 1 again.
    """
    from cleanlab.filter import find_label_issues  # pandas: a second of start-up

    present, targets = np.unique(answers.targets, return_inverse=True)
    if len(present) < 2:
        return np.zeros(len(targets), dtype=bool)
    probabilities = np.maximum(answers.probabilities[:, present], 1e-12)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "May not flag all label issues in class"
        )  # a class of one image has none to spare: no more can be said
        return np.asarray(
            find_label_issues(targets, probabilities, filter_by="prune_by_noise_rate", n_jobs=1), dtype=bool
        )


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
