"""Baselines: what simple classifiers reach on the same split, for a model to beat."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.pixel_cache import open_cache, pixels_key
from image_classifier.dataset.run import prepare_dataset
from image_classifier.dataset.settings import DataSettings
from image_classifier.errors import DataError
from image_classifier.evaluation.baselines import (
    LOGISTIC,
    Baseline,
    evaluated,
    known_baseline,
    most_frequent_of,
    write_baselines,
)
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.embeddings import EmbeddingStore, embed, fingerprint, known_embeddings
from image_classifier.predictions import PredictionTable, softmax
from image_classifier.training.builders import NetworkInputs, TrainingInputs, build_network
from image_classifier.training.config import ModelConfig
from image_classifier.training.forward import fast_backend, forward
from image_classifier.training.hardware import Hardware, choose_channels_last, choose_precision
from image_classifier.training.initial_weights import resolve_initial_weights
from image_classifier.training.run_dir import RunDir

log = logging.getLogger(__name__)

_FORMAT = 2
_STRENGTHS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)  # C of scikit-learn, the most regularised first
_MAX_NUMBERS = 2**28  # of training features in memory, 1 GiB
_MAX_ITER = 300
_NEVER = -1e4  # logit of a class that a regression was fitted to no image of


@dataclass(frozen=True)
class BaselineSettings:
    """The keys at the root of conf/baseline.yaml."""

    name: str | None = None
    seed: int = 0
    precision: str | int = "auto"
    accelerator: str = "auto"
    plots_dir: str = "plots"
    models_dir: str = "models"
    trusted_packages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BaselineScores:
    """The baselines, and the file with their scores."""

    baselines: tuple[Baseline, ...]
    path: Path


@dataclass(frozen=True)
class LinearModel:
    """Logistic regression on standardised features [N, D]: (features - mean) / std @ weights [D, K] + bias [K]."""

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return logits float32 [N, K] of features [N, D]."""
        logits: np.ndarray = (features - self.mean) / self.std @ self.weights + self.bias
        return logits


def evaluate_baselines(
    settings: BaselineSettings, model: ModelConfig, data: DataSettings, audit: AuditSettings
) -> BaselineScores:
    """Evaluate the most frequent class and logistic regression on a backbone's embeddings, and write baselines.json.

    Raises:
        DataError: There are no val images.
        CheckpointError: The backbone's weights are missing.
    """
    model = resolve_initial_weights(model, data.image_size)
    manifest, _ = prepare_dataset(data, audit, settings.trusted_packages)
    if not len(manifest.indices("val")):
        raise DataError(
            "there are no val images to choose the regression's strength by",
            "set data.split.val above 0, or add a val/ folder",
        )
    hardware = embedding_hardware(settings.precision, settings.accelerator)
    inputs, classifier = embedding_network(model, data, manifest, hardware, settings.seed, settings.accelerator)
    baselines = (most_frequent_of(manifest), logistic(inputs, classifier))
    name = settings.name or f"{data.name or manifest.root.resolve().name}-{model.name}".replace("/", "-")
    path = write_baselines(baselines, manifest.sha256, Path(settings.plots_dir) / name)
    return BaselineScores(baselines, path)


def embedding_hardware(precision: str | int, accelerator: str) -> Hardware:
    """Return what makes embedding fast on this machine; the log has the number format and why."""
    number = choose_precision(str(precision), accelerator)
    log.info("precision: %s (%s)", number.value, number.reason)
    return Hardware(str(number.value), bool(choose_channels_last("auto", number.value, accelerator).value))


def embedding_network(
    model: ModelConfig, data: DataSettings, manifest: Manifest, hardware: Hardware, seed: int, accelerator: str
) -> tuple[NetworkInputs, Classifier]:
    """Return a network with its initial weights on its device, and what it was built from."""
    cache = open_cache(manifest, data.preprocess, data.cache, data.limits, progress=sys.stderr.isatty())
    pl.seed_everything(seed, workers=True, verbose=False)
    inputs = NetworkInputs(model, data, manifest, cache, hardware, seed)
    classifier, _ = build_network(inputs)
    return inputs, classifier.to(device_of(accelerator))


