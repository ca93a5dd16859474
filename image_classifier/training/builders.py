"""From the configuration to the objects of a training: here config stops, below it there are only values."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, WeightAveraging
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn

from image_classifier.cli import hydra_app
from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.dataset.prepare import DataSettings
from image_classifier.errors import ConfigError
from image_classifier.manifest import Manifest
from image_classifier.modeling.backbones import pretrained_normalise
from image_classifier.modeling.classifier import Classifier, build_classifier, check_sizes
from image_classifier.modeling.weights import last_linear
from image_classifier.sampling import evenly_spaced
from image_classifier.training.balance import class_weights, describe
from image_classifier.training.callbacks.order import in_hook_order
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.callbacks.torch_compile import TorchCompile
from image_classifier.training.checkpoint_io import SafeCheckpointIO
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.distributed import SyncCallback, cluster_environment, is_rank_zero, rank_info, world_size
from image_classifier.training.hardware import Hardware, SpeedSettings
from image_classifier.training.initial_weights import build_backbone, initial_weights, pretrained_settings
from image_classifier.training.launch import uses_gpu
from image_classifier.training.module import ClassifierModule
from image_classifier.training.optimizers.freezing import describe as describe_learning
from image_classifier.training.optimizers.freezing import freeze
from image_classifier.training.optimizers.groups import parameter_groups
from image_classifier.training.optimizers.schedules import SchedulerSettings, build_optimizer_and_schedule
from image_classifier.training.progress import ImagesProgressBar
from image_classifier.training.sharding import is_sharded

log = logging.getLogger(__name__)


OWN_TRAINER_KEYS = ("channels_last", "speed", "compile", "on_nan")  # of conf/trainer; all others are Lightning's
_NUM_PIXELS_TO_FIT = 5000 * 32 * 32


def speed_settings(config: Any) -> SpeedSettings:
    """The keys of `trainer` that decide how fast a step is."""
    keys = (item.name for item in fields(SpeedSettings))
    return hydra_app.typed(SpeedSettings, hydra_app.only(config.trainer, *keys), "trainer")


def build_datamodule(
    config: Any, manifest: Manifest, data: DataSettings, cache: PixelCache, hardware: Hardware
) -> ImageDataModule:
    """The data module over the cached pixels of all splits."""
    augment, views = _instantiate(config, config.augment), (config.get("loss") or {}).get("views") or 1
    if views > 1 and augment is None:
        raise ConfigError(
            f"loss.views={views} sees each image in two augmentations, and there is none",
            "choose an augment, or set loss.views=1",
        )
    balanced, sizes = data.balance == "sampler", data.progressive_sizes
    return ImageDataModule(
        cache, manifest, data.batch_size, augment, config.seed, hardware.channels_last, balanced, views, sizes
    )


def build_module(
    config: Any, manifest: Manifest, data: DataSettings, cache: PixelCache, hardware: Hardware
) -> ClassifierModule:
    """The classifier with its criterion, optimizer and scheduler; ConfigError where a node cannot be built."""
    classifier, blueprint = build_network(config, manifest, data, cache, hardware)
    targets = manifest.targets[manifest.indices("train")]
    log.info(describe(data.balance, targets, manifest.classes))
    criterion, val_criterion = build_criteria(config, targets, len(manifest.classes), data)
    if attach := getattr(criterion, "attach", None):
        attach(last_linear(classifier.head).in_features)
    optimizer, scheduler = _optimizer_and_scheduler(config)
    frozen = freeze(classifier, hydra_app.to_plain(config.model).get("freeze"))
    log.info(describe_learning(classifier, frozen))
    return ClassifierModule(
        classifier,
        criterion,
        as_fast_as(hardware, optimizer),
        scheduler,
        manifest.classes,
        blueprint,
        val_criterion,
        config.optimizer.get("layer_decay", 1.0),
        frozen,
    )


def check_optimisation(config: Any) -> None:
    """Refuse values of optimizer, scheduler and averaging before any data is read, by building them for a small network; ConfigError."""
    for name in ("averaging", "unfreeze"):
        _instantiate(config, (config.get("callbacks") or {}).get(name))
    auto = config.optimizer.get("lr") == "auto"
    optimizer, scheduler = _optimizer_and_scheduler(
        hydra_app.replaced(config, {"optimizer.lr": 1e-3}) if auto else config
    )
    small = nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    build_optimizer_and_schedule(
        optimizer, parameter_groups(small, None, config.optimizer.get("layer_decay", 1.0)), scheduler, num_steps=1000
    )


def _optimizer_and_scheduler(config: Any) -> tuple[Any, SchedulerSettings]:
    moves = config.scheduler
    scheduler = SchedulerSettings(
        _instantiate(config, moves.build), moves.interval, moves.length, moves.monitor, moves.get("warmup", 0.0)
    )
    return _instantiate(config, hydra_app.without(config.optimizer, "layer_decay")), scheduler


def build_network(
    config: Any, manifest: Manifest, data: DataSettings, cache: PixelCache, hardware: Hardware
) -> tuple[Classifier, dict[str, Any]]:
    """The classifier that `config.model` describes, and its blueprint: plain containers from which a checkpoint is read back."""
    backbone = build_backbone(config)
    plain = hydra_app.to_plain(config.model)
    mean, std = _normalise(plain["normalise"], backbone, pretrained_settings(plain), cache, manifest.indices("train"))
    classifier = build_classifier(
        backbone, len(manifest.classes), data.image_size, mean, std, plain["head_dropout"], plain["tta"]
    )
    check_sizes(backbone, data.progressive_sizes or ())
    if hasattr(backbone, "fit_to"):  # a first layer that comes from the data
        backbone.fit_to(_some_images(cache, manifest.indices("train"), mean, std))
    initial_weights(config, classifier, manifest.classes)
    if hardware.channels_last:
        classifier = classifier.to(memory_format=torch.channels_last)
    blueprint = {
        "classes": list(manifest.classes),
        "preprocess": data.preprocess.as_dict(),
        "normalise": {"mean": mean, "std": std},
        "backbone": plain["backbone"],
        "head_dropout": plain["head_dropout"],
        "tta": plain["tta"],
    }
    return classifier, blueprint


def build_trainer(config: Any, hardware: Hardware, throughput: Throughput, *callbacks: pl.Callback) -> pl.Trainer:
    """Lightning's Trainer with our callbacks before the configured ones."""
    if hardware.precision.endswith("-true") and hardware.precision not in ("32-true", "64-true"):
        raise ConfigError(
            f"trainer.precision={hardware.precision} would round the pixels",
            f"use {hardware.precision.replace('true', 'mixed')}",
        )
    on_terminal = sys.stderr.isatty() and is_rank_zero()
    bar = [ImagesProgressBar(throughput)] if on_terminal else []
    configured = [_instantiate(config, node) for node in (config.get("callbacks") or {}).values() if node]
    together = [SyncCallback()] if world_size() > 1 else []
    everyone = in_hook_order([throughput, *callbacks, *bar, *configured, *_compiling(hardware), *together])
    _quiet_lightning()
    trainer: pl.Trainer = hydra_app.instantiate(
        hydra_app.without(config.trainer, *OWN_TRAINER_KEYS),
        trusted=config.trusted_packages,
        precision=hardware.precision,
        callbacks=everyone,
        enable_checkpointing=any(
            isinstance(callback, Checkpoint) for callback in everyone
        ),  # else Lightning adds one of its own
        logger=(_loggers(config) or False) if is_rank_zero() else False,
        plugins=[SafeCheckpointIO(), cluster_environment()],
        **_scale(config.trainer),
        enable_progress_bar=on_terminal,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        benchmark=hardware.benchmark or None,
        log_every_n_steps=1,
    )
    if is_sharded(trainer.strategy) and any(isinstance(callback, WeightAveraging) for callback in everyone):
        raise ConfigError(
            "trainer=fsdp cannot average weights, of which each process holds a part",
            "use trainer=ddp, or callbacks=default",
        )
    if not is_rank_zero():
        trainer.logger = DummyLogger()  # with none at all some callbacks refuse
    return trainer


