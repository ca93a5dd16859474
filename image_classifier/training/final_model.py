"""The finished model of a training: the best epoch's weights, and its predictions for a split."""

from __future__ import annotations

import numpy as np
import pytorch_lightning as pl
import torch

from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.evaluation.reliability.ood import Detector, looks
from image_classifier.inference.predictor import EmbeddingBackend
from image_classifier.manifest import Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.embeddings import EmbeddingStore
from image_classifier.predictions import PredictionTable
from image_classifier.training.calibrate import looks_of
from image_classifier.training.callbacks.checkpoints import final_checkpoint
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.distributed import from_rank_zero, gather_rows
from image_classifier.training.forward import BATCH
from image_classifier.training.module import ClassifierModule

_PREFIX = "classifier."  # of the classifier's weights in a checkpoint


def best_classifier(trainer: pl.Trainer, module: ClassifierModule) -> Classifier:
    """Return the classifier with the weights of the best epoch (else the newest), in float32 on the training device."""
    path = from_rank_zero(lambda: final_checkpoint(trainer))
    classifier = module.whole_classifier()
    if path:
        state = from_rank_zero(lambda: torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
        weights = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        classifier.load_state_dict(weights)
    return classifier.eval().float().to(trainer.strategy.root_device)


def predict_split(
    backend: EmbeddingBackend, detector: Detector | None, datamodule: ImageDataModule, manifest: Manifest, split: str
) -> PredictionTable:
    """Return the predictions for a split in manifest order, on every rank; ood scores need a detector."""
    logits: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    for batch, _ in datamodule.in_order(split):
        for part in torch.split(batch, BATCH):
            pixels = np.ascontiguousarray(part.numpy())
            part_logits, embeddings = backend.logits_and_embeddings(pixels)
            unlike = detector.scores(embeddings, looks(pixels)) if detector else np.zeros(len(pixels), np.float32)
            logits.append(torch.from_numpy(part_logits))
            scores.append(torch.from_numpy(unlike))
    all_logits, all_scores = gather_rows(logits).numpy(), gather_rows(scores).numpy()
    return _table(manifest, split, all_logits, all_scores if detector else None)


def predict_known(
    classifier: Classifier,
    known: EmbeddingStore,
    detector: Detector | None,
    cache: PixelCache,
    manifest: Manifest,
    split: str,
) -> PredictionTable:
    """Return what `predict_split` does, by the last layer from embeddings that the backbone computed before."""
    rows = manifest.indices(split)
    embeddings = known.of(manifest.digests[rows])
    with torch.inference_mode():
        logits = classifier.classify(torch.from_numpy(embeddings).to(classifier.scale.device)).cpu().numpy()
    return _table(manifest, split, logits, detector.scores(embeddings, looks_of(rows, cache)) if detector else None)


def _table(manifest: Manifest, split: str, logits: np.ndarray, ood_scores: np.ndarray | None) -> PredictionTable:
    rows = manifest.indices(split)
    paths = tuple(manifest.paths[row] for row in rows)
    return PredictionTable(paths, manifest.targets[rows], logits, manifest.classes, ood_scores=ood_scores)
