"""All folds of a data set as one model: a run per fold, and one bundle with the mean of their networks.

Every training image is predicted by the one network that was not trained on it: from these predictions come the
metrics of the split val, the temperature and the limits of abstaining. Test images are predicted by the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from image_classifier.bundle import Bundle, read_bundle
from image_classifier.dataset.prepare import all_folds, scan_dataset
from image_classifier.dataset.run import fetch_images
from image_classifier.dataset.split import ALL_FOLDS
from image_classifier.errors import ConfigError, DataError
from image_classifier.evaluation.baselines import most_frequent
from image_classifier.evaluation.reliability.ood import Detector, looks
from image_classifier.inference.checkpoint import ENSEMBLE, load_classifier
from image_classifier.inference.load import pulled_checkpoint
from image_classifier.inference.predictor import EmbeddingBackend
from image_classifier.manifest import Manifest
from image_classifier.mappings import flatten
from image_classifier.modeling.ensemble import EnsembleClassifier
from image_classifier.modeling.weight_origin import SCRATCH
from image_classifier.predictions import PredictionTable
from image_classifier.training import run as single
from image_classifier.training.baseline import device_of
from image_classifier.training.builders import TrainingInputs, build_loggers
from image_classifier.training.calibrate import calibrate, fit_decision, fit_detector
from image_classifier.training.callbacks.csv_metrics import CSVMetrics
from image_classifier.training.callbacks.preemption import SignalHandler
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.config import AUTO, TrainConfig
from image_classifier.training.distributed import from_rank_zero, is_rank_zero
from image_classifier.training.forward import fast_backend, forward
from image_classifier.training.loggers import RunLoggers
from image_classifier.training.reporting import TrainedRun
from image_classifier.training.resume import ResumePoint, command_line_of, run_fingerprint
from image_classifier.training.run_dir import RunDir, buffered_log, check_name, read_notes
from image_classifier.training.settle import settled

log = logging.getLogger(__name__)

FOLDS = "folds"  # in the run's folder: the runs of the folds, with their models/ and plots/
# What a run finds by trying; a fold that resumes takes it from its own config.yaml.
_FOUND = ("data.batch_size", "optimizer.lr", "trainer.max_steps", "trainer.compile", "finetune.cut")
# A fold's network is a part of the model: what tells people about a model is made for the whole.
_SPARED: Mapping[str, Any] = {
    "test": False,
    "plots.figures": False,
    "diagnostics.explanations": 0,
    "diagnostics.robustness_images": 0,
    "diagnostics.latency": False,
}


@dataclass(frozen=True)
class Fold:
    """One fold: its configuration, its images, its run's folder, and the folders of its bundle and its predictions."""

    config: TrainConfig
    manifest: Manifest
    directory: Path
    bundle: Path
    predictions: Path


def train(
    config: TrainConfig, *, resume: ResumePoint | None = None, overrides: Sequence[str] = ()
) -> single.TrainResult:
    """Train, evaluate and export a classifier as `run.train` does; with `data.fold=all` one of all folds."""
    work = _train_all_folds if config.data.fold == ALL_FOLDS else single.train_on_this_rank
    return single.train(config, resume=resume, overrides=overrides, work=work)


def _train_all_folds(
    config: TrainConfig, resume: ResumePoint | None, overrides: Sequence[str], signals: SignalHandler
) -> single.TrainResult | None:
    """Train every fold that is not finished, deliver all as one bundle, and return its result on rank 0.

    The same command resumes a run that was stopped.

    Raises:
        ConfigError: A fold was trained with other settings.
        DataError: A fold was trained with other images, or would have none.
    """
    directory = resume.directory if resume else from_rank_zero(lambda: _stopped(config, overrides))
    from_rank_zero(lambda: check_name(config.run, directory))
    with buffered_log() as early:
        config, _ = settled(config.with_values({"data.fold": 0, "data.manifest_path": None}), is_new=resume is None)
        manifests = from_rank_zero(lambda: _manifests(config))
    config = config.with_values({"data.fold": ALL_FOLDS})
    again = ResumePoint(directory) if directory else None
    if directory:  # other images or settings are refused before anything is written
        from_rank_zero(lambda: [_is_finished(fold) for fold in _folds(config, directory, manifests)] and None)
    with single.claimed_run(config, manifests[0], again, overrides, early) as (run, config):
        folds = _folds(config, run.directory, manifests)
        for number, fold in enumerate(folds, start=1):
            if from_rank_zero(lambda fold=fold: _is_finished(fold)):  # type: ignore[misc]
                log.info("fold %d of %d: %s is trained", number, len(folds), fold.directory.name)
                continue
            log.info("fold %d of %d: training %s", number, len(folds), fold.directory.name)
            stopped = ResumePoint(fold.directory) if from_rank_zero(fold.directory.exists) else None
            single.train_on_this_rank(fold.config, stopped, (), signals)
        out_of_fold = manifests[0].moved("train", "val")
        if not config.run.test or not len(out_of_fold.indices("test")):  # the whole has seen all other images
            config = config.with_values({"diagnostics.robustness_images": 0})
        inputs = single.training_inputs(config, out_of_fold)
        return _delivered(run, inputs, folds) if is_rank_zero() else None


