"""Evaluation of a model on labelled images: the split its training held out, or a folder of the user."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.bundle import INFO_NAME, read_bundle
from image_classifier.dataset.train_overlap import exact_duplicates_of_train, near_duplicates_of_train
from image_classifier.errors import CheckpointError, ConfigError, DataError
from image_classifier.evaluation import baselines
from image_classifier.evaluation.baselines import Baseline
from image_classifier.evaluation.leaks import LeakScore, leak_score
from image_classifier.evaluation.metrics.compute import ClassificationMetrics, compute_metrics
from image_classifier.evaluation.reliability.abstention import DecisionSettings
from image_classifier.evaluation.reliability_results import Trust, write_trust
from image_classifier.evaluation.results import metrics_dict, metrics_lines, write_evaluation
from image_classifier.images import DecodeLimits
from image_classifier.inference.labelled_images import read_labelled
from image_classifier.inference.latency import Latency, measure_latency
from image_classifier.inference.load import load_predictor
from image_classifier.inference.model_reference import ModelReference
from image_classifier.inference.predictor import Predictor
from image_classifier.inference.robustness import Robustness, measure_robustness
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.predictions import PredictionTable
from image_classifier.sources.dvc import pull_missing

log = logging.getLogger(__name__)

_MAX_LATENCY_BATCH = 64
_OR_A_FOLDER = "give a labelled folder with --test_dir=PATH"


@dataclass(frozen=True, kw_only=True)
class TestSettings(ModelReference):
    """The keys of conf/test.yaml."""

    __test__ = False  # not a test of pytest's

    test_dir: str | None = None
    near_copies: bool = True
    split: str = "test"
    batch_size: int = 256
    format: str = "table"
    cache_dir: str = "data/cache"
    plots_dir: str = "plots"
    output_dir: str | None = None
    robustness: bool = False
    robustness_images: int = 500
    latency: bool = False
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    decision: DecisionSettings = field(default_factory=DecisionSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in SPLITS:
            raise ConfigError(f"there is no split {self.split!r}", f"use one of {', '.join(SPLITS)}")
        if self.format not in ("table", "json"):
            raise ConfigError(f"there is no format {self.format!r}", "use table or json")
        if self.batch_size < 1 or self.robustness_images < 1:
            raise ConfigError("batch_size and robustness_images must be at least 1")


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """All that was measured of a model on one set of labelled images.

    Args:
        split: The split it is named after in tables: train, val or test.
        directory: Where predictions, metrics and plots were written.
        table: The logits of each image, with its label.
        leak: Scores with and without images seen in training; None where there are none.
        trust: Calibration and abstention.
        baselines: Scores of simpler classifiers on the same images.
        robustness, latency: None where the settings do not want them.
    """

    split: str
    directory: Path
    table: PredictionTable
    metrics: ClassificationMetrics
    leak: LeakScore | None
    trust: Trust
    baselines: tuple[Baseline, ...]
    robustness: Robustness | None
    latency: Latency | None

    def __repr__(self) -> str:
        """Return the lines for a terminal: the fields hold every image."""
        return "\n".join(self.lines())

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        values: dict[str, Any] = metrics_dict(
            self.metrics, self.leak, baselines.baseline_scores(self.baselines, self.split)
        )
        if self.robustness is not None:
            values["robustness"] = self.robustness.as_dict()
        if self.latency is not None:
            values["latency"] = self.latency.as_dict()
        return values

    def lines(self) -> Iterator[str]:
        """Yield the lines for a terminal."""
        yield from metrics_lines(self.metrics, self.split, self.leak)
        yield from self.trust.lines(self.split)
        yield from baselines.lines(self.baselines, self.split, self.metrics.scalars())
        if self.robustness is not None:
            yield from self.robustness.lines(self.split)
        if self.latency is not None:
            yield from self.latency.lines()


@dataclass(frozen=True)
class _LabelledImages:
    """Images to evaluate on, which of them were seen in training (bool [N]), and the manifest of the training."""

    manifest: Manifest
    leaked: np.ndarray
    training: Manifest | None


def evaluate(settings: TestSettings, predictor: Predictor | None = None, progress: bool = False) -> EvaluationResult:
    """Predict labelled images, compute the metrics, and write predictions, metrics and plots.

    `predictor` is the model of `settings` where the caller has loaded it; `progress` shows a bar on standard error.

    Raises:
        CheckpointError: The model is missing or damaged, or a lone file that does not name its test images.
        DataError: There are no such images, or they are not those of the training.
        UnreadableImage: One of the images cannot be read.
    """
    path = settings.path()
    if predictor is None:
        predictor = _load(settings, path)
    if settings.test_dir:
        images = _labelled_folder(settings, path, predictor.classes, progress)
    else:
        images = _bundle_split(settings, path)
    manifest = images.manifest
    # Predict, and score all images and those that training has seen.
    files = [manifest.file(record) for record in manifest]
    table = predictor.table(files, [record.path for record in manifest], _targets(manifest, predictor))
    metrics = compute_metrics(table)
    leak = leak_score(table, images.leaked, _kind_of_leak(settings))
    simple = _baselines(settings, path, table, images.training) if images.training else ()
    # Write what the report reads.
    directory = _output_directory(settings, path)
    title = f"{path.name}, {'folder ' + settings.test_dir if settings.test_dir else settings.split}"
    comparison = baselines.baseline_scores(simple, settings.split)
    write_evaluation(table, metrics, manifest, directory, title, settings.limits, leak, comparison)
    trust = write_trust(table, predictor.decision, directory, title)
    baselines.warn_if_not_better(simple, settings.split, metrics.scalars())
    robustness = _robustness(settings, predictor, files, table, directory, title) if settings.robustness else None
    latency = _latency(settings, path, directory) if settings.latency else None
    log.info("predictions, metrics and plots: %s", directory)
    return EvaluationResult(settings.split, directory, table, metrics, leak, trust, simple, robustness, latency)


def _load(settings: TestSettings, path: Path) -> Predictor:
    return load_predictor(
        path,
        settings.backend,
        settings.batch_size,
        settings.trusted_packages,
        settings.limits,
        settings.decision,
        settings.server,
    )


def _kind_of_leak(settings: TestSettings) -> str:
    if not settings.test_dir:
        return LeakScore.what
    return "are training images or near copies of one" if settings.near_copies else "are training images, byte for byte"


def _output_directory(settings: TestSettings, path: Path) -> Path:
    if settings.output_dir:
        return Path(settings.output_dir)
    plots = Path(settings.plots_dir) / (path.name if path.is_dir() else path.stem)
    return plots / (_name_of_folder(Path(settings.test_dir)) if settings.test_dir else settings.split)


def _name_of_folder(folder: Path) -> str:
    """Return a name for the results of a folder; no two folders, and none of the splits, share one."""
    resolved = folder.expanduser().resolve()
    return f"test-{resolved.name}-{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:8]}"


def _extras_directory(settings: TestSettings, directory: Path) -> Path:
    """Return where robustness and latency go: next to the splits of the bundle's data, else to the other results."""
    return directory if settings.test_dir or settings.output_dir else directory.parent


