"""What a judged part leaves behind: predictions, metrics.json and figures in one folder, and lines for a person."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.evaluation.leaks import LeakScore
from image_classifier.evaluation.metrics.compute import ClassificationMetrics, Interval
from image_classifier.evaluation.plots.class_scores import plot_class_scores
from image_classifier.evaluation.plots.confusion_matrix import plot_confusion_matrix
from image_classifier.evaluation.plots.samples import plot_samples
from image_classifier.images import DecodeLimits, decode
from image_classifier.manifest import Manifest
from image_classifier.predictions import PredictionTable
from image_classifier.sampling import evenly_spaced

_NUM_SAMPLES = 24
_MOST_ROWS = 10_000


def write_evaluation(
    table: PredictionTable,
    metrics: ClassificationMetrics,
    part: Manifest,
    directory: Path,
    title: str,
    limits: DecodeLimits,
    leak: LeakScore | None = None,
    beside: Mapping[str, Any] | None = None,
    figures: bool = True,
) -> None:
    """Write predictions.csv, logits.npy, metrics.json and, with `figures`, the figures of one part; `beside` are the baselines' scores.

    The table's rows are the part's records, `limits` what their files may ask for.
    """
    table.write(directory)
    write_text(
        directory / "metrics.json", json.dumps(metrics_dict(metrics, leak, beside), indent=2, ensure_ascii=False) + "\n"
    )
    if not figures:
        return
    plot_confusion_matrix(metrics.confusion, table.classes, directory / "confusion_matrix.png", title)
    plot_class_scores(metrics.per_class, directory / "class_scores.png", title)
    predicted, confidence = table.answers()
    rows = _samples(table)
    plot_samples(
        [decode(part.file(part[int(row)]), limits) for row in rows],
        [table.classes[table.targets[row]] for row in rows],
        [table.classes[predicted[row]] for row in rows],
        [float(confidence[row]) for row in rows],
        directory / "samples.png",
        title,
    )


def _samples(table: PredictionTable) -> list[int]:
    """Half of the grid for the most confident mistakes, the rest spread evenly over the part."""
    worst = table.surest_mistakes(_NUM_SAMPLES // 2)
    others = np.setdiff1d(np.arange(len(table.targets)), worst)
    spread = others[evenly_spaced(len(others), _NUM_SAMPLES - len(worst))]
    return [int(row) for row in (*worst, *spread)]


def answer_columns(table: PredictionTable) -> dict[str, list[Any]]:
    """The answers as columns of a table for the trackers: the surest mistakes first, at most 10 000 images."""
    predicted, confidence = table.answers()
    right = predicted == table.targets
    rows = np.lexsort((-confidence, right))[:_MOST_ROWS].tolist()
    return {
        "path": [table.paths[row] for row in rows],
        "label": [table.classes[table.targets[row]] for row in rows],
        "predicted_class": [table.classes[predicted[row]] for row in rows],
        "confidence": confidence[rows].tolist(),
        "correct": right[rows].tolist(),
    }


def class_columns(metrics: ClassificationMetrics) -> dict[str, list[Any]]:
    """The scores of each class as columns of a table."""
    names = ("label", "precision", "recall", "f1", "support")
    return {name: [getattr(score, name) for score in metrics.per_class] for name in names}


def metrics_dict(
    metrics: ClassificationMetrics, leak: LeakScore | None, beside: Mapping[str, Any] | None = None
) -> dict[str, object]:
    """The metrics of one part as JSON, the baselines' beside them; `leak` is null where no image of it has a copy or twin in the train part."""
    return {**metrics.as_dict(), "leak": leak.as_dict() if leak else None, "baselines": dict(beside or {})}


def scalars(metrics: ClassificationMetrics, leak: LeakScore | None) -> dict[str, float]:
    """The single numbers of one part under their stable names; those of a leak only where there is one."""
    return {**metrics.scalars(), **(leak.scalars() if leak else {})}


def metrics_lines(metrics: ClassificationMetrics, split: str, leak: LeakScore | None = None) -> Iterator[str]:
    """The metrics of one part for a terminal: the worst classes, then lines `SPLIT NAME VALUE  [LOW, HIGH]` that a script may look for."""
    ranked = sorted((score for score in metrics.per_class if score.support), key=lambda score: score.f1)[:10]
    width = max(5, *(len(score.label) for score in ranked)) if ranked else 5
    if len(ranked) < len(metrics.per_class):
        yield f"the {len(ranked)} classes with the lowest F1 of {len(metrics.per_class)}:"
    yield f"{'class':<{width}}  precision  recall      f1  images{'  95 % interval of f1' if metrics.intervals else ''}"
    for score in ranked:
        row = (
            f"{score.label:<{width}}  {score.precision:9.4f}  {score.recall:6.4f}  {score.f1:6.4f}  {score.support:6d}"
        )
        yield f"{row}{shown(score.intervals.get('f1'))}"
    if metrics.absent:
        yield f"no image in this part: {_listed(metrics.absent)}"
    if never := [
        score.label
        for score, count in zip(metrics.per_class, metrics.confusion.sum(axis=0), strict=True)
        if score.support and not count
    ]:
        yield f"never predicted: {_listed(never)}"
    yield f"{split} images {metrics.num_images}"
    for name, value in metrics.scalars().items():
        yield f"{split} {name} {value:.4f}{shown(metrics.intervals.get(name))}"
    if leak:
        yield from leak.lines(split)


def shown(interval: Interval | None) -> str:
    """An interval as it stands after its value, nothing where there is none."""
    return f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""


def _listed(labels: Sequence[str], most: int = 20) -> str:
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" if len(labels) > most else "")
