"""The verb `train`: from a configuration to a bundle, read top to bottom."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from image_classifier.cli import hydra_app
from image_classifier.dataset.audit.issues import issue_counts_text
from image_classifier.dataset.pixel_cache import open_cache
from image_classifier.dataset.prepare import DataSettings
from image_classifier.dataset.run import prepare_from
from image_classifier.errors import ConfigError, DataError
from image_classifier.evaluation.reliability.ood import Detector, looks
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.predictions import PredictionTable
from image_classifier.training.autotune import autotune, check_choices
from image_classifier.training.baseline import baselines_of_run
from image_classifier.training.builders import (
    build_datamodule,
    build_module,
    build_trainer,
    check_optimisation,
    speed_settings,
)
from image_classifier.training.bundle_writer import write_bundle
from image_classifier.training.calibrate import calibrate, decision_settings, fit_decision, fit_detector
from image_classifier.training.callbacks.checkpoints import final_checkpoint
from image_classifier.training.callbacks.csv_metrics import CSVMetrics
from image_classifier.training.callbacks.exact_resume import ExactResume
from image_classifier.training.callbacks.nan_guard import NanGuard, check_on_nan
from image_classifier.training.callbacks.preemption import SignalHandler, StopOnSignal
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.diagnostics import diagnostics_settings, run_diagnostics
from image_classifier.training.distributed import (
    broadcast,
    check_rank_shares,
    first_on_each_node,
    from_rank_zero,
    gather_rows,
    is_rank_zero,
    process_group,
    seed_per_rank,
)
from image_classifier.training.hardware import choose_hardware
from image_classifier.training.initial_weights import resolve_initial_weights
from image_classifier.training.launch import run_ranks, uses_gpu
from image_classifier.training.loggers import RunLoggers
from image_classifier.training.module import ClassifierModule
from image_classifier.training.reporting import log_outcome, summarise, write_results
from image_classifier.training.resume import (
    ResumePoint,
    find_resume_point,
    new_overrides,
    prune_later_checkpoints,
    run_fingerprint,
    run_notes,
    score_if_finished,
    training_length,
    validate_resume,
)
from image_classifier.training.run_dir import RunDir, RunSettings, acquire_run_dir, buffered_log, mark_finished

log = logging.getLogger(__name__)


def train(config: Any) -> float:
    """Run one training from data to bundle; returns the F1 that a sweep compares: of val, never of test."""
    asked, line = _run_settings(config), hydra_app.running_line("train").overrides
    if going := find_resume_point(asked, line):
        config = _as_begun(config, going, line)
        score = score_if_finished(going, _flat(config), asked.resume)
        if score is not None:
            return score
    config.resume = None
    check_on_nan(config.trainer.on_nan)
    check_choices(config)
    check_optimisation(config)
    decision_settings(config)
    diagnostics_settings(config)
    devices = hydra_app.to_plain(config.trainer)
    if run_ranks(devices["accelerator"], devices["devices"], devices.get("num_nodes", 1)):
        return math.nan  # the ranks did it
    with process_group(uses_gpu(devices["accelerator"])):
        return broadcast(_train_joined(config, going, line))


def _as_begun(config: Any, going: ResumePoint, line: Sequence[str]) -> Any:
    """The settings with which a run began, and what the command line gives anew."""
    if going.directory is None:
        return config
    place = {"name": going.directory.name, "run_dir": str(going.directory)}
    anew = new_overrides(going.directory, line)
    config = hydra_app.replaced(
        hydra_app.resumed(hydra_app.replaced(config, place), going.directory / "config.yaml", anew), place
    )
    keys = {item.partition("=")[0] for item in anew}
    if "trainer.max_time" in keys and "trainer.max_steps" not in keys and config.trainer.max_epochs is None:
        config.trainer.max_steps = -1  # the steps that were planned for the old time are planned anew
    return config


def _run_settings(config: Any) -> RunSettings:
    return hydra_app.typed(RunSettings, hydra_app.only(config, *(item.name for item in fields(RunSettings))), "")


def _train_joined(config: Any, going: ResumePoint | None, line: Sequence[str]) -> float | None:
    """The training as each rank sees it; the main one returns the F1."""
    signals = SignalHandler()
    with signals.caught():
        return _prepare_and_train(config, going, line, signals)


def _prepare_and_train(
    config: Any, going: ResumePoint | None, line: Sequence[str], signals: SignalHandler
) -> float | None:
    with buffered_log() as early:
        first_on_each_node(lambda: resolve_initial_weights(config))
        manifest, data = from_rank_zero(lambda: prepare_from(config))
    if not len(manifest.indices("val")):
        raise DataError(
            "there is no val part to choose the best epoch by", "set data.split.val above 0, or add a val/ folder"
        )
    if data.batch_size != "auto":
        check_rank_shares(data.batch_size, len(manifest.indices("train")), len(manifest.indices("val")))
    name = f"{data.name or manifest.root.resolve().name}-{config.model.name}"
    going = from_rank_zero(
        lambda: validate_resume(going, run_fingerprint(manifest, _flat(config)), _flat(config)) if going else None
    )
    claim = partial(
        acquire_run_dir,
        _run_settings(config),
        name,
        early,
        run_notes(going, line, _flat(config)),
        going.directory if going else None,
    )
    with claim() if is_rank_zero() else nullcontext() as claimed:
        run = broadcast(claimed)
        config.name, config.run_dir = run.name, str(run.directory)
        if is_rank_zero():
            hydra_app.save(config, run.directory / "config.yaml")
        return _train(config, run, manifest, data, going, signals)


def _train(
    config: Any, run: RunDir, manifest: Manifest, data: DataSettings, going: ResumePoint | None, signals: SignalHandler
) -> float | None:
    if is_rank_zero() and going:
        prune_later_checkpoints(going)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    hardware = choose_hardware(speed_settings(config))
    cache = first_on_each_node(
        lambda: open_cache(manifest, data.preprocess, data.cache, data.limits, progress=sys.stderr.isatty())
    )
    data, hardware = autotune(config, manifest, data, cache, hardware, run.plots)
    if is_rank_zero():
        hydra_app.save(
            config, run.directory / "config.yaml"
        )  # with what was found, so that a resumed run need not look again
    datamodule = build_datamodule(config, manifest, data, cache, hardware)
    module = build_module(config, manifest, data, cache, hardware)
    baselines = from_rank_zero(
        lambda: baselines_of_run(config, module.classifier, manifest, data, cache, hardware, run.plots, run.resumed)
    )
    seed_per_rank(config.seed)
    throughput = Throughput()
    history = CSVMetrics(run.directory / "metrics.csv", throughput)
    state = ExactResume(run_fingerprint(manifest, _flat(config)), going is not None and going.longer)
    trainer = build_trainer(
        config,
        hardware,
        throughput,
        history,
        state,
        StopOnSignal(signals),
        NanGuard(config.trainer.on_nan, run.directory),
    )
    loggers = RunLoggers(trainer.loggers)
    loggers.go_on_as(run.key, run.resumed)
    try:
        corrected = {"corrected": issue_counts_text(manifest.corrected)} if manifest.corrected else {}
        loggers.begin(
            _flat(config), {"manifest_sha256": manifest.sha256, "run_folder": str(run.directory), **corrected}
        )
        with signals.deferred():
            _fit(trainer, module, datamodule, going.checkpoint if going else None)
        classifier = _best_classifier(trainer, module)
        asked = decision_settings(config)
        detector = from_rank_zero(lambda: fit_detector(classifier, manifest, cache, asked))
        tables = {
            split: _predict(classifier, detector, datamodule, manifest, split)
            for split in _judged_parts(config, manifest)
        }
        if not is_rank_zero():
            return None
        tables = calibrate(tables)
        decision = fit_decision(tables["val"], asked)
        results = write_results(
            run, manifest, tables, history, baselines, decision, _run_settings(config).plots, data.limits
        )
        judged, seen = tables[results.judged], trainer.current_epoch * len(manifest.indices("train"))
        run_diagnostics(
            classifier, judged, manifest.part(results.judged), run, data, diagnostics_settings(config), seen
        )
        blueprint = {
            **module.hparams["blueprint"],
            "temperature": tables["val"].temperature,
            "decision": decision.as_dict(),
        }
        facts = write_bundle(
            classifier,
            blueprint,
            run,
            manifest,
            cache,
            results,
            baselines,
            config,
            throughput.images_per_second,
            decision,
            detector,
        )
        mark_finished(run, results.score, training_length(_flat(config)))
        log_outcome(loggers, run, results, tables, baselines, facts, trainer)
    except BaseException as error:
        loggers.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    summarise(run, results, baselines, throughput, loggers.where(), has_test_part=bool(len(manifest.indices("test"))))
    return results.score


def _judged_parts(config: Any, manifest: Manifest) -> list[str]:
    return [split for split in SPLITS[1:] if len(manifest.indices(split)) and (split == "val" or config.test)]


def _flat(config: Any) -> dict[str, Any]:
    """All settings by dotted key, for logs and comparisons."""
    return hydra_app.flatten(hydra_app.without_passwords(hydra_app.to_plain(config)))


def _fit(trainer: pl.Trainer, module: ClassifierModule, datamodule: ImageDataModule, start: Path | None) -> None:
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise _explained(error, trainer) from error
    if trainer.interrupted:
        raise KeyboardInterrupt


def _explained(error: Exception, trainer: pl.Trainer) -> Exception:
    """A wrong setting that shows only while training, as one line; anything else is a bug and stays as it is."""
    if "conditioned on metric" in str(error) and "val/loss" not in trainer.callback_metrics:
        return ConfigError(
            "the run ended before its first validation",
            "let it train a whole epoch, or set callbacks.early_stopping=null",
        )
    if isinstance(error, MisconfigurationException) or "conditioned on metric" in str(error):
        return ConfigError(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return ConfigError(
            "the memory of the GPU is full", "lower data.batch_size, or let it be found with data.batch_size=auto"
        )
    if "does not have a deterministic implementation" in str(error):
        return ConfigError(str(error).partition(".")[0], "set trainer.deterministic=warn, or choose another network")
    if "Expected more than 1 value per channel" in str(error):
        return ConfigError(
            "batch normalisation needs more than one value a channel", "raise data.batch_size or data.image_size"
        )
    return error


def _best_classifier(trainer: pl.Trainer, module: ClassifierModule) -> Classifier:
    """The classifier with the weights of the best epoch (else the newest), in float32 on the training device."""
    path, classifier = from_rank_zero(lambda: final_checkpoint(trainer)), module.whole_classifier()
    if path:
        state = from_rank_zero(lambda: torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
        prefix = "classifier."
        classifier.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        )
    return classifier.eval().float().to(trainer.strategy.root_device)


def _predict(
    classifier: Classifier, detector: Detector | None, datamodule: ImageDataModule, manifest: Manifest, split: str
) -> PredictionTable:
    device, logits, scores = classifier.scale.device, [], []
    with torch.inference_mode():
        parts = (
            part
            for pixels, _ in datamodule.in_order(split)
            for part in pixels.split(-(-len(pixels) // classifier.num_views))
        )
        for part in parts:
            answers, embeddings = classifier.answer(part.to(device))
            logits.append(answers.cpu())
            scores.append(
                torch.from_numpy(detector.scores(embeddings.cpu().numpy(), looks(part.cpu().numpy())))
                if detector
                else torch.zeros(len(answers))
            )
        whole, unlike = gather_rows(logits).numpy(), gather_rows(scores).numpy()
    rows = manifest.indices(split)
    paths = tuple(manifest.paths[row] for row in rows)
    return PredictionTable(
        paths, manifest.targets[rows], whole, manifest.classes, ood_scores=unlike if detector else None
    )
