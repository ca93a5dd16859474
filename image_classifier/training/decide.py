"""What a run learns on val besides its weights: how sure it may be of an answer."""

from __future__ import annotations

import logging
from dataclasses import replace

from image_classifier.evaluation.calibration import fit_temperature
from image_classifier.records import PredictionTable

log = logging.getLogger(__name__)


def calibrated(tables: dict[str, PredictionTable]) -> dict[str, PredictionTable]:
    """The tables with the temperature that is fitted on val; the log says it, and what is odd about it."""
    fit = fit_temperature(tables["val"])
    log.info("temperature %.4f fitted on %d val images: log loss %.4f, before %.4f", fit.temperature, fit.num_images, fit.nll_after, fit.nll_before)
    if fit.note:
        log.warning("temperature: %s", fit.note)
    return {split: replace(table, temperature=fit.temperature) for split, table in tables.items()}
