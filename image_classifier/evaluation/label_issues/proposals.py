"""What is said of suspects: suspects.csv, lines for a terminal, proposals for fix.csv and which of them may be accepted unseen."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.evaluation.label_issues.out_of_fold import OutOfFoldPredictions
from image_classifier.evaluation.label_issues.ranking import CONFIDENT, TWINS, Suspect, highest_losses
from image_classifier.manifest import csv_writer

COLUMNS = (
    "rank",
    "path",
    "split",
    "label",
    "suggested_label",
    "score",
    "reason",
    "probability",
    "suggested_probability",
)
SURE = 0.5  # the probability from which a suggested label is taken over without a person's look; below it the image is left out
_SHOWN = 10


def worst_answers(answers: OutOfFoldPredictions, share: float, model: str) -> list[Suspect]:
    """The images of one part that a model was not trained on and answered worst, by its own loss."""
    likeliest = answers.probabilities.argmax(axis=1)
    found = []
    for row in np.flatnonzero(highest_losses(answers, share)).tolist():
        label, other = int(answers.targets[row]), int(likeliest[row])
        given, best = float(answers.probabilities[row, label]), float(answers.probabilities[row, other])
        suggested = "" if other == label else answers.classes[other]
        reason = f"highest loss of {model} on {answers.splits[row]}"
        place = (answers.paths[row], answers.splits[row], answers.classes[label], suggested)
        found.append(Suspect(*place, given, (reason,), given, best))
    return found


def merged(suspects: Iterable[Suspect], more: Iterable[Suspect]) -> list[Suspect]:
    """Both lists as one, worst first; an image of both has the reasons of both and the lower score."""
    by_path = {suspect.path: suspect for suspect in suspects}
    for suspect in more:
        known = by_path.get(suspect.path)
        if known is None:
            by_path[suspect.path] = suspect
        else:
            reasons = (*known.reasons, *(reason for reason in suspect.reasons if reason not in known.reasons))
            by_path[suspect.path] = replace(known, score=min(known.score, suspect.score), reasons=reasons)
    return sorted(by_path.values(), key=lambda suspect: (suspect.score, suspect.path))


def write_csv(suspects: Sequence[Suspect], path: Path) -> None:
    """All suspects, worst first; StorageError where the disk refuses."""
    text = io.StringIO()
    write_row = csv_writer(text)
    write_row(COLUMNS)
    for rank, suspect in enumerate(suspects, start=1):
        numbers = (f"{suspect.probability:.6f}", f"{suspect.suggested_probability:.6f}")
        place = (suspect.path, suspect.split, suspect.label, suspect.suggested)
        write_row((rank, *place, f"{suspect.score:.6f}", suspect.reason, *numbers))
    write_text(path, text.getvalue())


def decision(suspect: Suspect) -> tuple[str, str] | None:
    """What may be done about a suspect unseen: action and new label; None where its own label is the likeliest."""
    if not suspect.suggested:
        return None
    return ("relabel", suspect.suggested) if suspect.suggested_probability >= SURE else ("exclude", "")


def accepted(suspects: Iterable[Suspect], apply: bool | int) -> Mapping[str, tuple[str, str]]:
    """Path to action and new label of what is accepted without a look, never of a test part.

    `apply` is how many, the worst first; True: all that confident learning or a conflicting twin speaks against; False: none.
    """
    chosen: dict[str, tuple[str, str]] = {}
    for suspect in suspects:
        wanted = bool({CONFIDENT, TWINS} & set(suspect.reasons)) if isinstance(apply, bool) else len(chosen) < apply
        done = decision(suspect)
        if apply and wanted and done and suspect.split != "test":
            chosen[suspect.path] = done
    return chosen


def lines(suspects: Sequence[Suspect], num_images: int) -> Iterator[str]:
    """A table for a terminal: the worst of them, then how many there are for each reason."""
    shown = suspects[:_SHOWN]
    width = max((len(_labels(suspect)) for suspect in shown), default=0)
    if shown:
        yield f"rank  score  {'label':<{width}}  image"
    for rank, suspect in enumerate(shown, start=1):
        yield f"{rank:4d}  {suspect.score:5.3f}  {_labels(suspect):<{width}}  {suspect.path} ({suspect.reason})"
    counts = Counter(reason for suspect in suspects for reason in suspect.reasons)
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    yield f"suspects {len(suspects)} of {num_images} images{': ' if reasons else ''}{reasons}"


def _labels(suspect: Suspect) -> str:
    return f"{suspect.label} → {suspect.suggested or '?'}"
