"""Builds the objects of a training from its configuration: data module, network, losses, optimizer, Trainer."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, WeightAveraging
from pytorch_lightning.loggers.logger import DummyLogger, Logger
from torch import nn

from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.dataset.settings import DataSettings
from image_classifier.errors import ConfigError
from image_classifier.instantiate import instantiate
from image_classifier.manifest import Manifest
from image_classifier.modeling.backbones import pretrained_normalise
from image_classifier.modeling.classifier import Classifier, build_classifier, check_sizes
from image_classifier.modeling.weights import last_linear
from image_classifier.sampling import evenly_spaced
from image_classifier.training.balance import class_weights
from image_classifier.training.balance import describe as describe_balance
from image_classifier.training.callbacks.order import in_hook_order
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.callbacks.torch_compile import TorchCompile
from image_classifier.training.checkpoint_io import SafeCheckpointIO
from image_classifier.training.config import AUTO, ModelConfig, Node, TrainConfig, TrainerConfig
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.distillation import Distillation, build_teacher
from image_classifier.training.distributed import SyncCallback, cluster_environment, is_rank_zero, rank_info, world_size
from image_classifier.training.hardware import Hardware
from image_classifier.training.initial_weights import build_backbone, initial_weights, pretrained_settings
from image_classifier.training.launch import uses_gpu
from image_classifier.training.module import ClassifierModule
from image_classifier.training.optimizers.freezing import describe as describe_trained
from image_classifier.training.optimizers.freezing import freeze
from image_classifier.training.optimizers.groups import parameter_groups
from image_classifier.training.optimizers.schedules import (
    OptimizerFactory,
    SchedulerSettings,
    build_optimizer_and_schedule,
)
from image_classifier.training.progress import ImagesProgressBar
from image_classifier.training.sharding import is_sharded

log = logging.getLogger(__name__)

_NUM_PIXELS_TO_FIT = 5000 * 32 * 32


@dataclass(frozen=True)
class NetworkInputs:
    """What a network is built from, with or without a training."""

    model: ModelConfig
    data: DataSettings
    manifest: Manifest
    cache: PixelCache
    hardware: Hardware
    seed: int


@dataclass(frozen=True)
class TrainingInputs:
    """What a training is built from: its configuration, the images, and what this machine is good at.

    The cache holds the images of the manifest, then the unlabelled ones of `distillation`.
    """

    config: TrainConfig
    manifest: Manifest
    cache: PixelCache
    hardware: Hardware
    distillation: Distillation | None = None

    @property
    def network(self) -> NetworkInputs:
        """The part of it that the network is built from."""
        config = self.config
        return NetworkInputs(config.model, config.data, self.manifest, self.cache, self.hardware, seed=config.run.seed)


def build_datamodule(inputs: TrainingInputs) -> ImageDataModule:
    """Return the data module over the cached pixels of all splits."""
    config = inputs.config
    augment = config.build(config.augment, "augment")
    if config.views > 1 and augment is None:
        raise ConfigError(
            f"loss.views={config.views} compares two augmentations of each image, and there is no augmentation",
            "choose an augment, or set loss.views=1",
        )
    return ImageDataModule(
        inputs.cache,
        inputs.manifest,
        config.data.batch_size,
        augment,
        config.run.seed,
        inputs.hardware.channels_last,
        balanced=config.data.balance == "sampler",
        views=config.views,
        progressive_sizes=config.data.progressive_sizes,
        unlabelled=inputs.distillation.paths if inputs.distillation else (),
    )


def build_module(inputs: TrainingInputs) -> ClassifierModule:
    """Return the classifier with its losses, optimizer and scheduler.

    Raises:
        ConfigError: A node cannot be built.
    """
    config, manifest = inputs.config, inputs.manifest
    classifier, blueprint = build_network(inputs.network)
    targets = manifest.targets[manifest.indices("train")]
    log.info(describe_balance(config.data.balance, targets, manifest.classes))
    criterion, val_criterion = build_criteria(
        config.loss,
        targets,
        len(manifest.classes),
        balance=config.data.balance,
        is_mixed=bool((config.augment or {}).get("mix")),
        trusted=config.run.trusted_packages,
    )
    # A loss of embeddings has layers of its own, as wide as the network's last one.
    if attach := getattr(criterion, "attach", None):
        attach(last_linear(classifier.head).in_features)
    make_optimizer, scheduler = _optimizer_and_scheduler(config)
    frozen = freeze(classifier, config.model.freeze)
    log.info(describe_trained(classifier, frozen))
    return ClassifierModule(
        classifier,
        criterion=criterion,
        val_criterion=val_criterion,
        make_optimizer=as_fast_as(inputs.hardware, make_optimizer),
        scheduler=scheduler,
        classes=manifest.classes,
        blueprint=blueprint,
        layer_decay=config.optimizer.layer_decay,
        frozen=frozen,
        keep_norm_stats=config.finetune.keep_norm_stats,
        teacher=build_teacher(inputs.distillation, config.model, criterion, manifest.classes, inputs.hardware),
    )


def rebuild_optimizer(module: ClassifierModule, inputs: TrainingInputs) -> None:
    """Give a module that has not been trained yet the optimizer and the schedule of other settings."""
    make_optimizer, module.scheduler = _optimizer_and_scheduler(inputs.config)
    module.make_optimizer = as_fast_as(inputs.hardware, make_optimizer)


def check_optimisation(config: TrainConfig) -> None:
    """Check optimizer, scheduler and averaging before any data is read, by building them for a small network.

    Raises:
        ConfigError: One of them cannot be built.
    """
    for name in ("averaging", "unfreeze"):
        config.build(config.callbacks.get(name), f"callbacks.{name}")
    if config.optimizer.lr == AUTO:
        config = config.with_values({"optimizer.lr": 1e-3})
    make_optimizer, scheduler = _optimizer_and_scheduler(config)
    small = nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    groups = parameter_groups(small, None, config.optimizer.layer_decay)
    build_optimizer_and_schedule(make_optimizer, groups, scheduler, num_steps=1000)


def _optimizer_and_scheduler(config: TrainConfig) -> tuple[OptimizerFactory, SchedulerSettings]:
    moves = config.scheduler
    build = config.build(moves.build, "scheduler.build")
    scheduler = SchedulerSettings(build, moves.interval, moves.length, moves.monitor, moves.warmup)
    return config.build(config.optimizer.node, "optimizer"), scheduler


def build_network(inputs: NetworkInputs) -> tuple[Classifier, dict[str, Any]]:
    """Return the classifier, and its blueprint: plain containers from which a checkpoint is read back."""
    model, data, rows = inputs.model, inputs.data, inputs.manifest.indices("train")
    backbone = build_backbone(model)
    mean, std = _normalise(model, backbone, inputs.cache, rows)
    classes = inputs.manifest.classes
    classifier = build_classifier(backbone, len(classes), data.image_size, mean, std, model.head_dropout, model.tta)
    check_sizes(backbone, data.progressive_sizes or ())
    # A whitened network computes its first layer from images.
    if fit_to := getattr(backbone, "fit_to", None):
        fit_to(_some_images(inputs.cache, rows, mean, std))
    origin = initial_weights(model, classifier, classes)
    if inputs.hardware.channels_last:
        classifier = classifier.to(memory_format=torch.channels_last)
    blueprint = {
        "classes": list(classes),
        "preprocess": data.preprocess.as_dict(),
        "normalise": {"mean": mean, "std": std},
        "backbone": model.backbone,
        "head_dropout": model.head_dropout,
        "tta": model.tta,
        "initial_weights": origin.as_dict(),
    }
    return classifier, blueprint


def build_trainer(
    config: TrainConfig, hardware: Hardware, throughput: Throughput, *callbacks: pl.Callback
) -> pl.Trainer:
    """Return Lightning's Trainer with our callbacks before the configured ones."""
    _check_precision(hardware.precision)
    has_bar = sys.stderr.isatty() and is_rank_zero()
    ours = [throughput, *callbacks, *([ImagesProgressBar(throughput)] if has_bar else [])]
    everyone = in_hook_order([*ours, *_configured_callbacks(config), *_extra_callbacks(hardware)])
    _quiet_lightning()
    trainer: pl.Trainer = instantiate(
        config.trainer.node,
        key="trainer",
        trusted=config.run.trusted_packages,
        precision=hardware.precision,
        callbacks=everyone,
        # Without a checkpoint callback Lightning would add one of its own.
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in everyone),
        logger=(build_loggers(config) or False) if is_rank_zero() else False,
        plugins=[SafeCheckpointIO(), cluster_environment()],
        **_scale(config.trainer),
        enable_progress_bar=has_bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        benchmark=hardware.benchmark or None,
        log_every_n_steps=1,
    )
    if is_sharded(trainer.strategy) and any(isinstance(callback, WeightAveraging) for callback in everyone):
        raise ConfigError(
            "trainer=fsdp cannot average weights: each process holds only a part of them",
            "use trainer=ddp, or callbacks=default",
        )
    if not is_rank_zero():
        trainer.logger = DummyLogger()  # some callbacks refuse a Trainer without a logger
    return trainer