def baselines_of_run(inputs: TrainingInputs, classifier: Classifier, run: RunDir) -> tuple[Baseline, ...]:
    """Return what a training is compared with: the most frequent class, and logistic regression if its scores exist.

    With `baselines=true` the regression is fitted to the embeddings of the run's own backbone before training; the
    run's plots folder keeps its scores.
    """
    config, sha256 = inputs.config, inputs.manifest.sha256
    plots_dir = Path(config.run.plots_dir)
    simplest, known = most_frequent_of(inputs.manifest), known_baseline(plots_dir, sha256, LOGISTIC)
    if config.run.baselines and not (run.resumed and known):
        device = classifier.scale.device
        fitted = logistic(inputs.network, classifier.to(device_of(config.trainer.accelerator)))
        classifier.to(device)
        write_baselines((simplest, fitted), sha256, run.plots)
        known = known_baseline(plots_dir, sha256, LOGISTIC)
    return (simplest, known) if known else (simplest,)


def logistic(inputs: NetworkInputs, classifier: Classifier) -> Baseline:
    """Return logistic regression on the backbone's embeddings, with the strength that predicts best on val.

    Embeddings are computed once and kept.
    """
    store = embeddings_of(inputs, classifier)
    models = fit_logistic(store, inputs.manifest, inputs.seed)
    tables = tables_of(models, store, inputs.manifest)
    strength = best_by_log_loss(tables)
    num_features = len(models[strength].mean)
    origin = f"{inputs.model.name} ({_origin(inputs.model, inputs.seed)})"
    features = f"{num_features} features of {origin} at {inputs.data.image_size} px"
    return evaluated(LOGISTIC, f"logistic regression (C={strength:g}) on {features}", tables[strength])


def embeddings_of(inputs: NetworkInputs, classifier: Classifier) -> EmbeddingStore:
    """Return the backbone's embeddings of all images, computed where they are not kept yet."""
    data, gather = inputs.data, inputs.cache.gather
    on_gpu = classifier.scale.device.type != "cpu"
    precision = inputs.hardware.precision if on_gpu else "32-true"
    network = fingerprint(classifier, dict(inputs.model.backbone or {}), precision)
    key = hashlib.sha256(json.dumps([_FORMAT, pixels_key(data.preprocess), network]).encode()).hexdigest()[:16]

    def embed_rows(rows: np.ndarray) -> Iterator[np.ndarray]:
        if on_gpu:
            yield from embed(classifier, rows, gather, precision, inputs.hardware.channels_last)
        else:
            backend = fast_backend(classifier, data.image_size, len(rows))
            yield from (embeddings for _, _, embeddings in forward(backend, rows, gather))

    return known_embeddings(embed_rows, inputs.manifest.digests, Path(data.cache.dir) / "embeddings" / key)


def fit_logistic(
    store: EmbeddingStore,
    manifest: Manifest,
    seed: int,
    rows: np.ndarray | None = None,
    strengths: Sequence[float] = _STRENGTHS,
) -> dict[float, LinearModel]:
    """Return a regression for each strength C, fitted to the embeddings of some images, at most 1 GiB of them.

    Args:
        store: The embeddings.
        manifest: The images.
        seed: Chooses among more images than fit into memory.
        rows: The images that it is fitted to, int64 [n]; None: the training images.
        strengths: The most regularised first.
    """
    rows, features = _features(store, manifest, manifest.indices("train") if rows is None else rows, seed)
    mean, std = _standardise(features)
    models = {}
    # Each fit starts from the weights of the one before.
    regression = LogisticRegression(C=1.0, warm_start=True, max_iter=_MAX_ITER)
    for strength in strengths:
        start = time.perf_counter()
        # Several threads wait for each other longer than they work: 50 times longer on a busy machine.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # logged below
            regression.set_params(C=strength).fit(features, manifest.targets[rows])
        steps, seconds = int(regression.n_iter_.max()), time.perf_counter() - start
        note = "" if steps < _MAX_ITER else ", not converged"
        log.debug("logistic regression: C=%g fitted in %.1f s (%d steps%s)", strength, seconds, steps, note)
        models[strength] = _linear_model(regression, mean, std, len(manifest.classes))
    return models


def _linear_model(regression: LogisticRegression, mean: np.ndarray, std: np.ndarray, num_classes: int) -> LinearModel:
    """Return a fitted regression for all classes; those without an image get no probability."""
    weights, bias = regression.coef_.T.astype(np.float32), regression.intercept_.astype(np.float32)
    if weights.shape[1] == 1:  # two classes: scikit-learn keeps the difference
        weights, bias = np.hstack([0 * weights, weights]), np.append(np.float32(0), bias)
    all_weights = np.zeros((len(mean), num_classes), dtype=np.float32)
    all_bias = np.full(num_classes, _NEVER, dtype=np.float32)
    all_weights[:, regression.classes_], all_bias[regression.classes_] = weights, bias
    return LinearModel(mean, std, all_weights, all_bias)


