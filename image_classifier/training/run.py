"""The composition root of training: from a configuration to a bundle, read top to bottom."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from image_classifier import settings
from image_classifier.dataset.cache import PixelCache, open_cache
from image_classifier.dataset.prepare import DataSettings
from image_classifier.dataset.run import prepare_from
from image_classifier.errors import ConfigError
from image_classifier.evaluation.metrics import Metrics, compute_metrics
from image_classifier.evaluation.plots import plot_learning_curves
from image_classifier.evaluation.results import metrics_lines, write_evaluation
from image_classifier.files import write_text
from image_classifier.images import Preprocess
from image_classifier.modeling.backbones import pretrained_normalise
from image_classifier.modeling.classifier import Classifier, build_classifier
from image_classifier.records import Manifest, PredictionTable
from image_classifier.training.callbacks import RunHistory, StopOnBadLoss, Throughput
from image_classifier.training.checkpoint_io import SafeCheckpointIO
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.delivery import deliver
from image_classifier.training.hardware import choose_channels_last, choose_precision
from image_classifier.training.module import ClassifierModule, SchedulerSettings
from image_classifier.training.progress import ImagesProgressBar
from image_classifier.training.run_folder import RunFolder, claim_run

log = logging.getLogger(__name__)


def train(config: Any) -> float:
    """Run one training from data to bundle; returns the F1 that a sweep compares: of val, never of test."""
    manifest, data = prepare_from(config)
    folders = (Path(config.runs_dir), Path(config.models_dir), Path(config.plots_dir))
    default = f"{data.name or manifest.root.resolve().name}-{config.model.name}".replace("/", "-").lstrip(".")
    with claim_run(config.name, default, *folders, config.overwrite) as run:
        config.name = run.name
        config.run_dir = str(run.directory)
        settings.save(config, run.directory / "config.yaml")
        return _train(config, run, manifest, data)


def _train(config: Any, run: RunFolder, manifest: Manifest, data: DataSettings) -> float:
    pl.seed_everything(config.seed, workers=True, verbose=False)
    preprocess = data.preprocess
    cache = open_cache(manifest, preprocess, data.cache, progress=sys.stderr.isatty())
    rows = {split: manifest.indices(split) for split in ("train", "val", "test")}
    augment = settings.instantiate(config.augment, trusted=config.trusted_packages) if _given(config.augment) else None
    datamodule = ImageDataModule(cache, manifest.targets, rows, data.batch_size, augment, config.seed)
    module = build_module(config, manifest, cache, rows, preprocess)
    history, throughput = RunHistory(run.directory / "metrics.csv"), Throughput()
    trainer = build_trainer(config, [history, throughput, StopOnBadLoss()])
    tracker = next((logger.tracker for logger in trainer.loggers if hasattr(logger, "tracker")), None)
    if tracker:
        tracker.log_params(settings.flatten(settings.to_plain(config)))
        tracker.set_tags({"manifest_sha256": manifest.sha256, "run_folder": str(run.directory)})
    try:
        _fit(trainer, module, datamodule)
        best = _best_weights(trainer, module)
        tables = {split: _predict(best, datamodule, manifest, split) for split in ("val", "test") if len(rows[split])}
        metrics = {split: compute_metrics(table) for split, table in tables.items()}
        _write_results(run, manifest, tables, metrics, history)
        deliver(best, module.hparams["blueprint"], run, manifest, cache, metrics, config, throughput.images_per_second, tracker)
    except BaseException as error:
        if tracker:
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    _summarise(run, metrics, throughput, tracker.where if tracker else "off (logger=none)")
    return metrics["val"].f1_macro


def build_module(config: Any, manifest: Manifest, cache: PixelCache, rows: dict[str, Any], preprocess: Preprocess) -> ClassifierModule:
    trusted = config.trusted_packages
    backbone = settings.instantiate(config.model.backbone, trusted=trusted)
    plain = settings.to_plain(config.model)
    mean, std = _normalise(plain["normalise"], backbone, plain["backbone"], cache, rows["train"])
    classifier = build_classifier(backbone, len(manifest.classes), preprocess.size, mean, std, plain["head_dropout"])
    blueprint = {
        "classes": list(manifest.classes),
        "preprocess": preprocess.as_dict(),
        "normalise": {"mean": mean, "std": std},
        "backbone": plain["backbone"],
        "head_dropout": plain["head_dropout"],
    }
    layout = choose_channels_last(config.trainer.channels_last, config.trainer.accelerator)
    if layout.value:
        classifier = classifier.to(memory_format=torch.channels_last)
    log.info("memory layout: %s (%s)", "channels last" if layout.value else "channels first", layout.reason)
    criterion = settings.instantiate(config.loss, trusted=trusted)
    scheduler = SchedulerSettings(
        build=settings.instantiate(config.scheduler.build, trusted=trusted) if config.scheduler.build else None,
        interval=config.scheduler.interval,
        length=config.scheduler.length,
        monitor=config.scheduler.monitor,
    )
    return ClassifierModule(classifier, criterion, settings.instantiate(config.optimizer, trusted=trusted), scheduler, manifest.classes, blueprint)


def _normalise(wanted: Any, backbone: torch.nn.Module, plain: dict[str, Any], cache: PixelCache, rows: Any) -> tuple[list[float], list[float]]:
    own = pretrained_normalise(backbone, plain)
    if isinstance(wanted, dict):
        return list(wanted["mean"]), list(wanted["std"])
    if wanted == "backbone" and own is None:
        raise ConfigError("model.normalise=backbone, but the backbone is not pretrained or does not say its mean and std", "use dataset")
    if wanted not in ("auto", "dataset", "backbone"):
        raise ConfigError(f"model.normalise={wanted!r} is unknown", "use auto, dataset, backbone, or {mean: [...], std: [...]}")
    if own is not None and wanted != "dataset":
        log.info("normalise: the backbone's own mean and std")
        return own
    log.info("normalise: mean and std of the training part")
    return cache.mean_std(rows)


def build_trainer(config: Any, callbacks: list[Any]) -> pl.Trainer:
    trusted = config.trusted_packages
    precision = choose_precision(str(config.trainer.precision), config.trainer.accelerator)
    log.info("precision: %s (%s)", precision.value, precision.reason)
    on_terminal = sys.stderr.isatty()
    callbacks += [ImagesProgressBar(next(item for item in callbacks if isinstance(item, Throughput)))] if on_terminal else []
    callbacks += [settings.instantiate(node, trusted=trusted) for node in (config.get("callbacks") or {}).values() if _given(node)]
    logger = settings.instantiate(config.logger, trusted=trusted) if _given(config.get("logger")) else False
    _quiet_lightning()
    return settings.instantiate(
        settings.without(config.trainer, "channels_last"),
        trusted=trusted,
        precision=precision.value,
        callbacks=callbacks,
        logger=logger,
        plugins=[SafeCheckpointIO()],
        enable_progress_bar=on_terminal,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )


def _given(node: Any) -> bool:
    return bool(node) and node.get("_target_") is not None


def _quiet_lightning() -> None:
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The pixels are cached and read in whole batches: loader workers would only take cores from the training.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning)  # Lightning's own, on torch 2.14
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")


def _fit(trainer: pl.Trainer, module: ClassifierModule, datamodule: ImageDataModule) -> None:
    try:
        trainer.fit(module, datamodule=datamodule)
    except (MisconfigurationException, RuntimeError) as error:
        if isinstance(error, MisconfigurationException) or "conditioned on metric" in str(error):
            raise ConfigError(" ".join(str(error).split())) from error
        raise
    if trainer.received_sigterm:
        raise SystemExit(143)  # Lightning itself would end with 0, as if the work were done
    if trainer.interrupted:
        raise KeyboardInterrupt


def _best_weights(trainer: pl.Trainer, module: ClassifierModule) -> Classifier:
    """The classifier of the best epoch, in float32 on the training device."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if path:
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return module.classifier.eval().float().to(trainer.strategy.root_device)


