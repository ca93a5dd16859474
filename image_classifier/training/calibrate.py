"""Post-hoc calibration: the temperature, the limits of abstaining, and the detector of images unlike the training's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.evaluation.reliability.abstention import Decision, DecisionSettings, Evidence
from image_classifier.evaluation.reliability.calibration import fit_temperature
from image_classifier.evaluation.reliability.ood import Detector, looks
from image_classifier.inference.predictor import EmbeddingBackend
from image_classifier.manifest import Manifest
from image_classifier.modeling.embeddings import EmbeddingStore, prefetched
from image_classifier.predictions import PredictionTable
from image_classifier.training.forward import forward

log = logging.getLogger(__name__)

_MAX_IMAGES = 2000  # that the detector is fitted to: with more the measured AUROC stays the same


def fit_detector(
    backend: Callable[[], EmbeddingBackend],
    manifest: Manifest,
    cache: PixelCache,
    settings: DecisionSettings,
    known: EmbeddingStore | None = None,
) -> Detector | None:
    """Return a detector fitted to the embeddings of training images, not augmented, evenly spaced within each class.

    None where `decision.ood_rate` is 0. `known` holds the embeddings where they were computed already; `backend` makes
    what computes them otherwise.
    """
    if settings.ood_rate == 0:
        return None
    rows = _spread(manifest.indices("train"), manifest.targets, _MAX_IMAGES)
    if known:
        embeddings, seen = known.of(manifest.digests[rows]), looks_of(rows, cache)
    else:
        parts = [(embeddings, looks(pixels)) for pixels, _, embeddings in forward(backend(), rows, cache.gather)]
        embeddings, seen = (np.concatenate(column) for column in zip(*parts, strict=True))
    log.info(
        "out of distribution: detector fitted to %d of %d training images", len(rows), len(manifest.indices("train"))
    )
    return Detector.fitted(embeddings, seen, manifest.targets[rows])


def looks_of(rows: np.ndarray, cache: PixelCache) -> np.ndarray:
    """Return the `looks` of images, float32 [n, 11]."""
    return np.concatenate([looks(squares.transpose(0, 3, 1, 2)) for squares in prefetched(rows, cache.gather)])


def _spread(rows: np.ndarray, targets: np.ndarray, limit: int) -> np.ndarray:
    """Return about `limit` of the rows, int64: the same share of each class and at least one, evenly spaced."""
    step = max(1.0, len(rows) / limit)
    chosen = []
    for code in np.unique(targets[rows]):
        of_class = rows[targets[rows] == code]
        chosen.append(of_class[np.arange(0, len(of_class), step).astype(np.int64)])
    return np.sort(np.concatenate(chosen))


def calibrate(tables: Mapping[str, PredictionTable]) -> dict[str, PredictionTable]:
    """Return the tables with the temperature fitted on val; the log has it, with a warning where it is odd."""
    fit = fit_temperature(tables["val"])
    log.info(
        "temperature %.4f fitted on %d val images: log loss %.4f, before %.4f",
        fit.temperature,
        fit.num_images,
        fit.nll_after,
        fit.nll_before,
    )
    if fit.note:
        log.warning("temperature: %s", fit.note)
    return {split: replace(table, temperature=fit.temperature) for split, table in tables.items()}


def fit_decision(val: PredictionTable, settings: DecisionSettings) -> Decision:
    """Return the limits chosen on val; the log names them, or warns that none keeps the risk."""
    decision = Decision.chosen(Evidence.of(val), settings)
    if decision.note:
        log.warning("decision: %s", decision.note)
    elif settings.risk is not None:
        log.info(
            "decision: below a confidence of %.4f the answer is abstain; %.1f %% of val get a label",
            decision.threshold,
            100 * decision.answered,
        )
    return decision
