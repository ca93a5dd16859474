"""The delivered probe: fitted to train and val together, with scores on val that are out of fold."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from image_classifier.manifest import Manifest
from image_classifier.training.baseline import LinearModel, fit_logistic, logits_of
from image_classifier.training.transfer.probe import Probe

log = logging.getLogger(__name__)

_FOLDS = 5


@dataclass(frozen=True)
class Refit:
    """A regression fitted to train and val.

    Attributes:
        model: Of all these images.
        val_logits: Float32 [M, K] of the val images, each from a regression that was fitted without its fold.
        folds: Their number.
    """

    model: LinearModel
    val_logits: np.ndarray
    folds: int


def refit(probe: Probe, manifest: Manifest, seed: int) -> Refit | None:
    """Fit the probe to train and val at the strength that was chosen; None where they make no two folds of two classes.

    Images of one group (copies, near-duplicates, one patient) are in one fold.
    """
    val = manifest.indices("val")
    rows = np.sort(np.concatenate([manifest.indices("train"), val]))
    groups = np.unique(manifest.groups[rows], return_inverse=True)[1]
    folds = min(_FOLDS, int(groups.max()) + 1)
    if folds < 2:
        return None

    def fitted(chosen: np.ndarray) -> dict[float, LinearModel]:
        return fit_logistic(probe.store, manifest, seed, chosen, (probe.strength,))

    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    val_logits = np.zeros((len(val), len(manifest.classes)), dtype=np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # its images are in fewer folds
        parts = list(split.split(rows, manifest.targets[rows], groups))
    if any(len(np.unique(manifest.targets[rows[rest]])) < 2 for rest, _ in parts):
        return None
    for rest, held_out in parts:
        predicted = np.intersect1d(rows[held_out], val)
        if len(predicted):
            logits = logits_of(fitted(rows[rest]), probe.store, manifest, predicted)[probe.strength]
            val_logits[np.searchsorted(val, predicted)] = logits
    log.info("probe: fitted again to train and val, %d images; its val scores are of %d folds", len(rows), folds)
    return Refit(fitted(rows)[probe.strength], val_logits, folds)
