"""A training from its configuration to a bundle, read top to bottom."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from image_classifier.atomic_io import write_text
from image_classifier.dataset.audit.issues import issue_counts_text
from image_classifier.dataset.pixel_cache import open_cache
from image_classifier.dataset.unlabelled import find_unlabelled, joined
from image_classifier.errors import ConfigError, DataError
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.training.autotune import autotune, check_choices
from image_classifier.training.baseline import baselines_of_run
from image_classifier.training.builders import (
    TrainingInputs,
    build_datamodule,
    build_module,
    build_trainer,
    check_optimisation,
    rebuild_optimizer,
)
from image_classifier.training.bundle_writer import write_bundle
from image_classifier.training.calibrate import calibrate, fit_decision, fit_detector
from image_classifier.training.callbacks.csv_metrics import CSVMetrics
from image_classifier.training.callbacks.exact_resume import ExactResume
from image_classifier.training.callbacks.nan_guard import NanGuard, check_on_nan
from image_classifier.training.callbacks.preemption import SignalHandler, StopOnSignal
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.config import AUTO, TrainConfig
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.diagnostics import run_diagnostics
from image_classifier.training.distillation import Distillation, find_teacher
from image_classifier.training.distributed import (
    broadcast,
    check_rank_shares,
    first_on_each_node,
    from_rank_zero,
    is_rank_zero,
    process_group,
    seed_per_rank,
)
from image_classifier.training.final_model import best_classifier, predict_known, predict_split
from image_classifier.training.fit import fit
from image_classifier.training.forward import fast_backend
from image_classifier.training.hardware import choose_hardware
from image_classifier.training.launch import needs_ranks, uses_gpu
from image_classifier.training.learning_rate_finder import with_finetuning_rate
from image_classifier.training.loggers import RunLoggers
from image_classifier.training.module import ClassifierModule
from image_classifier.training.reporting import TrainedRun, log_outcome, summary_lines, write_results
from image_classifier.training.resume import (
    ResumePoint,
    prune_later_checkpoints,
    run_fingerprint,
    run_notes,
    training_length,
    validate_resume,
)
from image_classifier.training.run_dir import RunDir, acquire_run_dir, buffered_log, check_name, mark_finished
from image_classifier.training.settle import settled
from image_classifier.training.transfer.activations import KeptActivations, keep_activations, remove_activations
from image_classifier.training.transfer.candidates import PROBE, start_from_probe
from image_classifier.training.transfer.refit import refit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training reached, and where it is.

    Attributes:
        name: Of the run and the bundle.
        score: F1 (macro) on val, which sweeps compare.
        split: The split that `summary` reports: test, else val.
        metrics: By split and name.
        bundle_dir: The model to use.
        run_dir: Checkpoints, metrics.csv, train.log.
        plots_dir: Predictions and figures.
        images_per_second: Training images.
        summary: Lines for a person.
    """

    name: str
    score: float
    split: str
    metrics: dict[str, dict[str, float]]
    bundle_dir: Path
    run_dir: Path
    plots_dir: Path
    images_per_second: float
    summary: tuple[str, ...]


def train(
    config: TrainConfig,
    *,
    resume: ResumePoint | None = None,
    overrides: Sequence[str] = (),
    work: Callable[..., TrainResult | None] | None = None,
) -> TrainResult:
    """Train, evaluate and export a classifier; on several ranks each calls this and gets the same result.

    Args:
        config: Everything that decides the training.
        resume: The run to resume; None: a new one.
        overrides: What the command line gives, kept in run.json so that the run is found again.
        work: What each rank does; None: `train_on_this_rank`.

    Raises:
        ConfigError: Settings that contradict one another or cannot be built.
        DataError: Images that cannot be trained on.
        StorageError: A folder is taken or not writable.
        TrainingError: The loss is not finite, or the exported model predicts something else.
    """
    check_config(config)
    trainer = config.trainer
    if needs_ranks(trainer.accelerator, trainer.devices, trainer.num_nodes):
        raise ConfigError(
            f"trainer.devices={trainer.devices} needs one process per device, which only the verb train starts",
            "set trainer.devices=1",
        )
    with process_group(uses_gpu(trainer.accelerator)):
        signals = SignalHandler()
        with signals.caught():
            result = (work or train_on_this_rank)(config, resume, overrides, signals)
        return broadcast(result)


def check_config(config: TrainConfig) -> None:
    """Check what can be checked before any data is read.

    Raises:
        ConfigError: A setting is wrong.
    """
    check_on_nan(config.trainer.on_nan)
    check_choices(config)
    check_optimisation(config)


