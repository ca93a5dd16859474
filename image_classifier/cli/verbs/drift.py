"""The verb `drift`: whether what a server was asked lately is still like what its model was validated on."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.bundle import read_bundle, reading
from image_classifier.cli import hydra_app
from image_classifier.errors import ConfigError, DataError
from image_classifier.evaluation.drift import FEWEST, DriftReference, Shift
from image_classifier.serving.drift_window import columns
from image_classifier.serving.model_sources import model_source
from image_classifier.serving.worker.spec import served_name, version_of

_LOG_DIR = "runs/serve"
_MOST_NAMES = 10  # of other logs
_WORDS = {"confidence": "probability of the answer", "ood_score": "distance from the training's embeddings"}


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
            raise ConfigError(f"format={self.format!r} cannot be", "use table or json")
        if self.last < 1:
            raise ConfigError(f"last={self.last} must be at least 1")


def drift(config: Any) -> None:
    """Print what has shifted; with `fail` the exit code is then 1.

    Raises:
        ConfigError: The bundle does not tell what val was like.
        DataError: There is no log, or nothing of this model in it.
    """
    asked = hydra_app.typed(DriftVerbSettings, config, "")
    place = model_source(asked.checkpoint_name, Path(asked.models_dir), asked.dvc, asked.tracking_uri)
    bundle = read_bundle(place.find())
    reference = DriftReference.of(bundle.info.decision)
    if reference is None:
        raise ConfigError(f"{place.name!r} does not tell what val was like", "use a bundle of this version")
    path = _log_of(asked, place.name)
    version = version_of(bundle.directory)
    with reading(path):
        rows = deque(_rows(path, version), maxlen=asked.last)
    if not rows:
        raise DataError(f"{str(path)!r} holds no answer of version {version}", _elsewhere(path))
    shifts = reference.shifts(columns(rows))
    if asked.format == "json":
        print(
            json.dumps(
                {"version": version, "images": len(rows), "figures": [shift.as_dict() for shift in shifts]}, indent=2
            )
        )
    else:
        _print(shifts, version, reference)
    if asked.fail and any(shift.drifted for shift in shifts):
        raise SystemExit(1)


def _log_of(asked: DriftVerbSettings, own_name: str) -> Path:
    """The file that was named, or that of the model's name in a folder."""
    given = Path(asked.log or _LOG_DIR)
    with reading(given):
        return given / f"{served_name(asked.name or own_name)}.jsonl" if given.is_dir() or asked.log is None else given


def _elsewhere(path: Path) -> str:
    """What to do where a log does not help: those beside it may be of the same model under another name."""
    with reading(path.parent):
        names = sorted({file.name.partition(".jsonl")[0] for file in path.parent.glob("*.jsonl*")} - {path.stem})
    if not names:
        return "serve it with drift.enabled=true, or name the file: --log PATH"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"was it served under another name? --name NAME, here are logs of {', '.join(names[:_MOST_NAMES])}{more}"


def _rows(path: Path, version: str) -> Iterator[tuple[float, float | None]]:
    """The answers of one version in a log and in the older one beside it; a line that was cut off by a full disk is passed over."""
    for file in (path.with_name(f"{path.name}.1"), path):
        if not file.is_file():
            continue
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    if row["version"] == version:
                        yield float(row["confidence"]), None if row["ood_score"] is None else float(row["ood_score"])
                except (ValueError, KeyError, TypeError):
                    continue


def _print(shifts: list[Shift], version: str, reference: DriftReference) -> None:
    print(f"version {version}, the last {shifts[0].images} answers beside {reference.num_images} val images")
    print(f"{'figure':<11} {'median':>8} {'val':>8} {'distance':>9} {'limit':>6}")
    for shift in shifts:
        verdict = "too few images to tell" if shift.images < FEWEST else "DRIFTED" if shift.drifted else "alike"
        numbers = f"{shift.median:8.3f} {shift.val_median:8.3f} {shift.distance:9.3f} {shift.limit:6.3f}"
        print(f"{shift.figure:<11} {numbers}  {verdict} ({_WORDS[shift.figure]})")
