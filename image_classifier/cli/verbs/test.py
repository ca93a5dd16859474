"""The verb `test`: judge a checkpoint on the test part it never saw, or on a folder of your own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.bundle import INFO_NAME, read_bundle
from image_classifier.cli import hydra_app
from image_classifier.dataset.train_overlap import exact_duplicates_of_train, near_duplicates_of_train
from image_classifier.errors import CheckpointError, ConfigError, DataError
from image_classifier.evaluation import baselines
from image_classifier.evaluation.baselines import Baseline
from image_classifier.evaluation.leaks import LeakScore, leak_score
from image_classifier.evaluation.metrics.compute import ClassificationMetrics, compute_metrics
from image_classifier.evaluation.reliability.abstention import DecisionSettings
from image_classifier.evaluation.reliability_results import write_trust
from image_classifier.evaluation.results import metrics_dict, metrics_lines, write_evaluation
from image_classifier.images import DecodeLimits
from image_classifier.inference.backends import ServerAddress
from image_classifier.inference.labelled_images import read_labelled
from image_classifier.inference.latency import measure_latency
from image_classifier.inference.load import load_predictor, pulled_checkpoint
from image_classifier.inference.predictor import Predictor
from image_classifier.inference.robustness import measure_robustness
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.predictions import PredictionTable
from image_classifier.sources.dvc import pull_missing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestSettings:
    """The keys of conf/test.yaml."""

    __test__ = False  # not a test of pytest's

    checkpoint_name: str
    test_dir: str | None = None
    near_copies: bool = True
    split: str = "test"
    backend: str | None = None
    url: str | None = None
    server_timeout_s: float = 60.0
    batch_size: int = 256
    format: str = "table"
    cache_dir: str = "data/cache"
    models_dir: str = "models"
    plots_dir: str = "plots"
    output_dir: str | None = None
    robustness: bool = False
    robustness_images: int = 500
    latency: bool = False
    dvc: bool | None = None
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"there is no split {self.split!r}", f"use one of {', '.join(SPLITS)}")
        if self.format not in ("table", "json"):
            raise ConfigError(f"there is no format {self.format!r}", "use table or json")
        if self.batch_size < 1 or self.robustness_images < 1:
            raise ConfigError("batch_size and robustness_images must be at least 1")
        self.server.fits(self.backend)

    @property
    def server(self) -> ServerAddress:
        """Where the backend triton asks."""
        return ServerAddress(self.url, self.server_timeout_s)


def test(config: Any) -> ClassificationMetrics:
    """Predict a labelled part, print the metrics and write predictions, metrics and plots."""
    asked = hydra_app.typed(TestSettings, config, "")
    path = pulled_checkpoint(asked.checkpoint_name, Path(asked.models_dir), asked.dvc)
    predictor = load_predictor(
        path, asked.backend, asked.batch_size, asked.trusted_packages, asked.limits, asked.decision, asked.server
    )
    manifest, leaked, known = (
        _labelled_folder(asked, path, predictor.classes) if asked.test_dir else _own_part(asked, path)
    )
    table = predictor.table(
        [manifest.file(record) for record in manifest],
        [record.path for record in manifest],
        _targets(manifest, predictor),
    )
    copies = "are training images or near copies of one" if asked.near_copies else "are training images, byte for byte"
    metrics, leak = compute_metrics(table), leak_score(table, leaked, copies if asked.test_dir else LeakScore.what)
    part = _part_of_folder(Path(asked.test_dir)) if asked.test_dir else asked.split
    directory = Path(asked.output_dir or Path(asked.plots_dir) / (path.name if path.is_dir() else path.stem) / part)
    found = _baselines(asked, path, table, known) if known else ()
    beside, own = baselines.beside(found, asked.split), metrics.scalars()
    title = f"{path.name}, {'folder ' + asked.test_dir if asked.test_dir else asked.split}"
    write_evaluation(table, metrics, manifest, directory, title, asked.limits, leak, beside)
    trust = write_trust(table, predictor.decision, directory, title)
    baselines.warn_if_not_better(found, asked.split, own)
    further, lines = _further(asked, path, manifest, predictor, table, directory, title)
    if asked.format == "json":
        print(json.dumps({**metrics_dict(metrics, leak, beside), **further}, ensure_ascii=False))
    else:
        print(
            "\n".join(
                [
                    *metrics_lines(metrics, asked.split, leak),
                    *trust.lines(asked.split),
                    *baselines.lines(found, asked.split, own),
                    *lines,
                ]
            )
        )
    log.info("predictions, metrics and plots: %s", directory)
    return metrics


test.__test__ = False  # type: ignore[attr-defined]


def _part_of_folder(folder: Path) -> str:
    """Under which name a folder's figures lie among those of the model: no two folders, and none of the model's own parts, share one."""
    whole = folder.expanduser().resolve()
    return f"test-{whole.name}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}"


def _further(
    asked: TestSettings,
    path: Path,
    manifest: Manifest,
    predictor: Predictor,
    table: PredictionTable,
    directory: Path,
    title: str,
) -> tuple[dict[str, Any], list[str]]:
    """Robustness and latency where they are asked for, as JSON values and as lines; of the model's own parts their files lie beside the parts."""
    found: dict[str, Any] = {}
    lines: list[str] = []
    place = directory if asked.test_dir or asked.output_dir else directory.parent
    if asked.robustness:
        files = [manifest.file(record) for record in manifest]
        robustness = measure_robustness(predictor, files, table.targets, asked.robustness_images, directory.name)
        robustness.write(place, f"Robustness of {title}")
        found["robustness"], lines = robustness.as_dict(), [*lines, *robustness.lines(asked.split)]
    if asked.latency:
        latency = measure_latency(path, min(asked.batch_size, 64), asked.trusted_packages)
        latency.write(place)
        found["latency"], lines = latency.as_dict(), [*lines, *latency.lines()]
    return found, lines