def _check_precision(precision: str) -> None:
    if precision.endswith("-true") and precision not in ("32-true", "64-true"):
        raise ConfigError(
            f"trainer.precision={precision} would round the pixels", f"use {precision.replace('true', 'mixed')}"
        )


def _configured_callbacks(config: TrainConfig) -> list[pl.Callback]:
    return [config.build(node, f"callbacks.{name}") for name, node in config.callbacks.items()]


def _extra_callbacks(hardware: Hardware) -> list[pl.Callback]:
    compiling: list[pl.Callback] = [TorchCompile(at_once=hardware.compile is True)] if hardware.compile else []
    return [*compiling, *([SyncCallback()] if world_size() > 1 else [])]


def _scale(trainer: TrainerConfig) -> dict[str, Any]:
    """Return the Trainer's arguments that depend on the number of processes, which the launcher decided."""
    here, on_gpu = rank_info(), uses_gpu(trainer.accelerator)
    is_alone = here.world_size == 1
    # conf/trainer/ddp.yaml and fsdp.yaml name a strategy for several processes; a single one needs none.
    is_for_many = trainer.strategy == "ddp" or "_target_" in (trainer.strategy or "")
    strategy = {"strategy": AUTO} if is_alone and is_for_many else {}
    synced = trainer.sync_batchnorm
    if synced == AUTO:
        synced = on_gpu and not is_alone  # torch joins the statistics on GPUs only
    devices = 1 if is_alone else here.local_world_size
    return {**strategy, "devices": devices, "num_nodes": here.nodes, "sync_batchnorm": synced}


