"""Results for one split: predictions, metrics.json and figures in one folder, and lines for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
from image_classifier.text import listed

_NUM_SAMPLES = 24
_MAX_LISTED = 20  # classes that a line names
_MAX_ROWS = 10_000


def write_evaluation(
    table: PredictionTable,
    metrics: ClassificationMetrics,
    records: Manifest,
    directory: Path,
    title: str,
    limits: DecodeLimits,
    leak: LeakScore | None = None,
    baselines: Mapping[str, Any] | None = None,
    figures: bool = True,
) -> None:
    """Write predictions.csv, logits.npy, metrics.json and, with `figures`, the figures of one split.

    The rows of the table are `records`, `limits` bounds the decoding of their files, and `baselines` are the scores
    of the baselines.
    """
    table.write(directory)
    content = json.dumps(metrics_dict(metrics, leak, baselines), indent=2, ensure_ascii=False)
    write_text(directory / "metrics.json", content + "\n")
    if not figures:
        return
    plot_confusion_matrix(
        metrics.confusion, table.classes, directory / "confusion_matrix.png", f"Confusion matrix: {title}"
    )
    plot_class_scores(metrics.per_class, directory / "class_scores.png", f"F1 per class: {title}")
    predicted, confidence = table.answers()
    rows = _samples(table)
    plot_samples(
        [decode(records.file(records[int(row)]), limits) for row in rows],
        [table.classes[table.targets[row]] for row in rows],
        [table.classes[predicted[row]] for row in rows],
        [float(confidence[row]) for row in rows],
        directory / "samples.png",
        f"Predictions: {title}",
    )


def _samples(table: PredictionTable) -> list[int]:
    """Return rows for the grid: half are the most confident mistakes, the rest is spread evenly over the split."""
    worst = table.surest_mistakes(_NUM_SAMPLES // 2)
    others = np.setdiff1d(np.arange(len(table.targets)), worst)
    spread = others[evenly_spaced(len(others), _NUM_SAMPLES - len(worst))]
    return [int(row) for row in (*worst, *spread)]


def answer_columns(table: PredictionTable) -> dict[str, list[Any]]:
    """Return predictions as columns of a table for trackers, most confident mistakes first, at most 10 000 images."""
    predicted, confidence = table.answers()
    right = predicted == table.targets
    rows = np.lexsort((-confidence, right))[:_MAX_ROWS].tolist()
    return {
        "path": [table.paths[row] for row in rows],
        "label": [table.classes[table.targets[row]] for row in rows],
        "predicted_class": [table.classes[predicted[row]] for row in rows],
        "confidence": confidence[rows].tolist(),
        "correct": right[rows].tolist(),
    }


def class_columns(metrics: ClassificationMetrics) -> dict[str, list[Any]]:
    """Return the scores of each class as columns of a table."""
    names = ("label", "precision", "recall", "f1", "support")
    return {name: [getattr(score, name) for score in metrics.per_class] for name in names}


def metrics_dict(
    metrics: ClassificationMetrics, leak: LeakScore | None, baselines: Mapping[str, Any] | None = None
) -> dict[str, object]:
    """Return the metrics of one split and its baselines for JSON; `leak` is null if no image has leaked."""
    return {**metrics.as_dict(), "leak": leak.as_dict() if leak else None, "baselines": dict(baselines or {})}


def scalars(metrics: ClassificationMetrics, leak: LeakScore | None) -> dict[str, float]:
    """Return the metrics of one split by name, with those of a leak if there is one."""
    return {**metrics.scalars(), **(leak.scalars() if leak else {})}


def metrics_lines(metrics: ClassificationMetrics, split: str, leak: LeakScore | None = None) -> Iterator[str]:
    """Yield the metrics of one split for a terminal: the worst classes, then lines that a script may look for.

    These lines have the form `SPLIT NAME VALUE  [LOW, HIGH]`.
    """
    ranked = sorted((score for score in metrics.per_class if score.support), key=lambda score: score.f1)[:10]
    width = max(5, *(len(score.label) for score in ranked)) if ranked else 5
    if len(ranked) < len(metrics.per_class):
        yield f"the {len(ranked)} classes with the lowest F1 of {len(metrics.per_class)}:"
    yield f"{'class':<{width}}  precision  recall      f1  images{'  95 % interval of f1' if metrics.intervals else ''}"
    for score in ranked:
        values = f"{score.precision:9.4f}  {score.recall:6.4f}  {score.f1:6.4f}  {score.support:6d}"
        yield f"{score.label:<{width}}  {values}{shown(score.intervals.get('f1'))}"
    if metrics.absent:
        yield f"no image in this split: {listed(metrics.absent, _MAX_LISTED)}"
    counts = metrics.confusion.sum(axis=0)
    never = [score.label for score, count in zip(metrics.per_class, counts, strict=True) if score.support and not count]
    if never:
        yield f"never predicted: {listed(never, _MAX_LISTED)}"
    yield f"{split} images {metrics.num_images}"
    for name, value in metrics.scalars().items():
        yield f"{split} {name} {value:.4f}{shown(metrics.intervals.get(name))}"
    if leak:
        yield from leak.lines(split)


def shown(interval: Interval | None) -> str:
    """Return an interval as text to append to its value, nothing without one.

    >>> shown((0.5, 0.75)), shown(None)
    ('  [0.5000, 0.7500]', '')
    """
    return f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
