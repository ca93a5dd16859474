"""Out-of-fold answers in seconds: logistic regression on the embeddings of a backbone that never saw the labels, fitted once a fold."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from image_classifier.atomic_io import write_text
from image_classifier.dataset.pixel_cache import open_cache
from image_classifier.dataset.prepare import DataSettings
from image_classifier.manifest import Manifest
from image_classifier.modeling.embeddings import EmbeddingStore
from image_classifier.predictions import PredictionTable, softmax
from image_classifier.training.baseline import device_of, embeddings_of, fit_logistic
from image_classifier.training.builders import build_network
from image_classifier.training.hardware import Hardware, choose_channels_last, choose_precision
from image_classifier.training.initial_weights import resolve_initial_weights

log = logging.getLogger(__name__)

_KEY = "answers.json"  # written last: what the predictions beside it are of
_NEVER = -1e4  # logit of a class that a fold's training images do not show


def answer_by_embeddings(config: Any, folds: Sequence[Manifest], data: DataSettings, directory: Path) -> list[Path]:
    """The folders of each fold's predictions, fold i being the val part of `folds[i]`; a fold that is answered already is left as it is.

    Raises:
        CheckpointError: The backbone's weights cannot be had.
        StorageError: The disk refuses.
    """
    resolve_initial_weights(config)
    chosen = choose_precision(str(config.trainer.precision), config.trainer.accelerator)
    hardware = Hardware(
        str(chosen.value), bool(choose_channels_last("auto", chosen.value, config.trainer.accelerator).value)
    )
    whole = folds[0]
    cache = open_cache(whole, data.preprocess, data.cache, data.limits, progress=sys.stderr.isatty())
    pl.seed_everything(config.seed, workers=True, verbose=False)
    classifier, _ = build_network(config, whole, data, cache, hardware)
    store = embeddings_of(config, classifier.to(device_of(config.trainer.accelerator)), whole, data, cache, hardware)
    places = [directory / f"fold-{number}" for number in range(len(folds))]
    for number, (place, fold) in enumerate(zip(places, folds, strict=True), start=1):
        key = hashlib.sha256(json.dumps([fold.sha256, store.directory.name, config.seed]).encode()).hexdigest()
        if _answered(place, key):
            log.info("fold %d of %d: %s has its answers", number, len(folds), place)
            continue
        log.info("fold %d of %d: fitting to %d images", number, len(folds), len(fold.indices("train")))
        _answers(store, fold, config.seed).write(place)
        write_text(place / _KEY, json.dumps({"key": key}) + "\n")
    return places


def _answered(place: Path, key: str) -> bool:
    try:
        return bool(json.loads((place / _KEY).read_text(encoding="utf-8"))["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _answers(store: EmbeddingStore, fold: Manifest, seed: int) -> PredictionTable:
    """What the regression says of the fold's val part, at the strength with the least cross-entropy there."""
    models, rows = fit_logistic(store, fold, seed), fold.indices("val")
    shown = np.unique(fold.targets[fold.indices("train")])
    logits = {strength: np.full((len(rows), len(fold.classes)), _NEVER, np.float32) for strength in models}
    for places, features in store.parts(fold.digests[rows]):
        for strength, model in models.items():
            logits[strength][np.ix_(places, shown)] = model.logits(features)
    targets = fold.targets[rows]
    losses = {strength: _cross_entropy(answers, targets) for strength, answers in logits.items()}
    best = min(losses, key=lambda strength: losses[strength])
    log.info("logistic regression: C=%g, cross-entropy %.3f", best, losses[best])
    return PredictionTable(tuple(fold.paths[row] for row in rows.tolist()), targets, logits[best], fold.classes)


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    return float(-np.log(np.maximum(softmax(logits)[np.arange(len(targets)), targets], 1e-12)).mean())