def _stopped(config: TrainConfig, overrides: Sequence[str]) -> Path | None:
    """Return the run folder of the same name, or else of the same command, that has folds and is not finished."""
    runs, name = Path(config.run.runs_dir), config.run.name
    if config.run.overwrite or not (name or overrides):
        return None
    for folder in sorted((path.parent for path in runs.glob("*/folds")), key=lambda path: path.stat().st_mtime):
        notes = read_notes(folder)
        is_same = folder.name == name if name else notes.get("line") == command_line_of(overrides)
        if is_same and not notes.get("finished"):
            log.info("%s was stopped before its end: its finished folds are kept", folder)
            return folder
    return None


def _manifests(config: TrainConfig) -> list[Manifest]:
    data = config.data
    return all_folds(scan_dataset(fetch_images(data, config.run.trusted_packages), data, config.audit), data)


def _folds(config: TrainConfig, directory: Path, manifests: Sequence[Manifest]) -> list[Fold]:
    return [_fold(config, directory, number, manifest) for number, manifest in enumerate(manifests)]


def _fold(config: TrainConfig, directory: Path, number: int, manifest: Manifest) -> Fold:
    name, parent = f"{directory.name}-fold-{number}", directory / FOLDS
    folders = {"runs_dir": parent, "models_dir": parent / "models", "plots_dir": parent / "plots"}
    values = {
        **_SPARED,
        **{key: str(folder) for key, folder in folders.items()},
        "name": name,
        "overwrite": False,
        "effort": None,  # the recipe is in the configuration already
        "data.fold": number,
        "data.manifest_path": None,
    }
    model = config.model
    if model.bundle:  # a name would be looked for among the bundles of the folds
        values["model.from"] = str(pulled_checkpoint(model.bundle, Path(model.models_dir)))
    fold = config.with_values({**values, **_found(config, parent / name / "config.yaml")})
    return Fold(fold, manifest, parent / name, parent / "models" / name, parent / "plots" / name / "val")


def _found(config: TrainConfig, path: Path) -> dict[str, Any]:
    """Return what a run found by trying, from its config.yaml: the values of those keys that `config` leaves open."""
    if not path.is_file():
        return {}
    given, saved = config.flat(), flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    return {key: saved[key] for key in _FOUND if key in saved and given.get(key) in (AUTO, None, -1)}


def _is_finished(fold: Fold) -> bool:
    """Return whether a fold is trained; ConfigError where that was with other images or settings."""
    if not read_notes(fold.directory).get("finished"):
        return False
    facts = read_bundle(fold.bundle).info.provenance
    before = run_fingerprint(fold.manifest, flatten(facts["config"]))
    if facts["manifest_sha256"] != fold.manifest.sha256 or before != run_fingerprint(fold.manifest, fold.config.flat()):
        raise ConfigError(
            f"{str(fold.directory)!r} was trained with other images or settings",
            "restore them, or train all folds again: overwrite=true without resume",
        )
    return True