def _scale(asked: Any) -> dict[str, Any]:
    """How many processes there are, as the launcher decided, and what Lightning is to do about it."""
    here, on_gpu = rank_info(), uses_gpu(asked.accelerator)
    alone = here.world_size == 1
    several = asked.get("strategy") == "ddp" or "_target_" in (
        asked.get("strategy") or ""
    )  # as conf/trainer asks for where there may be several
    strategy = {"strategy": "auto"} if alone and several else {}
    devices = {"devices": 1 if alone else here.local_world_size}
    synced = asked.get("sync_batchnorm", False)
    if synced == "auto":
        synced = on_gpu and not alone  # torch joins the statistics on GPUs only
    return {**strategy, **devices, "num_nodes": here.nodes, "sync_batchnorm": synced}


def _compiling(hardware: Hardware) -> list[pl.Callback]:
    return [TorchCompile(at_once=hardware.compile is True)] if hardware.compile else []


def as_fast_as(hardware: Hardware, make_optimizer: Any) -> Any:
    """The same optimizer: updating all parameters in one pass, and exact in float32 runs, where it can and nothing else was asked for."""
    known, asked = inspect.signature(make_optimizer).parameters, set(getattr(make_optimizer, "keywords", {}))
    if hardware.fused and "fused" in known and not asked & {"fused", "foreach", "capturable", "differentiable"}:
        return partial(make_optimizer, fused=True)
    if hardware.precision.endswith("-true") and "exact" in known and "exact" not in asked:
        return partial(make_optimizer, exact=True)
    return make_optimizer