def train_on_this_rank(
    config: TrainConfig, resume: ResumePoint | None, overrides: Sequence[str], signals: SignalHandler
) -> TrainResult | None:
    """Prepare the data and take a run folder, then train in it; return the result on rank 0, else None."""
    from_rank_zero(lambda: check_name(config.run, resume.directory if resume else None))
    with buffered_log() as early:
        teacher = first_on_each_node(lambda: find_teacher(config.model))
        config, manifest = settled(config, is_new=resume is None)
        if teacher:
            teacher.check(manifest)
        distillation = Distillation(teacher, _unlabelled(config, manifest)) if teacher else None
    _check_splits(config, manifest)
    resume = from_rank_zero(lambda: _validated(resume, config, manifest, distillation))
    with claimed_run(config, manifest, resume, overrides, early) as (run, config):
        return _train_in(run, config, manifest, distillation, resume, signals)


@contextmanager
def claimed_run(
    config: TrainConfig,
    manifest: Manifest,
    resume: ResumePoint | None,
    overrides: Sequence[str],
    early: Sequence[logging.LogRecord],
) -> Iterator[tuple[RunDir, TrainConfig]]:
    """Take a run folder for the block; yield it, and the configuration with its name, which is saved there."""
    default_name = f"{config.data.name or manifest.root.resolve().name}-{config.model.name}"
    notes = run_notes(resume, overrides, config.flat())
    directory = resume.directory if resume else None
    claim = acquire_run_dir(config.run, default_name, early, notes, directory) if is_rank_zero() else nullcontext()
    with claim as claimed:
        run = broadcast(claimed)
        config = config.with_values({"name": run.name, "run_dir": str(run.directory)})
        _save_config(config, run)
        yield run, config


def _check_splits(config: TrainConfig, manifest: Manifest) -> None:
    num_train, num_val = len(manifest.indices("train")), len(manifest.indices("val"))
    if not num_val:
        raise DataError(
            "there are no val images to choose the best epoch by", "set data.split.val above 0, or add a val/ folder"
        )
    if config.data.batch_size != AUTO:
        check_rank_shares(config.data.batch_size, num_train, num_val)


def _unlabelled(config: TrainConfig, manifest: Manifest) -> Manifest | None:
    given = config.model.unlabelled
    return from_rank_zero(lambda: find_unlabelled(given, config.data, manifest, sys.stderr.isatty())) if given else None


def _validated(
    resume: ResumePoint | None, config: TrainConfig, manifest: Manifest, distillation: Distillation | None
) -> ResumePoint | None:
    return validate_resume(resume, _fingerprint(config, manifest, distillation), config.flat()) if resume else None


def _fingerprint(config: TrainConfig, manifest: Manifest, distillation: Distillation | None) -> dict[str, Any]:
    return run_fingerprint(manifest, config.flat(), distillation.fingerprint if distillation else {})


def _save_config(config: TrainConfig, run: RunDir) -> None:
    if is_rank_zero():
        write_text(run.directory / "config.yaml", config.yaml)


def _train_in(
    run: RunDir,
    config: TrainConfig,
    manifest: Manifest,
    distillation: Distillation | None,
    resume: ResumePoint | None,
    signals: SignalHandler,
) -> TrainResult | None:
    if is_rank_zero() and resume:
        prune_later_checkpoints(resume)
    pl.seed_everything(config.run.seed, workers=True, verbose=False)

    # What the training is made from: pixels, number format, and the values that are found by trying.
    inputs = autotune(training_inputs(config, manifest, distillation), run.plots)
    config = inputs.config
    _save_config(config, run)  # with the values found, so that a resumed run need not find them again

    # The objects of the training, in the order in which they draw random numbers.
    datamodule = build_datamodule(inputs)
    module = build_module(inputs)
    baselines = from_rank_zero(lambda: baselines_of_run(inputs, module.classifier, run))
    probe = start_from_probe(inputs, module.classifier) if config.finetune.probe else None
    inputs, kept = _finetuning(inputs, module, datamodule, run) if config.trainer.max_epochs != 0 else (inputs, None)
    config = inputs.config
    _save_config(config, run)
    seed_per_rank(config.run.seed)
    throughput = Throughput()
    history = CSVMetrics(run.directory / "metrics.csv", throughput)
    fingerprint = _fingerprint(config, manifest, distillation)
    state = ExactResume(fingerprint, resume is not None and resume.longer)
    guard = NanGuard(config.trainer.on_nan, run.directory)
    trainer = build_trainer(config, inputs.hardware, throughput, history, state, StopOnSignal(signals), guard)

    with logged_run(RunLoggers(trainer.loggers), config, manifest, run) as loggers:
        if config.trainer.max_epochs != 0:
            with signals.deferred():
                fit(trainer, module, datamodule, resume.checkpoint if resume else None)

        # The finished model: the best weights, detector of unlike images, predictions.
        classifier = best_classifier(trainer, module)
        choice = probe.choose(classifier, inputs, kept) if probe else None
        is_probe = probe is not None and choice is not None and choice.chosen.name == PROBE
        if probe and not is_probe:
            baselines = (*baselines, probe.fitted.as_baseline())
        epochs, fitted_again = trainer.current_epoch, None
        if probe and choice and config.finetune.refit:
            fitted_again = refit(probe, choice, module, classifier, inputs, kept, epochs, run.directory)
        if kept:
            remove_activations(run.directory)
        backend = cache(partial(fast_backend, classifier, config.data.image_size, len(manifest)))
        known = probe.known_embeddings(classifier) if probe and is_probe else None
        detector = from_rank_zero(lambda: fit_detector(backend, manifest, inputs.cache, config.decision, known))
        splits = _evaluated_splits(config, manifest)
        if known:
            predict = partial(predict_known, classifier, known, detector, inputs.cache, manifest)
        else:
            predict = partial(predict_split, backend(), detector, datamodule, manifest)
        tables = {split: predict(split) for split in splits}
        if fitted_again:
            tables["val"] = replace(tables["val"], logits=fitted_again.val_logits)
        if not is_rank_zero():
            return None

        tables = calibrate(tables)
        decision = fit_decision(tables["val"], config.decision)
        calibration = {"temperature": tables["val"].temperature, "decision": decision.as_dict()}
        trained = TrainedRun(
            run=run,
            inputs=inputs,
            classifier=classifier,
            backend=backend,
            blueprint={**module.hparams["blueprint"], **calibration},
            tables=tables,
            decision=decision,
            detector=detector,
            baselines=baselines,
            probe=probe.fitted if probe else None,
            choice=choice,
            history=history,
            images_per_second=throughput.images_per_second if trainer.global_step else 0.0,
            epochs=epochs,
            steps=trainer.global_step,
            refit=fitted_again,
        )
        return finish(trained, loggers)


