"""Out-of-fold predictions in seconds: logistic regression on a backbone's embeddings, fitted once a fold.

The backbone never saw these labels, and no image is predicted by a regression that was fitted to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from image_classifier.atomic_io import write_text
from image_classifier.dataset.settings import DataSettings
from image_classifier.manifest import Manifest
from image_classifier.modeling.embeddings import EmbeddingStore
from image_classifier.predictions import PredictionTable
from image_classifier.training.baseline import (
    best_by_log_loss,
    embedding_hardware,
    embedding_network,
    embeddings_of,
    fit_logistic,
    tables_of,
)
from image_classifier.training.config import ModelConfig
from image_classifier.training.initial_weights import resolve_initial_weights

log = logging.getLogger(__name__)

_KEY = "answers.json"  # written last: from what the predictions in its folder were made


def predict_by_embeddings(
    model: ModelConfig,
    folds: Sequence[Manifest],
    data: DataSettings,
    directory: Path,
    *,
    seed: int = 0,
    precision: str | int = "auto",
    accelerator: str = "auto",
) -> list[Path]:
    """Return the folders of each fold's predictions; a fold that was predicted before is left as it is.

    Args:
        model: The backbone.
        folds: Fold i is the val split of `folds[i]`.
        data: How images are read.
        directory: Where the predictions go.
        seed: Of a backbone without weights.
        precision: The number format.
        accelerator: The device.

    Raises:
        CheckpointError: The backbone's weights are missing.
        StorageError: The disk refuses.
    """
    model = resolve_initial_weights(model, data.image_size)
    hardware = embedding_hardware(precision, accelerator)
    inputs, classifier = embedding_network(model, data, folds[0], hardware, seed, accelerator)
    store = embeddings_of(inputs, classifier)
    paths = [directory / f"fold-{number}" for number in range(len(folds))]
    for number, (path, fold) in enumerate(zip(paths, folds, strict=True), start=1):
        key = hashlib.sha256(json.dumps([fold.sha256, store.directory.name, seed]).encode()).hexdigest()
        if _is_predicted(path, key):
            log.info("fold %d of %d: %s has its predictions", number, len(folds), path)
            continue
        log.info("fold %d of %d: fitting to %d images", number, len(folds), len(fold.indices("train")))
        _predict(store, fold, seed).write(path)
        write_text(path / _KEY, json.dumps({"key": key}) + "\n")
    return paths


def _is_predicted(path: Path, key: str) -> bool:
    try:
        return bool(json.loads((path / _KEY).read_text(encoding="utf-8"))["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _predict(store: EmbeddingStore, fold: Manifest, seed: int) -> PredictionTable:
    """Return the predictions for the fold's val split, at the strength with the smallest log loss there."""
    tables = tables_of(fit_logistic(store, fold, seed), store, fold)
    return tables[best_by_log_loss(tables)]["val"]
