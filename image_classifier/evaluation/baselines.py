"""Baselines: the scores of simpler classifiers on the same splits, which a model should beat."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.evaluation.metrics.compute import compute_metrics
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.predictions import PredictionTable
from image_classifier.program import program

log = logging.getLogger(__name__)

FILE_NAME = "baselines.json"
MOST_FREQUENT, LOGISTIC = "most_frequent", "logistic"
COMPARED = ("accuracy", "f1_macro")


@dataclass(frozen=True)
class Baseline:
    """One simple classifier: `about` describes it, `scores` are its metrics for each split."""

    name: str
    about: str
    scores: Mapping[str, Mapping[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"about": self.about, "scores": {split: dict(values) for split, values in self.scores.items()}}


def evaluated(name: str, about: str, tables: Mapping[str, PredictionTable]) -> Baseline:
    """Return the baseline with these predictions, evaluated by the same code as the model."""
    return Baseline(
        name, about, {split: compute_metrics(table, resamples=0).scalars() for split, table in tables.items()}
    )


def most_frequent(train: np.ndarray, classes: Sequence[str], splits: Mapping[str, np.ndarray]) -> Baseline:
    """Return the baseline that always predicts the class with most training images, the first of equals.

    Each class is as probable as its share of the training images. `train` holds the classes of the training images,
    int64 [N], and `splits` those of each split to evaluate.
    """
    counts = np.bincount(train, minlength=len(classes))
    logits = np.log(np.maximum(counts, 0.5) / max(1, len(train))).astype(np.float32)
    tables = {
        split: PredictionTable(
            ("",) * len(targets), targets, np.broadcast_to(logits, (len(targets), len(logits))), tuple(classes)
        )
        for split, targets in splits.items()
        if len(targets)
    }
    return evaluated(
        MOST_FREQUENT, f"always {classes[int(counts.argmax())]!r}, the class with most training images", tables
    )


def most_frequent_of(manifest: Manifest) -> Baseline:
    """Return the most frequent class of a manifest, evaluated on its held-out splits."""
    splits = {split: manifest.targets[manifest.indices(split)] for split in SPLITS[1:]}
    return most_frequent(manifest.targets[manifest.indices("train")], manifest.classes, splits)


def baseline_scores(baselines: Sequence[Baseline], split: str) -> dict[str, dict[str, Any]]:
    """Return the scores for one split by name of the baseline, for JSON."""
    return {
        baseline.name: {"about": baseline.about, **baseline.scores[split]}
        for baseline in baselines
        if split in baseline.scores
    }


def as_metrics(baselines: Sequence[Baseline]) -> dict[str, float]:
    """Return accuracy and F1 of each baseline and split, with names for a tracking server."""
    return {
        f"baseline/{baseline.name}/{split}/{metric}": scores[metric]
        for baseline in baselines
        for split, scores in baseline.scores.items()
        for metric in COMPARED
    }


def lines(baselines: Sequence[Baseline], split: str, model: Mapping[str, float] | None = None) -> Iterator[str]:
    """Yield a table for a terminal: accuracy and F1 of each baseline on one split, and the model's below them."""
    rows = [
        (baseline.name, baseline.scores[split], baseline.about) for baseline in baselines if split in baseline.scores
    ]
    if not rows:
        return
    rows += [("this model", model, "")] if model else []
    width = max(8, *(len(name) for name, _, _ in rows))
    yield f"{'baseline':<{width}}  accuracy  f1_macro  on the {split} split"
    for name, scores, about in rows:
        yield f"{name:<{width}}  {scores['accuracy']:8.4f}  {scores['f1_macro']:8.4f}  {about}".rstrip()
    if LOGISTIC not in {baseline.name for baseline in baselines}:
        hint = f"set baselines=true, or run `{program()} baseline` once for these images"
        yield f"{LOGISTIC:<{width}}  not computed: {hint}"


def warn_if_not_better(baselines: Sequence[Baseline], split: str, model: Mapping[str, float]) -> None:
    """Log a warning for each baseline and metric that the model does not beat."""
    for baseline in baselines:
        for metric in COMPARED:
            if split in baseline.scores and model[metric] <= baseline.scores[split][metric]:
                log.warning(
                    "the model does not beat the baseline %s: %s %.4f on the %s split, baseline %.4f (%s)",
                    *(baseline.name, metric, model[metric], split, baseline.scores[split][metric], baseline.about),
                )


def from_dict(content: Any) -> tuple[Baseline, ...]:
    """Return the baselines of `{name: as_dict()}`; ValueError if the content is invalid."""
    try:
        baselines = tuple(
            Baseline(name, str(value["about"]), _numbers(value["scores"])) for name, value in content.items()
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"invalid baselines ({type(error).__name__}: {error})") from error
    return baselines


def _numbers(scores: Any) -> dict[str, dict[str, float]]:
    """Return the scores of each split as floats; KeyError if one that is compared is missing."""
    numbers = {split: {metric: float(value) for metric, value in values.items()} for split, values in scores.items()}
    if not all(values.keys() >= set(COMPARED) for values in numbers.values()):
        raise KeyError(*COMPARED)
    return numbers


def write_baselines(baselines: Sequence[Baseline], manifest_sha256: str, directory: Path) -> Path:
    """Write baselines.json: the scores, and the hash of the manifest."""
    path = directory / FILE_NAME
    content = {
        "manifest_sha256": manifest_sha256,
        "baselines": {baseline.name: baseline.as_dict() for baseline in baselines},
    }
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def known_baseline(plots: Path, manifest_sha256: str, name: str) -> Baseline | None:
    """Return the baseline of that name with the best val accuracy in any `plots`/*/baselines.json of this manifest."""
    found: list[Baseline] = []
    for path in sorted(plots.glob(f"*/{FILE_NAME}")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["manifest_sha256"] == manifest_sha256:
                found += [
                    baseline
                    for baseline in from_dict(content["baselines"])
                    if baseline.name == name and "val" in baseline.scores
                ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("skipped %s, which cannot be read (%s: %s)", path, type(error).__name__, error)
    return max(found, key=lambda baseline: baseline.scores["val"]["accuracy"], default=None)
