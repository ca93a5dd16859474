"""The verb `drift`: compare a server's recent answers with the validation split of its model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from image_classifier.bundle import read_bundle, reading
from image_classifier.cli import hydra_app
from image_classifier.errors import ConfigError
from image_classifier.evaluation.drift import FEWEST, Shift
from image_classifier.serving.drift_log import DriftResult, measure_drift
from image_classifier.serving.model_sources import model_source
from image_classifier.serving.worker.spec import served_name

_LOG_DIR = "runs/serve"
_MEANINGS = {
    "confidence": "probability of the predicted class",
    "ood_score": "distance from the embeddings of the training images",
}


@dataclass(frozen=True)
class DriftVerbSettings:
    """The keys of conf/drift.yaml."""

    checkpoint_name: str
    name: str | None = None
    log: str | None = None
    last: int = 2000
    format: str = "table"
    fail: bool = False
    tracking_uri: str = "sqlite:///mlflow.db"
    models_dir: str = "models"
    dvc: bool | None = None

    def __post_init__(self) -> None:
        if self.format not in ("table", "json"):
            raise ConfigError(f"invalid format {self.format!r}", "use table or json")
        if self.last < 1:
            raise ConfigError(f"invalid last {self.last}", "expected at least 1")


def drift(config: DictConfig) -> None:
    """Print how far each figure has shifted; with `fail` the exit code is 1 where one has drifted.

    Raises:
        ConfigError: The bundle holds no figures of the validation split.
        DataError: There is no log, or no answer of this model's version in it.
    """
    settings = hydra_app.typed(DriftVerbSettings, config, "")
    source = model_source(settings.checkpoint_name, Path(settings.models_dir), settings.dvc, settings.tracking_uri)
    bundle = read_bundle(source.find())
    result = measure_drift(bundle, _log_path(settings, source.name), settings.last)
    if settings.format == "json":
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _print_table(result)
    if settings.fail and result.drifted:
        raise SystemExit(1)


def _log_path(settings: DriftVerbSettings, model_name: str) -> Path:
    """Return the log file that was given, or the model's file in the folder that was given."""
    path = Path(settings.log or _LOG_DIR)
    with reading(path):
        is_folder = settings.log is None or path.is_dir()
    return path / f"{served_name(settings.name or model_name)}.jsonl" if is_folder else path


def _print_table(result: DriftResult) -> None:
    print(f"version {result.version}: the last {result.images} answers, compared with {result.val_images} val images")
    print(f"{'figure':<11} {'median':>8} {'val':>8} {'distance':>9} {'limit':>6}")
    for shift in result.shifts:
        numbers = f"{shift.median:8.3f} {shift.val_median:8.3f} {shift.distance:9.3f} {shift.limit:6.3f}"
        print(f"{shift.figure:<11} {numbers}  {_verdict(shift)} ({_MEANINGS[shift.figure]})")


def _verdict(shift: Shift) -> str:
    if shift.images < FEWEST:
        return "too few images to compare"
    return "DRIFTED" if shift.drifted else "alike"
