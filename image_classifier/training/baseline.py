"""The verb `baseline`: what simple classifiers reach on the same split, for a model to beat. `train` shows their scores beside its own."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from image_classifier.cli import hydra_app
from image_classifier.dataset.pixel_cache import PixelCache, open_cache, pixels_key
from image_classifier.dataset.prepare import DataSettings
from image_classifier.dataset.run import prepare_from
from image_classifier.errors import DataError
from image_classifier.evaluation.baselines import (
    LOGISTIC,
    Baseline,
    judged,
    known_baseline,
    lines,
    most_frequent_of,
    write_baselines,
)
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.embeddings import EmbeddingStore, fingerprint, known_embeddings
from image_classifier.predictions import PredictionTable
from image_classifier.training.builders import build_network
from image_classifier.training.hardware import Hardware, choose_channels_last, choose_precision
from image_classifier.training.initial_weights import resolve_initial_weights

log = logging.getLogger(__name__)

_FORMAT = 1
_STRENGTHS = (
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
)  # C of scikit-learn, weakest weights first: each fit starts from the one before
_MOST_NUMBERS = 2**28  # of training features in memory, 1 GiB
_MAX_ITER = 300


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
class LinearModel:
    """Logistic regression on standardised features [N, D]: logits = (features - mean) / std @ weights + bias, with weights [D, K]."""

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Logits float32 [N, K] of features [N, D]."""
        answers: np.ndarray = (features - self.mean) / self.std @ self.weights + self.bias
        return answers


def baseline(config: Any) -> Path:
    """Judge the most frequent class and logistic regression on a backbone's embeddings; prints a table and writes baselines.json."""
    asked = hydra_app.typed(BaselineSettings, hydra_app.only(config, *BaselineSettings.__dataclass_fields__), "")
    resolve_initial_weights(config)
    manifest, data = prepare_from(config)
    if not len(manifest.indices("val")):
        raise DataError(
            "there is no val part to choose the regression's strength by",
            "set data.split.val above 0, or add a val/ folder",
        )
    number = choose_precision(str(asked.precision), asked.accelerator)
    log.info("precision: %s (%s)", number.value, number.reason)
    hardware = Hardware(str(number.value), bool(choose_channels_last("auto", number.value, asked.accelerator).value))
    cache = open_cache(manifest, data.preprocess, data.cache, data.limits, progress=sys.stderr.isatty())
    pl.seed_everything(asked.seed, workers=True, verbose=False)
    classifier, _ = build_network(config, manifest, data, cache, hardware)
    found = (
        most_frequent_of(manifest),
        logistic(config, classifier.to(device_of(asked.accelerator)), manifest, data, cache, hardware),
    )
    name = asked.name or f"{data.name or manifest.root.resolve().name}-{config.model.name}".replace("/", "-")
    path = write_baselines(found, manifest.sha256, Path(asked.plots_dir) / name)
    for split in SPLITS[1:]:
        print("\n".join(lines(found, split)))
    print(f"scores   {path}")
    return path


def baselines_of_run(
    config: Any,
    classifier: Classifier,
    manifest: Manifest,
    data: DataSettings,
    cache: PixelCache,
    hardware: Hardware,
    plots: Path,
    resumed: bool,
) -> tuple[Baseline, ...]:
    """What a training is compared with: the most frequent class, and the best logistic regression known for this manifest.

    With `baselines=true` one is computed on the embeddings of the run's own backbone, as it is before training; `plots` takes its scores.
    """
    simplest, known = most_frequent_of(manifest), known_baseline(Path(config.plots_dir), manifest.sha256, LOGISTIC)
    if config.baselines and not (resumed and known):
        before = classifier.scale.device
        computed = logistic(
            config, classifier.to(device_of(config.trainer.accelerator)), manifest, data, cache, hardware
        )
        classifier.to(before)
        write_baselines((simplest, computed), manifest.sha256, plots)
        known = known_baseline(Path(config.plots_dir), manifest.sha256, LOGISTIC)
    return (simplest, known) if known else (simplest,)


def logistic(
    config: Any, classifier: Classifier, manifest: Manifest, data: DataSettings, cache: PixelCache, hardware: Hardware
) -> Baseline:
    """Logistic regression on the backbone's embeddings, of the strength that answers best on val; embeddings are computed once and kept."""
    plain = hydra_app.to_plain(config.model)
    store = embeddings_of(config, classifier, manifest, data, cache, hardware)
    models = fit_logistic(store, manifest, config.seed)
    strength, tables = _chosen(models, store, manifest)
    features = len(models[strength].mean)
    where = f"{features} features of {plain['name']} ({_origin(plain, config.seed)}) at {data.image_size} px"
    return judged(LOGISTIC, f"logistic regression (C={strength:g}) on {where}", tables)


