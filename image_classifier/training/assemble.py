"""From the configuration to the objects of a training: here config stops, below it there are only values."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from image_classifier import settings
from image_classifier.dataset.cache import PixelCache
from image_classifier.dataset.prepare import DataSettings
from image_classifier.errors import ConfigError
from image_classifier.modeling.backbones import pretrained_normalise
from image_classifier.modeling.classifier import build_classifier
from image_classifier.records import Manifest
from image_classifier.training.balance import class_weights, describe
from image_classifier.training.callbacks import Throughput
from image_classifier.training.checkpoint_io import SafeCheckpointIO
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.hardware import Hardware
from image_classifier.training.module import ClassifierModule, SchedulerSettings
from image_classifier.training.progress import ImagesProgressBar

log = logging.getLogger(__name__)


def build_datamodule(config: Any, manifest: Manifest, data: DataSettings, cache: PixelCache, hardware: Hardware) -> ImageDataModule:
    """The data module over the cached pixels of all splits."""
    augment = _instantiate(config, config.augment)
    return ImageDataModule(cache, manifest, data.batch_size, augment, config.seed, hardware.channels_last, data.balance == "sampler")


def build_module(config: Any, manifest: Manifest, data: DataSettings, cache: PixelCache, hardware: Hardware) -> ClassifierModule:
    """The classifier with its criterion, optimizer and scheduler; ConfigError where a node cannot be built."""
    backbone = _instantiate(config, config.model.backbone)
    plain = settings.to_plain(config.model)
    mean, std = _normalise(plain["normalise"], backbone, plain["backbone"], cache, manifest.indices("train"))
    classifier = build_classifier(backbone, len(manifest.classes), data.image_size, mean, std, plain["head_dropout"])
    if hardware.channels_last:
        classifier = classifier.to(memory_format=torch.channels_last)
    blueprint = {
        "classes": list(manifest.classes),
        "preprocess": data.preprocess.as_dict(),
        "normalise": {"mean": mean, "std": std},
        "backbone": plain["backbone"],
        "head_dropout": plain["head_dropout"],
    }
    moves = config.scheduler
    scheduler = SchedulerSettings(_instantiate(config, moves.build), moves.interval, moves.length, moves.monitor)
    targets = manifest.targets[manifest.indices("train")]
    log.info(describe(data.balance, targets, manifest.classes))
    criterion, val_criterion = build_criteria(config, targets, len(manifest.classes), data)
    optimizer = _instantiate(config, config.optimizer)
    return ClassifierModule(classifier, criterion, optimizer, scheduler, manifest.classes, blueprint, val_criterion)


def build_trainer(config: Any, hardware: Hardware, throughput: Throughput, *callbacks: pl.Callback) -> pl.Trainer:
    """Lightning's Trainer with our callbacks before the configured ones."""
    if hardware.precision.endswith("-true") and hardware.precision not in ("32-true", "64-true"):
        raise ConfigError(f"trainer.precision={hardware.precision} would round the pixels", f"use {hardware.precision.replace('true', 'mixed')}")
    on_terminal = sys.stderr.isatty()
    bar = [ImagesProgressBar(throughput)] if on_terminal else []
    configured = [_instantiate(config, node) for node in (config.get("callbacks") or {}).values() if node]
    _quiet_lightning()
    trainer: pl.Trainer = settings.instantiate(
        settings.without(config.trainer, "channels_last"),
        trusted=config.trusted_packages,
        precision=hardware.precision,
        callbacks=[throughput, *callbacks, *bar, *configured],
        logger=_instantiate(config, config.get("logger")) or False,
        plugins=[SafeCheckpointIO()],
        enable_progress_bar=on_terminal,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    if trainer.world_size > 1:
        raise ConfigError(f"one run uses one device, and trainer.devices asks for {trainer.world_size}", "set trainer.devices=1")
    return trainer


def _instantiate(config: Any, node: Any) -> Any:
    return settings.instantiate(node, trusted=config.trusted_packages) if node else None


def build_criteria(config: Any, targets: np.ndarray, num_classes: int, data: DataSettings) -> tuple[nn.Module, nn.Module]:
    """The losses of training and of validation, for the classes int64 [N] of the training rows.

    Only the first has class weights, so that `val/loss` means the same in every run; it must take mixed targets where images are mixed.
    """
    criterion, val_criterion = _instantiate(config, config.loss), _instantiate(config, config.loss)
    if data.balance == "weights":
        _weigh(criterion, config.loss, class_weights(targets, num_classes))
    if settings.to_plain(config.augment).get("mix"):
        try:
            criterion(torch.zeros(2, num_classes), torch.full((2, num_classes), 1 / num_classes))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            fact = f"loss: {config.loss._target_} takes one class an image, and augment.mix gives shares of several"
            raise ConfigError(fact, "use loss=cross_entropy, or augment.mix=null") from error
    return criterion, val_criterion


def _weigh(criterion: nn.Module, node: Any, weights: np.ndarray) -> None:
    """Set the loss's class weights, as torch's losses keep them: in a buffer `weight`."""
    if "weight" not in inspect.signature(type(criterion)).parameters or not hasattr(criterion, "weight"):
        raise ConfigError(f"loss: {node._target_} takes no class weights, which data.balance=weights needs", "use data.balance=sampler")
    if criterion.weight is not None:
        raise ConfigError("loss.weight is given, and data.balance=weights would replace it", "leave one of them out")
    criterion.weight = torch.from_numpy(weights)


def _normalise(wanted: Any, backbone: nn.Module, plain: dict[str, Any], cache: PixelCache, rows: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels in 0..1, per channel, as `model.normalise` asks."""
    if isinstance(wanted, dict):
        return list(wanted["mean"]), list(wanted["std"])
    if wanted not in ("auto", "dataset", "backbone"):
        raise ConfigError(f"model.normalise={wanted!r} is unknown", "use auto, dataset, backbone, or {mean: [...], std: [...]}")
    own = pretrained_normalise(backbone, plain)
    if wanted == "backbone" and own is None:
        raise ConfigError("model.normalise=backbone, but the backbone is not pretrained or does not say its mean and std", "use dataset")
    if own is not None and wanted != "dataset":
        log.info("normalise: the backbone's own mean and std")
        return own
    log.info("normalise: mean and std of the training part")
    return cache.mean_std(rows)


def _quiet_lightning() -> None:
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The pixels are cached and read in whole batches: loader workers would only take cores from the training.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning)  # Lightning's own, on torch 2.14
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