def _predict(classifier: Classifier, datamodule: ImageDataModule, manifest: Manifest, split: str) -> PredictionTable:
    device = classifier.scale.device
    with torch.inference_mode():
        parts = [classifier(pixels.to(device)).cpu() for pixels, _ in datamodule.in_order(split)]
    rows = datamodule.rows[split]
    return PredictionTable(tuple(manifest.records[row].path for row in rows), manifest.targets[rows], torch.cat(parts).numpy(), manifest.classes)


def _write_results(run: RunFolder, manifest: Manifest, tables: dict[str, PredictionTable], metrics: dict[str, Metrics], history: RunHistory) -> None:
    plot_learning_curves(history.curves(), run.plots)
    scores = {split: values.scalars() for split, values in metrics.items()}
    write_text(run.plots / "metrics.json", json.dumps(scores, indent=2) + "\n")
    for split, table in tables.items():
        part = Manifest(manifest.root, tuple(record for record in manifest if record.split == split))
        write_evaluation(table, metrics[split], part, run.plots / split, f"{run.name}, {split}")


def _summarise(run: RunFolder, metrics: dict[str, Metrics], throughput: Throughput, tracking: str) -> None:
    split = "test" if "test" in metrics else "val"
    print("\n".join(metrics_lines(metrics[split], split)))
    if split == "val":
        print("there is no test part: these figures are of the part that chose the best epoch; ask for one with data.split.test=0.1")
    print(f"images/s {throughput.images_per_second:.1f}")
    print(f"bundle   {run.bundle}\nplots    {run.plots}\nMLflow   {tracking}\nlog      {run.directory / 'train.log'}")
    print(f"next     python commands.py infer --checkpoint_name {run.name} --images PATH")
