"""What a run learns besides its weights: how sure it may be of an answer, and which images are unlike those that it was trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from image_classifier.cli import hydra_app
from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.evaluation.reliability.abstention import DEFAULTS, Decision, DecisionSettings, Evidence
from image_classifier.evaluation.reliability.calibration import fit_temperature
from image_classifier.evaluation.reliability.ood import Detector, looks
from image_classifier.manifest import Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.embeddings import embed
from image_classifier.predictions import PredictionTable

log = logging.getLogger(__name__)

_MOST_IMAGES = 2000  # that the detector is fitted to: with more the measured AUROC stays the same
_BLOCK = 64


def decision_settings(config: Any) -> DecisionSettings:
    """The keys of `decision`, checked before any data is read."""
    return hydra_app.typed(DecisionSettings, config.decision, "decision").or_else(DEFAULTS)


def fit_detector(
    classifier: Classifier, manifest: Manifest, cache: PixelCache, asked: DecisionSettings
) -> Detector | None:
    """A detector fitted to the embeddings of training images, not augmented, at equal steps through each class; None where none is asked for."""
    if asked.ood_rate == 0:
        return None
    rows = _spread(manifest.indices("train"), manifest.targets, _MOST_IMAGES)
    embeddings = np.concatenate(list(embed(classifier, rows, cache.gather)))
    blocks = (cache.gather(rows[start : start + _BLOCK]).transpose(0, 3, 1, 2) for start in range(0, len(rows), _BLOCK))
    seen = np.concatenate([looks(pixels) for pixels in blocks])
    log.info(
        "out of distribution: detector fitted to %d of %d training images", len(rows), len(manifest.indices("train"))
    )
    return Detector.fitted(embeddings, seen, manifest.targets[rows])


def _spread(rows: np.ndarray, targets: np.ndarray, most: int) -> np.ndarray:
    """At most about so many of the rows, int64: the same share of each class and at least one, at equal steps."""
    step = max(1.0, len(rows) / most)
    chosen = []
    for code in np.unique(targets[rows]):
        own = rows[targets[rows] == code]
        chosen.append(own[np.arange(0, len(own), step).astype(np.int64)])
    return np.sort(np.concatenate(chosen))


def calibrate(tables: Mapping[str, PredictionTable]) -> dict[str, PredictionTable]:
    """The tables with the temperature that is fitted on val; the log says it, and what is odd about it."""
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


def fit_decision(val: PredictionTable, asked: DecisionSettings) -> Decision:
    """The limits chosen on val; the log says what they are, or that there is none that keeps the risk."""
    decision = Decision.chosen(Evidence.of(val), asked)
    if decision.note:
        log.warning("decision: %s", decision.note)
    elif asked.risk is not None:
        log.info(
            "decision: below a confidence of %.4f the answer is abstain; %.1f %% of val get a label",
            decision.threshold,
            100 * decision.answered,
        )
    return decision