def _some_images(cache: PixelCache, rows: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
    """Normalised training images [N, 3, S, S], evenly spread over the classes, as they lie in the manifest's order; fewer of large ones."""
    count = min(len(rows), max(64, _NUM_PIXELS_TO_FIT // cache.size**2))
    chosen = rows[evenly_spaced(len(rows), count)]
    pixels = torch.from_numpy(cache.gather(chosen)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def _loggers(config: Any) -> list[Any]:
    """The loggers of `logger`: one node, or several under names of their own."""
    node = config.get("logger") or {}
    nodes = [node] if "_target_" in node else [item for item in node.values() if item]
    return [logger for logger in (_instantiate(config, item) for item in nodes) if logger]


def _instantiate(config: Any, node: Any) -> Any:
    return hydra_app.instantiate(node, trusted=config.trusted_packages) if node else None


def build_criteria(
    config: Any, targets: np.ndarray, num_classes: int, data: DataSettings
) -> tuple[nn.Module, nn.Module]:
    """The losses of training and of validation, for the classes int64 [N] of the training rows.

    Only the first has class weights, so that `val/loss` means the same in every run; it must take mixed targets where images are mixed.
    """
    criterion, val_criterion = _instantiate(config, config.loss), _instantiate(config, config.loss)
    if data.balance == "weights":
        _weigh(criterion, config.loss, class_weights(targets, num_classes))
    if getattr(criterion, "weight", None) is not None and len(criterion.weight) != num_classes:
        raise ConfigError(
            f"loss.weight has {len(criterion.weight)} numbers for {num_classes} classes",
            "give one number a class, or null",
        )
    if getattr(val_criterion, "weight", None) is not None:
        val_criterion.weight = None
    if hydra_app.to_plain(config.augment).get("mix"):
        try:
            criterion(torch.zeros(2, num_classes), torch.full((2, num_classes), 1 / num_classes))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            fact = f"loss: {config.loss._target_} takes one class an image, and augment.mix gives shares of several"
            raise ConfigError(fact, "use loss=cross_entropy, or augment.mix=null") from error
    return criterion, val_criterion


def _weigh(criterion: nn.Module, node: Any, weights: np.ndarray) -> None:
    """Set the loss's class weights, as torch's losses keep them: in a buffer `weight`."""
    if "weight" not in inspect.signature(type(criterion)).parameters or not hasattr(criterion, "weight"):
        raise ConfigError(
            f"loss: {node._target_} takes no class weights, which data.balance=weights needs",
            "use data.balance=sampler",
        )
    if criterion.weight is not None:
        raise ConfigError("loss.weight is given, and data.balance=weights would replace it", "leave one of them out")
    criterion.weight = torch.from_numpy(weights)


def _normalise(
    wanted: Any, backbone: nn.Module, plain: dict[str, Any], cache: PixelCache, rows: np.ndarray
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels in 0..1, per channel, as `model.normalise` asks."""
    if isinstance(wanted, dict):
        return list(wanted["mean"]), list(wanted["std"])
    if wanted not in ("auto", "dataset", "backbone"):
        raise ConfigError(
            f"model.normalise={wanted!r} is unknown", "use auto, dataset, backbone, or {mean: [...], std: [...]}"
        )
    own = pretrained_normalise(backbone, plain)
    if wanted == "backbone" and own is None:
        raise ConfigError(
            "model.normalise=backbone, but the backbone is not pretrained or does not say its mean and std",
            "use dataset",
        )
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
    warnings.filterwarnings(
        "ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning
    )  # Lightning's own, on torch 2.14
    warnings.filterwarnings(
        "ignore", message=".*recommended to use .self.log.*sync_dist.*"
    )  # what we log is that of all ranks already
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