def _labelled_folder(
    asked: TestSettings, path: Path, classes: Sequence[str]
) -> tuple[Manifest, np.ndarray, Manifest | None]:
    """The images of a folder of the user's own, which of them (bool [N]) are training images or like one, and its own manifest."""
    folder = Path(str(asked.test_dir)).expanduser()
    pull_missing(folder, asked.dvc)
    manifest = read_labelled(
        folder, asked.checkpoint_name, classes, asked.limits, Path(asked.cache_dir), sys.stderr.isatty()
    )
    if not (path / INFO_NAME).is_file():
        return manifest, np.zeros(len(manifest), dtype=bool), None
    bundle = read_bundle(path)
    known = Manifest.read(bundle.path("manifest.csv"), Path(str(bundle.info.provenance.get("data_root", ""))))
    leaked = exact_duplicates_of_train(manifest, known)
    if asked.near_copies:
        leaked |= near_duplicates_of_train(manifest, known, asked.limits, Path(asked.cache_dir), sys.stderr.isatty())
    return manifest, leaked, known


def _own_part(asked: TestSettings, path: Path) -> tuple[Manifest, np.ndarray, Manifest]:
    """One split of the data the bundle was made from, its files compared with the manifest, which of them have leaked, and all of the manifest."""
    if not (path / INFO_NAME).is_file():
        raise CheckpointError(
            f"{path.name!r} does not say which images it was tested on", "give a labelled folder with --test_dir=PATH"
        )
    bundle = read_bundle(path)
    root = Path(str(bundle.info.provenance.get("data_root", "")))
    split, manifest = asked.split, Manifest.read(bundle.path("manifest.csv"), root)
    part = manifest.part(split)
    if not len(part):
        raise DataError(
            f"the data of {path.name!r} has no {split} part",
            "use --split val, or a labelled folder with --test_dir=PATH",
        )
    for record in part:
        file = part.file(record)
        if not file.is_file() and not pull_missing(file, asked.dvc):
            raise DataError(
                f"{str(file)!r} is gone",
                "run where the training data lies, or give a labelled folder with --test_dir=PATH",
            )
        if hashlib.sha256(file.read_bytes()).hexdigest() != record.sha256:
            raise DataError(
                f"{str(file)!r} has changed since training",
                "restore it, or give a labelled folder with --test_dir=PATH",
            )
    return part, manifest.leaked(split) if split != "train" else np.zeros(len(part), dtype=bool), manifest


def _baselines(asked: TestSettings, path: Path, table: PredictionTable, known: Manifest) -> tuple[Baseline, ...]:
    """The class most frequent in training, judged on the very images of the table, and what the bundle knows of its own parts."""
    codes = np.array([table.classes.index(label) for label in known.classes], dtype=np.int64)
    simplest = baselines.most_frequent(
        codes[known.targets[known.indices("train")]], table.classes, {asked.split: table.targets}
    )
    if asked.test_dir:
        return (simplest,)
    try:
        kept = baselines.from_dict(read_bundle(path).info.provenance.get("baselines", {}))
    except ValueError as error:
        raise CheckpointError(f"bundle.json of {str(path)!r} holds {error}", "copy the bundle anew") from error
    return (simplest, *(baseline for baseline in kept if baseline.name != simplest.name))


def _targets(manifest: Manifest, predictor: Predictor) -> np.ndarray:
    index = {label: position for position, label in enumerate(predictor.classes)}
    return np.array([index[record.label] for record in manifest], dtype=np.int64)