def _standardise(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Subtract the mean from features [N, D] and divide by their deviation, in place; return both, float32 [D]."""
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    features -= mean
    std = np.sqrt(np.einsum("ij,ij->j", features, features, dtype=np.float64) / len(features)).astype(np.float32)
    std[std < 1e-12] = 1
    features /= std
    return mean, std


def _features(store: EmbeddingStore, manifest: Manifest, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows int64 [n] and their embeddings float32 [n, D]: all, or a sample that fits into memory."""
    features: np.ndarray | None = None
    for positions, part in store.parts(manifest.digests[rows]):
        if features is None:
            limit = _MAX_NUMBERS // part.shape[1]
            if len(rows) > limit:
                log.info("logistic regression: fitted to %d of the %d training images", limit, len(rows))
                return _features(store, manifest, _sampled(rows, manifest.targets[rows], limit, seed), seed)
            features = np.empty((len(rows), part.shape[1]), dtype=np.float32)
        features[positions] = part
    if features is None:
        raise DataError("there are no training images to fit a baseline to", "lower data.split.val and data.split.test")
    return rows, features


def _sampled(rows: np.ndarray, targets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return at most `count` of the rows, in order: one of each class, the others decided by the seed."""
    order = np.random.default_rng(seed).permutation(len(rows))
    firsts = np.unique(targets[order], return_index=True)[1]
    chosen = np.unique(np.concatenate([firsts, np.setdiff1d(np.arange(len(rows)), firsts)])[:count])
    return np.asarray(np.sort(rows[order[chosen]]))


def tables_of(
    models: Mapping[float, LinearModel], store: EmbeddingStore, manifest: Manifest
) -> dict[float, dict[str, PredictionTable]]:
    """Return each regression's predictions of val and test."""
    rows = {split: manifest.indices(split) for split in SPLITS[1:] if len(manifest.indices(split))}
    logits = {split: logits_of(models, store, manifest, split_rows) for split, split_rows in rows.items()}
    return {
        strength: {
            split: PredictionTable(
                tuple(manifest.paths[row] for row in split_rows.tolist()),
                manifest.targets[split_rows],
                logits[split][strength],
                manifest.classes,
            )
            for split, split_rows in rows.items()
        }
        for strength in models
    }


def best_by_log_loss(tables: Mapping[float, Mapping[str, PredictionTable]]) -> float:
    """Return the strength with the smallest log loss on val."""
    losses = {strength: log_loss(by_split["val"]) for strength, by_split in tables.items()}
    shown = ", ".join(f"{loss:.3f} with C={strength:g}" for strength, loss in losses.items())
    log.info("logistic regression: val log loss %s", shown)
    return min(losses, key=lambda strength: losses[strength])


def log_loss(table: PredictionTable) -> float:
    """Return the mean negative log-likelihood of the true classes, in nats, without a temperature."""
    likelihood = softmax(table.logits)[np.arange(len(table.targets)), table.targets]
    return float(-np.log(np.maximum(likelihood, 1e-12)).mean())


def logits_of(
    models: Mapping[float, LinearModel], store: EmbeddingStore, manifest: Manifest, rows: np.ndarray
) -> dict[float, np.ndarray]:
    """Return each model's logits float32 [n, C] of some rows, in one pass over their embeddings."""
    logits = {strength: np.empty((len(rows), len(manifest.classes)), np.float32) for strength in models}
    for positions, features in store.parts(manifest.digests[rows]):
        for strength, model in models.items():
            logits[strength][positions] = model.logits(features)
    return logits


def _origin(model: ModelConfig, seed: int) -> str:
    """Return where the weights of a network come from, in words."""
    if model.bundle:
        return f"of the bundle {Path(model.bundle).name}"
    if model.weights:
        return f"weights of {Path(model.weights).name}"
    backbone = model.backbone or {}
    is_pretrained = backbone.get("pretrained") or backbone.get("weights")
    return "pretrained" if is_pretrained else f"random weights, seed {seed}"


def device_of(accelerator: str) -> torch.device:
    """Return the device of a network that Lightning does not place."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if accelerator in ("auto", "mps") and torch.backends.mps.is_available() else "cpu")
