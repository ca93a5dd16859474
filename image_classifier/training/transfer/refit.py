"""The delivered model, fitted again to train and val together; its val scores are of models that had not seen them.

A probe is fitted anew and cross-validated. A network is trained on for a few epochs; its scores are those of before.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold

from image_classifier.manifest import Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.training.baseline import LinearModel, fit_logistic, logits_of
from image_classifier.training.builders import TrainingInputs
from image_classifier.training.distributed import from_rank_zero, world_size
from image_classifier.training.module import ClassifierModule
from image_classifier.training.transfer.activations import KeptActivations
from image_classifier.training.transfer.candidates import (
    PROBE,
    Candidate,
    CandidateChoice,
    ProbeStart,
    interpolated,
    val_logits,
)
from image_classifier.training.transfer.probe import Probe, install
from image_classifier.training.transfer.refit_network import refit_network

log = logging.getLogger(__name__)

_FOLDS = 5


@dataclass(frozen=True)
class Refit:
    """How a model was fitted again to train and val, and scores on val that are honest.

    Attributes:
        val_logits: Float32 [M, K] of the val images, from models that were not fitted to them.
        folds: Of a probe: the number of regressions that predict val, each a fold that it was not fitted to.
        epochs: Of a network: the epochs on both splits.
    """

    val_logits: np.ndarray
    folds: int = 0
    epochs: int = 0


def refit(
    start: ProbeStart,
    choice: CandidateChoice,
    module: ClassifierModule,
    classifier: Classifier,
    inputs: TrainingInputs,
    kept: KeptActivations | None,
    epochs: int,
    directory: Path,
) -> Refit | None:
    """Fit the chosen model, which is in `classifier`, again to train and val; None where that cannot be.

    Args:
        start: Where the training began.
        choice: The candidates, with their predictions of val.
        module: The training.
        classifier: Its network.
        inputs: What the training is built from.
        kept: Activations below the trained layers, if any.
        epochs: That the network was trained for.
        directory: Of the run.
    """
    manifest, seed, chosen = inputs.manifest, inputs.config.run.seed, choice.chosen
    if chosen.name == PROBE:
        found = from_rank_zero(lambda: refit_probe(start.fitted, manifest, seed))
        if found is None:
            return None
        install(found.model, classifier)
        return Refit(found.val_logits, folds=found.folds)
    if world_size() > 1:
        log.info("refit: none, several processes train")
        return None
    # The end of the training is trained further. Then it is interpolated again at the chosen share, with a probe of all
    # images.
    classifier.load_state_dict(start.trained)
    more = refit_network(module, inputs, kept, epochs, directory)
    if chosen.share < 1:
        end = {name: value.clone() for name, value in classifier.state_dict().items()}
        classifier.load_state_dict(start.weights)
        install(_fitted(start.fitted, manifest, seed, _both(manifest)), classifier)
        classifier.load_state_dict(interpolated(classifier.state_dict(), end, chosen.share))
    # Val is no longer held out, but a model that was fitted to these images and knows fewer of them has diverged.
    if not _is_as_good(classifier, chosen, inputs, kept):
        log.warning("refit: it made the model worse on val, so the one from before is delivered: lower optimizer.lr")
        classifier.load_state_dict(start.weights_at(chosen.share))
        return None
    return Refit(chosen.val.logits, epochs=more)


def _is_as_good(
    classifier: Classifier, chosen: Candidate, inputs: TrainingInputs, kept: KeptActivations | None
) -> bool:
    """Return whether the classifier is right on as many val images as the chosen candidate."""
    if not all(torch.isfinite(value).all() for value in classifier.state_dict().values()):
        return False
    right = val_logits(classifier, inputs, kept).argmax(axis=1) == chosen.val.targets
    return bool(right.mean() >= chosen.accuracy)


@dataclass(frozen=True)
class ProbeRefit:
    """A regression fitted to train and val.

    Attributes:
        model: Of all these images.
        val_logits: Float32 [M, K] of the val images, each from a regression that was fitted without its fold.
        folds: Their number.
    """

    model: LinearModel
    val_logits: np.ndarray
    folds: int


def refit_probe(probe: Probe, manifest: Manifest, seed: int) -> ProbeRefit | None:
    """Fit the probe to train and val at the strength that was chosen; None where they make no two folds of two classes.

    Images of one group (copies, near-duplicates, one patient) are in one fold.
    """
    val = manifest.indices("val")
    rows = _both(manifest)
    groups = np.unique(manifest.groups[rows], return_inverse=True)[1]
    folds = min(_FOLDS, int(groups.max()) + 1)
    if folds < 2:
        return None

    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    scores = np.zeros((len(val), len(manifest.classes)), dtype=np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # its images are in fewer folds
        parts = list(split.split(rows, manifest.targets[rows], groups))
    if any(len(np.unique(manifest.targets[rows[rest]])) < 2 for rest, _ in parts):
        return None
    for rest, held_out in parts:
        predicted = np.intersect1d(rows[held_out], val)
        if len(predicted):
            models = {probe.strength: _fitted(probe, manifest, seed, rows[rest])}
            logits = logits_of(models, probe.store, manifest, predicted)[probe.strength]
            scores[np.searchsorted(val, predicted)] = logits
    log.info("probe: fitted again to train and val, %d images; its val scores are of %d folds", len(rows), folds)
    return ProbeRefit(_fitted(probe, manifest, seed, rows), scores, folds)


def _fitted(probe: Probe, manifest: Manifest, seed: int, rows: np.ndarray) -> LinearModel:
    """Return the regression on some images, at the strength that was chosen."""
    return fit_logistic(probe.store, manifest, seed, rows, (probe.strength,))[probe.strength]


def _both(manifest: Manifest) -> np.ndarray:
    """Return the rows of train and val, int64 [N], in order."""
    return np.sort(np.concatenate([manifest.indices("train"), manifest.indices("val")]))