def _delivered(run: RunDir, inputs: TrainingInputs, folds: Sequence[Fold]) -> single.TrainResult:
    """Join the networks of all folds, predict the test images with them, and write the bundle."""
    config, out_of_fold = inputs.config, inputs.manifest
    of_training = out_of_fold.moved("val", "train")
    bundles = [read_bundle(fold.bundle) for fold in folds]
    ensemble, blueprint = _joined(bundles, config.run.trusted_packages)
    ensemble.to(device_of(config.trainer.accelerator))
    if blueprint["initial_weights"]["origin"] != SCRATCH:
        log.info("the mean of the weights is not tried: no image is left to compare it on (docs/decisions/027)")
    tables = {"val": joined_tables([PredictionTable.read(fold.predictions) for fold in folds], out_of_fold)}
    with single.logged_run(RunLoggers(build_loggers(config)), config, out_of_fold, run) as loggers:
        backend = cache(partial(fast_backend, ensemble, config.data.image_size, len(out_of_fold)))
        detector = fit_detector(backend, of_training, inputs.cache, config.decision)
        if config.run.test and len(out_of_fold.indices("test")):
            tables["test"] = _predicted(backend(), detector, inputs, "test")
        calibrated = calibrate(tables)
        decision = fit_decision(calibrated["val"], config.decision)
        blueprint |= {"temperature": calibrated["val"].temperature, "decision": decision.as_dict()}
        counted = of_training.targets[of_training.indices("train")]
        targets = {split: table.targets for split, table in calibrated.items()}
        speeds = [float(bundle.info.provenance["images_per_second"]) for bundle in bundles]
        trained = TrainedRun(
            run=run,
            inputs=inputs,
            classifier=ensemble,
            backend=backend,
            blueprint=blueprint,
            tables=calibrated,
            decision=decision,
            detector=detector,
            baselines=(most_frequent(counted, of_training.classes, targets),),
            probe=None,
            choice=None,
            history=CSVMetrics(run.directory / "metrics.csv", Throughput()),
            images_per_second=sum(speeds) / len(speeds),
            epochs=0,
            steps=0,
            folds=len(folds),
        )
        return single.finish(trained, loggers)


def _joined(bundles: Sequence[Bundle], trusted: Sequence[str]) -> tuple[EnsembleClassifier, dict[str, Any]]:
    """Return the classifiers of all bundles as one, in evaluation mode, and its blueprint."""
    members, blueprints = zip(*(load_classifier(bundle.path("model.ckpt"), trusted) for bundle in bundles), strict=True)
    normalise = blueprints[0]["normalise"]  # of the whole's own buffers: each member keeps its own
    ensemble = EnsembleClassifier(members, normalise["mean"], normalise["std"]).eval()
    return ensemble, {**blueprints[0], ENSEMBLE: len(members)}


def joined_tables(tables: Sequence[PredictionTable], manifest: Manifest) -> PredictionTable:
    """Return the predictions of all folds as those of the split val of `manifest`, in its order, without temperature.

    Raises:
        DataError: An image has no prediction, or two, or another label.
    """
    rows = manifest.indices("val")
    paths = [path for table in tables for path in table.paths]
    row_of = {path: row for row, path in enumerate(paths)}
    wanted = tuple(manifest.paths[row] for row in rows.tolist())
    targets = np.concatenate([table.targets for table in tables])
    if len(row_of) != len(paths) or row_of.keys() != set(wanted):
        raise DataError(
            "the folds do not hold every training image once", "train all folds again: overwrite=true without resume"
        )
    order = np.array([row_of[path] for path in wanted])
    if any(table.classes != manifest.classes for table in tables) or (targets[order] != manifest.targets[rows]).any():
        raise DataError(
            "labels have changed since the folds were trained", "overwrite=true without resume starts again"
        )
    scores = [table.ood_scores for table in tables if table.ood_scores is not None]
    return PredictionTable(
        wanted,
        manifest.targets[rows],
        np.concatenate([table.logits for table in tables])[order],
        manifest.classes,
        ood_scores=np.concatenate(scores)[order] if len(scores) == len(tables) else None,
    )


def _predicted(
    backend: EmbeddingBackend, detector: Detector | None, inputs: TrainingInputs, split: str
) -> PredictionTable:
    """Return the predictions for a split in manifest order."""
    manifest = inputs.manifest
    rows = manifest.indices(split)
    logits, scores = [], []
    for pixels, of_batch, embeddings in forward(backend, rows, inputs.cache.gather):
        logits.append(of_batch)
        if detector:
            scores.append(detector.scores(embeddings, looks(pixels)))
    return PredictionTable(
        tuple(manifest.paths[row] for row in rows.tolist()),
        manifest.targets[rows],
        np.concatenate(logits),
        manifest.classes,
        ood_scores=np.concatenate(scores) if detector else None,
    )