def embeddings_of(
    config: Any, classifier: Classifier, manifest: Manifest, data: DataSettings, cache: PixelCache, hardware: Hardware
) -> EmbeddingStore:
    """The backbone's embeddings of all images, computed where they are not kept yet."""
    network = fingerprint(classifier, hydra_app.to_plain(config.model)["backbone"], hardware.precision)
    key = hashlib.sha256(json.dumps([_FORMAT, pixels_key(data.preprocess), network]).encode()).hexdigest()[:16]
    directory = Path(data.cache.dir) / "embeddings" / key
    return known_embeddings(
        classifier, manifest.digests, cache.gather, directory, hardware.precision, hardware.channels_last
    )


def fit_logistic(store: EmbeddingStore, manifest: Manifest, seed: int) -> dict[float, LinearModel]:
    """A regression for each strength C, fitted to the training part's embeddings, or to as many of them as fit into 1 GiB."""
    rows = manifest.indices("train")
    rows, features = _features(store, manifest, rows, seed)
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    features -= mean
    std = np.sqrt(np.einsum("ij,ij->j", features, features, dtype=np.float64) / len(features)).astype(np.float32)
    std[std < 1e-12] = 1
    features /= std
    models = {}
    regression = LogisticRegression(C=1.0, warm_start=True, max_iter=_MAX_ITER)
    for strength in _STRENGTHS:
        start = time.perf_counter()
        with (
            warnings.catch_warnings(),
            threadpool_limits(1),
        ):  # several wait for each other longer than they work, 50 times so on a busy machine
            warnings.simplefilter("ignore", ConvergenceWarning)  # said below
            regression.set_params(C=strength).fit(features, manifest.targets[rows])
        steps = int(regression.n_iter_.max())
        ended = "" if steps < _MAX_ITER else ", not converged"
        log.info(
            "logistic regression: C=%g fitted in %.1f s (%d steps%s)",
            strength,
            time.perf_counter() - start,
            steps,
            ended,
        )
        weights, bias = regression.coef_.T.astype(np.float32), regression.intercept_.astype(np.float32)
        if weights.shape[1] == 1:  # two classes: scikit-learn keeps the difference
            weights, bias = np.hstack([0 * weights, weights]), np.append(np.float32(0), bias)
        models[strength] = LinearModel(mean, std, weights, bias)
    return models


def _features(store: EmbeddingStore, manifest: Manifest, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [n] and their embeddings float32 [n, D]: all, or with one of each class as many as memory is meant to hold."""
    features: np.ndarray | None = None
    for places, part in store.parts(manifest.digests[rows]):
        if features is None:
            most = _MOST_NUMBERS // part.shape[1]
            if len(rows) > most:
                log.info("logistic regression: fitted to %d of the %d training images", most, len(rows))
                return _features(store, manifest, _sampled(rows, manifest.targets[rows], most, seed), seed)
            features = np.empty((len(rows), part.shape[1]), dtype=np.float32)
        features[places] = part
    if features is None:
        raise DataError("there are no training images to fit a baseline to", "lower data.split.val and data.split.test")
    return rows, features


def _sampled(rows: np.ndarray, targets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` of the rows, decided by the seed, among them one of each class, in order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    firsts = np.unique(targets[order], return_index=True)[1]
    chosen = np.unique(np.concatenate([firsts, np.setdiff1d(np.arange(len(rows)), firsts)])[:count])
    return np.asarray(np.sort(rows[order[chosen]]))


def _chosen(
    models: Mapping[float, LinearModel], store: EmbeddingStore, manifest: Manifest
) -> tuple[float, dict[str, PredictionTable]]:
    """The strength with most right answers on val, the weaker of equals, and its answers for val and test."""
    rows = {split: manifest.indices(split) for split in SPLITS[1:] if len(manifest.indices(split))}
    logits = {
        split: {strength: np.empty((len(part), len(manifest.classes)), np.float32) for strength in models}
        for split, part in rows.items()
    }
    for split, part in rows.items():
        for places, features in store.parts(manifest.digests[part]):
            for strength, model in models.items():
                logits[split][strength][places] = model.logits(features)
    right = {
        strength: (answers.argmax(axis=1) == manifest.targets[rows["val"]]).mean()
        for strength, answers in logits["val"].items()
    }
    log.info(
        "logistic regression: val accuracy %s",
        ", ".join(f"{share:.4f} with C={strength:g}" for strength, share in right.items()),
    )
    best = max(right, key=lambda strength: right[strength])
    tables = {
        split: PredictionTable(("",) * len(part), manifest.targets[part], logits[split][best], manifest.classes)
        for split, part in rows.items()
    }
    return best, tables


def _origin(plain: Mapping[str, Any], seed: int) -> str:
    """Where the weights of a `model` node come from, in words."""
    for key, words in (("from", "of the bundle {}"), ("weights", "weights of {}")):
        if plain.get(key):
            return words.format(Path(str(plain[key])).name)
    pretrained = plain["backbone"].get("pretrained") or plain["backbone"].get("weights")
    return "pretrained" if pretrained else f"random weights, seed {seed}"


def device_of(accelerator: str) -> torch.device:
    """Where a network computes that Lightning does not move."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if accelerator in ("auto", "mps") and torch.backends.mps.is_available() else "cpu")
