"""Proposals from suspects: suspects.csv, lines for a terminal, and which corrections may be accepted without a look."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.evaluation.label_issues.out_of_fold import OutOfFoldPredictions
from image_classifier.evaluation.label_issues.ranking import CONFIDENT, DUPLICATES, Suspect, highest_losses
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
SURE = 0.5  # suggested labels with this probability are accepted; with less, the image is excluded
_MAX_SHOWN = 10


def worst_predictions(predictions: OutOfFoldPredictions, share: float, model: str) -> list[Suspect]:
    """Return the images of one split with the highest loss of a model that was not trained on them."""
    likeliest = predictions.probabilities.argmax(axis=1)
    suspects = []
    for row in np.flatnonzero(highest_losses(predictions, share)).tolist():
        label = int(predictions.targets[row])
        other = int(likeliest[row])
        given = float(predictions.probabilities[row, label])
        best = float(predictions.probabilities[row, other])
        suggested = "" if other == label else predictions.classes[other]
        reason = f"highest loss of {model} on {predictions.splits[row]}"
        image = (predictions.paths[row], predictions.splits[row], predictions.classes[label], suggested)
        suspects.append(Suspect(*image, given, (reason,), given, best))
    return suspects


def merged(suspects: Iterable[Suspect], more: Iterable[Suspect]) -> list[Suspect]:
    """Return both lists as one, worst first; an image in both has all reasons and the lower score."""
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
    """Write all suspects, worst first.

    Raises:
        StorageError: The file cannot be written.
    """
    text = io.StringIO()
    write_row = csv_writer(text)
    write_row(COLUMNS)
    for rank, suspect in enumerate(suspects, start=1):
        numbers = (f"{suspect.probability:.6f}", f"{suspect.suggested_probability:.6f}")
        image = (suspect.path, suspect.split, suspect.label, suspect.suggested)
        write_row((rank, *image, f"{suspect.score:.6f}", suspect.reason, *numbers))
    write_text(path, text.getvalue())


def decision(suspect: Suspect) -> tuple[str, str] | None:
    """Return action and new label for a suspect without a look; None if its label is the most probable."""
    if not suspect.suggested:
        return None
    return ("relabel", suspect.suggested) if suspect.suggested_probability >= SURE else ("exclude", "")


def accepted(suspects: Iterable[Suspect], apply: bool | int) -> Mapping[str, tuple[str, str]]:
    """Return path -> action and new label of the proposals to accept without a look, never for test images.

    `apply` is their number, worst first. True means all with confident learning or a conflicting duplicate as reason,
    False none.
    """
    chosen: dict[str, tuple[str, str]] = {}
    for suspect in suspects:
        wanted = (
            bool({CONFIDENT, DUPLICATES} & set(suspect.reasons)) if isinstance(apply, bool) else len(chosen) < apply
        )
        done = decision(suspect)
        if apply and wanted and done and suspect.split != "test":
            chosen[suspect.path] = done
    return chosen


def lines(suspects: Sequence[Suspect], num_images: int) -> Iterator[str]:
    """Yield a table of the worst suspects for a terminal, then the number for each reason."""
    shown = suspects[:_MAX_SHOWN]
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
