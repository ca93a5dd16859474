"""The probe: logistic regression on a frozen backbone's embeddings, as the last layer of the network."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from image_classifier.evaluation.baselines import LOGISTIC, Baseline, evaluated
from image_classifier.manifest import Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.embeddings import EmbeddingStore
from image_classifier.modeling.weights import last_linear
from image_classifier.predictions import PredictionTable
from image_classifier.training.baseline import LinearModel, best_by_log_loss, embeddings_of, fit_logistic, tables_of
from image_classifier.training.builders import NetworkInputs
from image_classifier.training.transfer.learning_curve import LearningCurve, learning_curve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """A logistic regression, its strength C, its predictions by split, and what more images would bring.

    Attributes:
        model: Weights [D, K] and bias [K] for embeddings.
        strength: C of scikit-learn, chosen on val.
        tables: Predictions of val and test.
        curve: Accuracy by number of training images.
        store: The embeddings.
        seconds: All of it took.
    """

    model: LinearModel
    strength: float
    tables: dict[str, PredictionTable]
    curve: LearningCurve
    store: EmbeddingStore
    seconds: float

    @property
    def about(self) -> str:
        """What it is, in words."""
        return f"logistic regression (C={self.strength:g}) on {len(self.model.mean)} frozen features"

    def as_baseline(self) -> Baseline:
        """Return it as a baseline that the trained model is compared with."""
        return evaluated(LOGISTIC, self.about, self.tables)


def fit_probe(inputs: NetworkInputs, classifier: Classifier) -> Probe:
    """Fit the regression to the embeddings of the training images, which are computed once and kept.

    Its strength is the one with the smallest log loss on val.
    """
    start = time.perf_counter()
    store, manifest = embeddings_of(inputs, classifier), inputs.manifest
    models = fit_logistic(store, manifest, inputs.seed)
    tables = tables_of(models, store, manifest)
    best = best_by_log_loss(tables)
    curve = learning_curve(*_training(store, manifest), *_validation(store, manifest), best, inputs.seed)
    log.info("probe: %s", curve.sentence(manifest.classes))
    return Probe(models[best], best, tables[best], curve, store, time.perf_counter() - start)


def install(model: LinearModel, classifier: Classifier) -> None:
    """Write the regression into the classifier's last layer."""
    linear = last_linear(classifier.head)
    weight = (model.weights / model.std[:, None]).T  # [K, D]: standardisation and regression as one
    bias = model.bias - weight @ model.mean
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
        linear.bias.copy_(torch.from_numpy(bias))


def _training(store: EmbeddingStore, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    rows = manifest.indices("train")
    return store.of(manifest.digests[rows]), manifest.targets[rows]


def _validation(store: EmbeddingStore, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    rows = manifest.indices("val")
    return store.of(manifest.digests[rows]), manifest.targets[rows]