def as_fast_as(hardware: Hardware, make_optimizer: Callable[..., torch.optim.Optimizer]) -> OptimizerFactory:
    """Return the optimizer's factory with `fused` or `exact` set, where it takes them and the user set nothing else.

    `fused` updates all parameters in one pass over memory; `exact` keeps a float32 run's products in float32.
    """
    known = inspect.signature(make_optimizer).parameters
    given = set(getattr(make_optimizer, "keywords", {}))
    if hardware.fused and "fused" in known and not given & {"fused", "foreach", "capturable", "differentiable"}:
        return partial(make_optimizer, fused=True)
    if hardware.precision.endswith("-true") and "exact" in known and "exact" not in given:
        return partial(make_optimizer, exact=True)
    return make_optimizer


def _some_images(cache: PixelCache, rows: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
    """Return normalised images [N, 3, S, S], evenly spread over the training rows; fewer where images are large."""
    count = min(len(rows), max(64, _NUM_PIXELS_TO_FIT // cache.size**2))
    chosen = rows[evenly_spaced(len(rows), count)]
    pixels = torch.from_numpy(cache.gather(chosen)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def build_loggers(config: TrainConfig) -> list[Logger]:
    """Return the configured loggers."""
    loggers = [config.build(node, key) for key, node in config.loggers.items()]
    return [logger for logger in loggers if logger]


def build_criteria(
    node: Node,
    targets: np.ndarray,
    num_classes: int,
    *,
    balance: str = "none",
    is_mixed: bool = False,
    trusted: Sequence[str] = (),
) -> tuple[nn.Module, nn.Module]:
    """Return the losses of training and of validation.

    Only the first has class weights, so that `val/loss` means the same in every run.

    Args:
        node: The section `loss`.
        targets: The classes of the training images, int64 [N].
        num_classes: Of the data set.
        balance: `data.balance`; "weights" weighs the classes.
        is_mixed: Whether images are mixed, so that targets are class probabilities.
        trusted: The user's own packages that a `_target_` may name.

    Raises:
        ConfigError: The loss takes no class weights, too few of them, or no mixed targets.
    """
    criterion = instantiate(node, key="loss", trusted=trusted)
    val_criterion = instantiate(node, key="loss", trusted=trusted)
    if balance == "weights":
        _weigh(criterion, node, class_weights(targets, num_classes))
    if getattr(criterion, "weight", None) is not None and len(criterion.weight) != num_classes:
        raise ConfigError(
            f"loss.weight has {len(criterion.weight)} numbers for {num_classes} classes",
            "give one number per class, or null",
        )
    if getattr(val_criterion, "weight", None) is not None:
        val_criterion.weight = None
    if is_mixed:
        _check_takes_mixed(criterion, node, num_classes)
    return criterion, val_criterion


def _check_takes_mixed(criterion: nn.Module, node: Node, num_classes: int) -> None:
    try:
        criterion(torch.zeros(2, num_classes), torch.full((2, num_classes), 1 / num_classes))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(
            f"loss: {node['_target_']} takes one class per image, and augment.mix gives shares of several",
            "use loss=cross_entropy, or augment.mix=null",
        ) from error


def _weigh(criterion: nn.Module, node: Node, weights: np.ndarray) -> None:
    """Set the loss's class weights [C], as torch's losses keep them: in a buffer `weight`."""
    if "weight" not in inspect.signature(type(criterion)).parameters or not hasattr(criterion, "weight"):
        raise ConfigError(
            f"loss: {node['_target_']} takes no class weights, which data.balance=weights needs",
            "use data.balance=sampler",
        )
    if getattr(criterion, "weight", None) is not None:
        raise ConfigError("loss.weight is given, and data.balance=weights would replace it", "leave one of them out")
    criterion.weight = torch.from_numpy(weights)


def _normalise(
    model: ModelConfig, backbone: nn.Module, cache: PixelCache, rows: np.ndarray
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of pixels in 0..1, per channel, as `model.normalise` asks."""
    wanted = model.normalise
    if isinstance(wanted, Mapping):
        return list(wanted["mean"]), list(wanted["std"])
    if wanted not in (AUTO, "dataset", "backbone"):
        raise ConfigError(
            f"model.normalise={wanted!r} is unknown", "use auto, dataset, backbone, or {mean: [...], std: [...]}"
        )
    pretrained = pretrained_normalise(backbone, pretrained_settings(model))
    if wanted == "backbone" and pretrained is None:
        raise ConfigError(
            "model.normalise=backbone, but the backbone is not pretrained or does not know its mean and std",
            "use dataset",
        )
    if pretrained is not None and wanted != "dataset":
        log.info("normalise: the backbone's own mean and std")
        return pretrained
    log.info("normalise: mean and std of the training images")
    return cache.mean_std(rows)


def _quiet_lightning() -> None:
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The pixels are cached and read in whole batches: loader workers would only take cores from the training.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning's own, on torch 2.14.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning)
    # What we log is that of all ranks already.
    warnings.filterwarnings("ignore", message=".*recommended to use .self.log.*sync_dist.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