def _finetuning(
    inputs: TrainingInputs, module: ClassifierModule, datamodule: ImageDataModule, run: RunDir
) -> tuple[TrainingInputs, KeptActivations | None]:
    """Keep activations, find a learning rate above them where it is auto, and return the inputs with what was found."""
    kept = None
    if inputs.config.finetune.views:
        kept = keep_activations(inputs, module, datamodule, run.directory)
        cut = {"finetune.cut": kept.cut.name if kept else None}
        inputs = replace(inputs, config=inputs.config.with_values(cut))
    if inputs.config.optimizer.lr == AUTO:
        inputs = with_finetuning_rate(inputs, run.plots, kept)
        rebuild_optimizer(module, inputs)
    return inputs, kept


def training_inputs(
    config: TrainConfig, manifest: Manifest, distillation: Distillation | None = None
) -> TrainingInputs:
    """Return what a training is made from, its pixels decoded."""
    data, hardware = config.data, choose_hardware(config.trainer.speed)
    unlabelled = distillation.unlabelled if distillation else None
    images = joined(manifest, unlabelled) if unlabelled else manifest
    cache = first_on_each_node(
        lambda: open_cache(images, data.preprocess, data.cache, data.limits, progress=sys.stderr.isatty())
    )
    return TrainingInputs(config, manifest, cache, hardware, distillation)


@contextmanager
def logged_run(loggers: RunLoggers, config: TrainConfig, manifest: Manifest, run: RunDir) -> Iterator[RunLoggers]:
    """Begin the run in every logger; an error in the block ends it there as FAILED or KILLED."""
    loggers.use_run_key(run.key, run.resumed)
    tags = {"manifest_sha256": manifest.sha256, "run_folder": str(run.directory)}
    if manifest.corrected:
        tags["corrected"] = issue_counts_text(manifest.corrected)
    try:
        loggers.begin(config.flat(), tags)
        yield loggers
    except BaseException as error:
        loggers.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise


def _evaluated_splits(config: TrainConfig, manifest: Manifest) -> list[str]:
    return [split for split in SPLITS[1:] if len(manifest.indices(split)) and (split == "val" or config.run.test)]


def finish(trained: TrainedRun, loggers: RunLoggers) -> TrainResult:
    """Write metrics, figures and the bundle of a trained model, tell the loggers, and return the result."""
    run, config = trained.run, trained.config
    results = write_results(trained)
    split = results.reported_split
    run_diagnostics(
        trained.classifier,
        trained.backend,
        trained.tables[split],
        trained.manifest.part(split),
        run,
        config.data,
        config.diagnostics,
        trained.images_seen,
    )
    provenance = write_bundle(trained, results)
    mark_finished(run, results.score, training_length(config.flat()))
    log_outcome(loggers, trained, results, provenance)
    return TrainResult(
        name=run.name,
        score=results.score,
        split=split,
        metrics=results.scores,
        bundle_dir=run.bundle,
        run_dir=run.directory,
        plots_dir=run.plots,
        images_per_second=trained.images_per_second,
        summary=tuple(summary_lines(trained, results, loggers.where())),
    )
