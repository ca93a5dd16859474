"""The verb `train`: from a configuration to a bundle, read top to bottom."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from dataclasses import fields
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from image_classifier import settings
from image_classifier.dataset.cache import open_cache
from image_classifier.dataset.prepare import DataSettings
from image_classifier.dataset.run import prepare_from
from image_classifier.errors import ConfigError, DataError
from image_classifier.evaluation.leaks import LeakScore, leak_score
from image_classifier.evaluation.metrics import Metrics, compute_metrics
from image_classifier.evaluation.plots import plot_learning_curves
from image_classifier.evaluation.results import metrics_lines, scalars, write_evaluation
from image_classifier.files import write_text
from image_classifier.modeling.classifier import Classifier
from image_classifier.records import SPLITS, Manifest, PredictionTable
from image_classifier.tracking import Tracker
from image_classifier.training.assemble import build_datamodule, build_module, build_trainer
from image_classifier.training.callbacks import RunHistory, StopOnBadLoss, Throughput
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.delivery import deliver
from image_classifier.training.hardware import choose_hardware
from image_classifier.training.loggers import MLflowLogger
from image_classifier.training.module import ClassifierModule
from image_classifier.training.run_folder import RunFolder, RunSettings, claim_run, remembered_log

log = logging.getLogger(__name__)


def train(config: Any) -> float:
    """Run one training from data to bundle; returns the F1 that a sweep compares: of val, never of test."""
    asked = settings.typed(RunSettings, settings.only(config, *(item.name for item in fields(RunSettings))), "")
    with remembered_log() as early:
        manifest, data = prepare_from(config)
    if not len(manifest.indices("val")):
        raise DataError("there is no val part to choose the best epoch by", "set data.split.val above 0, or add a val/ folder")
    with claim_run(asked, f"{data.name or manifest.root.resolve().name}-{config.model.name}", early) as run:
        config.name, config.run_dir = run.name, str(run.directory)
        settings.save(config, run.directory / "config.yaml")
        return _train(config, run, manifest, data)


def _train(config: Any, run: RunFolder, manifest: Manifest, data: DataSettings) -> float:
    pl.seed_everything(config.seed, workers=True, verbose=False)
    hardware = choose_hardware(config.trainer.precision, config.trainer.channels_last, config.trainer.accelerator)
    cache = open_cache(manifest, data.preprocess, data.cache, data.limits, progress=sys.stderr.isatty())
    datamodule = build_datamodule(config, manifest, data, cache, hardware)
    module = build_module(config, manifest, data, cache, hardware)
    throughput = Throughput()
    history = RunHistory(run.directory / "metrics.csv", throughput)
    trainer = build_trainer(config, hardware, throughput, history, StopOnBadLoss())
    tracker = next((logger.tracker for logger in trainer.loggers if isinstance(logger, MLflowLogger)), None)
    if tracker:
        tracker.log_params(settings.flatten(settings.without_passwords(settings.to_plain(config))))
        tracker.set_tags({"manifest_sha256": manifest.sha256, "run_folder": str(run.directory)})
    try:
        _fit(trainer, module, datamodule)
        classifier = _best_classifier(trainer, module)
        tables = {split: _predict(classifier, datamodule, manifest, split) for split in ("val", "test") if len(manifest.indices(split))}
        metrics = {split: compute_metrics(table) for split, table in tables.items()}
        leaks = {split: leak_score(table, manifest.leaked(split)) for split, table in tables.items()}
        scores = {split: scalars(metrics[split], leaks[split]) for split in tables}
        write_text(run.plots / "metrics.json", json.dumps(scores, indent=2) + "\n")
        _write_results(run, manifest, tables, metrics, leaks, history)
        facts = deliver(classifier, module.hparams["blueprint"], run, manifest, cache, scores, config, throughput.images_per_second)
    except BaseException as error:
        if tracker:
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    if tracker:
        _log_outcome(tracker, run, scores, facts, trainer.current_epoch)
    _summarise(run, metrics, leaks, throughput, tracker.where if tracker else "off")
    return metrics["val"].f1_macro


def _fit(trainer: pl.Trainer, module: ClassifierModule, datamodule: ImageDataModule) -> None:
    try:
        trainer.fit(module, datamodule=datamodule)
    except SIGTERMException:
        log.warning("stopped by SIGTERM at epoch %d; the newest step is in last.ckpt of the run folder", trainer.current_epoch + 1)
        raise SystemExit(143) from None  # Lightning itself would end with 0, as if the work were done
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise _explained(error, trainer) from error
    if trainer.interrupted:
        raise KeyboardInterrupt


def _explained(error: Exception, trainer: pl.Trainer) -> Exception:
    """A wrong setting that shows only while training, as one line; anything else is a bug and stays as it is."""
    if "conditioned on metric" in str(error) and "val/loss" not in trainer.callback_metrics:
        return ConfigError("the run ended before its first validation", "let it train a whole epoch, or set callbacks.early_stopping=null")
    if isinstance(error, MisconfigurationException) or "conditioned on metric" in str(error):
        return ConfigError(str(error))
    if "Expected more than 1 value per channel" in str(error):
        return ConfigError("batch normalisation needs more than one value a channel", "raise data.batch_size or data.image_size")
    return error


def _best_classifier(trainer: pl.Trainer, module: ClassifierModule) -> Classifier:
    """The classifier with the weights of the best epoch, in float32 on the training device."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if path:
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return module.classifier.eval().float().to(trainer.strategy.root_device)


def _predict(classifier: Classifier, datamodule: ImageDataModule, manifest: Manifest, split: str) -> PredictionTable:
    device = classifier.scale.device
    with torch.inference_mode():
        logits = torch.cat([classifier(pixels.to(device)).cpu() for pixels, _ in datamodule.in_order(split)])
    rows = manifest.indices(split)
    return PredictionTable(tuple(manifest.paths[row] for row in rows), manifest.targets[rows], logits.numpy(), manifest.classes)


def _write_results(
    run: RunFolder,
    manifest: Manifest,
    tables: dict[str, PredictionTable],
    metrics: dict[str, Metrics],
    leaks: dict[str, LeakScore | None],
    history: RunHistory,
) -> None:
    plot_learning_curves(history.curves(), run.plots)
    for split, table in tables.items():
        write_evaluation(table, metrics[split], manifest.part(split), run.plots / split, f"{run.name}, {split}", leaks[split])


def _log_outcome(tracker: Tracker, run: RunFolder, scores: dict[str, dict[str, float]], facts: dict[str, Any], epoch: int) -> None:
    tracker.log_metrics({f"test/{name}": value for name, value in scores.get("test", {}).items()}, epoch)
    tracker.set_tags({"git_commit": str(facts["git"]), "bundle": str(run.bundle)})
    tracker.log_artifacts(run.bundle, "bundle")
    tracker.log_artifacts(run.plots, "plots")
    tracker.finish()


def _summarise(run: RunFolder, metrics: dict[str, Metrics], leaks: dict[str, LeakScore | None], throughput: Throughput, tracking: str) -> None:
    split = next(split for split in reversed(SPLITS) if split in metrics)
    print("\n".join(metrics_lines(metrics[split], split, leaks[split])))
    if split == "val":
        print("there is no test part: these figures are of the part that chose the best epoch; ask for one with data.split.test=0.1")
    print(f"images/s {throughput.images_per_second:.1f}")
    print(f"bundle   {run.bundle}\nplots    {run.plots}\nMLflow   {tracking}\nlog      {run.directory / 'train.log'}")
    print(f"next     python commands.py infer --checkpoint_name {shlex.quote(run.name)} --images PATH")