def _robustness(
    settings: TestSettings,
    predictor: Predictor,
    files: Sequence[Path],
    table: PredictionTable,
    directory: Path,
    title: str,
) -> Robustness:
    robustness = measure_robustness(predictor, files, table.targets, settings.robustness_images, directory.name)
    robustness.write(_extras_directory(settings, directory), f"Robustness of {title}")
    return robustness


def _latency(settings: TestSettings, path: Path, directory: Path) -> Latency:
    latency = measure_latency(path, min(settings.batch_size, _MAX_LATENCY_BATCH), settings.trusted_packages)
    latency.write(_extras_directory(settings, directory))
    return latency


def _labelled_folder(settings: TestSettings, path: Path, classes: Sequence[str], progress: bool) -> _LabelledImages:
    """Return the images of a folder of the user, compared with the training images where the model is a bundle."""
    folder = Path(str(settings.test_dir)).expanduser()
    cache = Path(settings.cache_dir)
    pull_missing(folder, settings.dvc)
    manifest = read_labelled(folder, settings.checkpoint_name, classes, settings.limits, cache, progress)
    if not (path / INFO_NAME).is_file():
        return _LabelledImages(manifest, np.zeros(len(manifest), dtype=bool), None)
    bundle = read_bundle(path)
    root = Path(str(bundle.info.provenance.get("data_root", "")))
    training = Manifest.read(bundle.path("manifest.csv"), root)
    leaked = exact_duplicates_of_train(manifest, training)
    if settings.near_copies:
        leaked |= near_duplicates_of_train(manifest, training, settings.limits, cache, progress)
    return _LabelledImages(manifest, leaked, training)


def _bundle_split(settings: TestSettings, path: Path) -> _LabelledImages:
    """Return one split of the data that the bundle was trained on; each file is compared with its hash."""
    if not (path / INFO_NAME).is_file():
        raise CheckpointError(f"{path.name!r} does not name the images it was tested on", _OR_A_FOLDER)
    bundle = read_bundle(path)
    root = Path(str(bundle.info.provenance.get("data_root", "")))
    training = Manifest.read(bundle.path("manifest.csv"), root)
    images = training.part(settings.split)
    if not len(images):
        has_val = len(training.indices("val"))
        hint = "use --split val, or a labelled folder with --test_dir=PATH" if has_val else _OR_A_FOLDER
        raise DataError(f"the data of {path.name!r} has no {settings.split} split", hint)
    for record in images:
        file = images.file(record)
        if not file.is_file() and not pull_missing(file, settings.dvc):
            raise DataError(f"{str(file)!r} is missing", f"run where the training data is, or {_OR_A_FOLDER}")
        if hashlib.sha256(file.read_bytes()).hexdigest() != record.sha256:
            raise DataError(f"{str(file)!r} has changed since training", f"restore it, or {_OR_A_FOLDER}")
    is_train = settings.split == "train"
    leaked = np.zeros(len(images), dtype=bool) if is_train else training.leaked(settings.split)
    return _LabelledImages(images, leaked, training)


def _baselines(settings: TestSettings, path: Path, table: PredictionTable, training: Manifest) -> tuple[Baseline, ...]:
    """Return the most frequent class of training, scored on the images of the table, and the bundle's own baselines."""
    codes = np.array([table.classes.index(label) for label in training.classes], dtype=np.int64)
    train_targets = codes[training.targets[training.indices("train")]]
    simplest = baselines.most_frequent(train_targets, table.classes, {settings.split: table.targets})
    if settings.test_dir:
        return (simplest,)
    try:
        known = baselines.from_dict(read_bundle(path).info.provenance.get("baselines", {}))
    except ValueError as error:
        raise CheckpointError(f"bundle.json of {str(path)!r} holds {error}", "copy the bundle again") from error
    return (simplest, *(baseline for baseline in known if baseline.name != simplest.name))


def _targets(manifest: Manifest, predictor: Predictor) -> np.ndarray:
    """Return the index of each image's class among those of the model, int64 [N]."""
    index = {label: position for position, label in enumerate(predictor.classes)}
    return np.array([index[record.label] for record in manifest], dtype=np.int64)
