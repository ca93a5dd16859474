"""All data of the report of one run, read from the files next to its predictions; missing files leave fields empty."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.bundle import INFO_NAME, BundleInfo, sha256_of
from image_classifier.errors import DataError
from image_classifier.evaluation.metrics.bootstrap import wilson
from image_classifier.evaluation.metrics.compute import compute_metrics
from image_classifier.evaluation.report.schemas import (
    AuditFile,
    CalibrationFile,
    LatencyFile,
    MetricsFile,
    RobustnessFile,
    Sidecar,
    read_curves,
    read_sidecar,
)
from image_classifier.evaluation.results import metrics_dict
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.predictions import PredictionTable
from image_classifier.program import program

log = logging.getLogger(__name__)

AUDITS = "data/audit"

Interval = tuple[float, float]


@dataclass(frozen=True)
class RunPaths:
    """The folders of a run; any file in them may be missing.

    Args:
        predictions: Folder plots/NAME/SPLIT with predictions.csv, logits.npy and metrics.json. robustness.json and
            latency.json are there or, for the model's own splits, one folder up; explain/ is one folder up.
        bundle: Folder models/NAME with manifest.csv and the exports.
        run: Folder runs/NAME with the learning curves.
        audits: Folder data/audit, with one folder for each data set.
        root: Folder that the paths in the predictions start from.
    """

    predictions: Path
    bundle: Path | None = None
    run: Path | None = None
    audits: Path | None = None
    root: Path | None = None

    @property
    def explanations(self) -> Path:
        """The folder that `infer --explain` writes its figures to."""
        return self.predictions.parent / "explain"

    def measured(self, name: str) -> Path:
        """Return the path of a measurement: next to the predictions or, for the model's own splits, one folder up."""
        inside = self.predictions / name
        return inside if inside.is_file() or self.predictions.name not in SPLITS else self.predictions.parent / name


@dataclass(frozen=True)
class RunData:
    """One run, evaluated on one split.

    Args:
        name: Name of the run.
        table: Its predictions.
        metrics: Content of metrics.json.
        paths: Folders of the run.
        info: Content of bundle.json.
        curves: Metric -> (epoch, value) points.
        split_counts: Split -> images of each class, in the order of `labels`.
        labels: Classes of the manifest.
        audit: Content of audit.json.
        robustness: Corruption -> severity -> accuracy, and `about`: the images it was measured on.
        calibration: Content of calibration.json.
        latency: `backends` -> backend -> name -> value, and the `hardware`.
        sizes: File of the bundle -> (bytes, sha256).
    """

    name: str
    table: PredictionTable
    metrics: Mapping[str, Any]
    paths: RunPaths
    info: BundleInfo | None = None
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    split_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    labels: Sequence[str] = ()
    audit: Mapping[str, Any] = field(default_factory=dict)
    robustness: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    latency: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """The split that was evaluated."""
        return self.paths.predictions.name

    def interval(self, metric: str) -> Interval | None:
        """Return the 95 % interval of a metric if metrics.json holds one; of the accuracy always (Wilson, 1927)."""
        known = (self.metrics.get("intervals") or {}).get(metric)
        if known:
            return float(known[0]), float(known[1])
        if metric != "accuracy":
            return None
        total = len(self.table.targets)
        low, high = wilson(np.round(self.metrics["accuracy"] * np.array(total)), np.array(total))
        return float(low), float(high)

    @property
    def roots(self) -> list[Path]:
        """The folders of the images now and, by the bundle, during training: they may be explained under either."""
        known = self.info.provenance.get("data_root") if self.info else None
        return [*([self.paths.root] if self.paths.root else []), *([Path(str(known))] if known else [])]

    @property
    def measured(self) -> Mapping[str, Any]:
        """The effect of the bundle's limits on this split; {} where it was not measured, or with other limits."""
        decision = self.calibration.get("decision") or {}
        limits = {key: value for key, value in self.info.decision.items() if key != "evidence"} if self.info else {}
        return decision if all(decision.get(key) == value for key, value in limits.items()) else {}

    @property
    def test_command(self) -> str:
        """The command that evaluates this split again."""
        return _test_command(self.name, self.split)


def _test_command(name: str, split: str) -> str:
    option = "" if split == "test" else f" --split {split}" if split in SPLITS else " --test_dir PATH"
    return f"{program()} test --checkpoint_name {shlex.quote(name)}{option}"


def gather(
    name: str,
    table: PredictionTable,
    paths: RunPaths,
    info: BundleInfo | None,
    sizes: Mapping[str, tuple[int, str]],
    lenient: bool = False,
) -> RunData:
    """Read all files of a run that exist.

    Raises:
        DataError: A file is damaged. With `lenient` this is a warning in the log, and the file is skipped.
    """
    again = _test_command(name, paths.predictions.name)

    def read(reader: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return reader()
        except DataError as error:
            if not lenient:
                raise
            log.warning("left out of the report: %s", error)
            return {}

    def sidecar(
        path: Path, schema: type[Sidecar], option: str = "", of: PredictionTable | None = None
    ) -> dict[str, Any]:
        hint = f"write it again with `{again}{option}`, or remove it"
        return read(lambda: read_sidecar(path, schema, hint, of))

    labels, split_counts = _split_counts(paths)
    metrics = sidecar(paths.predictions / "metrics.json", MetricsFile, of=table)
    return RunData(
        name,
        table,
        metrics or json.loads(json.dumps(metrics_dict(compute_metrics(table), None))),
        paths,
        info,
        curves=read(lambda: _curves(paths)),
        split_counts=split_counts,
        labels=labels,
        audit=_audit(paths, info),
        robustness=sidecar(paths.measured("robustness.json"), RobustnessFile, " --robustness"),
        calibration=sidecar(paths.predictions / "calibration.json", CalibrationFile),
        latency=sidecar(paths.measured("latency.json"), LatencyFile, " --latency"),
        sizes=sizes,
    )


def _curves(paths: RunPaths) -> dict[str, list[tuple[float, float]]]:
    hint = "remove it to get a report without learning curves"
    return read_curves(paths.run / "metrics.csv", hint) if paths.run else {}


def sizes_of(bundle: Path | None) -> dict[str, tuple[int, str]]:
    """Return bytes and sha256 of each file of a bundle; {} without a bundle."""
    if bundle is None:
        return {}
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != INFO_NAME)
    return {path.relative_to(bundle).as_posix(): (path.stat().st_size, sha256_of(path)) for path in files}


def _split_counts(paths: RunPaths) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Return the manifest's classes and the number of images of each class by split."""
    path = paths.bundle / "manifest.csv" if paths.bundle else None
    if path is None or not path.is_file():
        return (), {}
    manifest = Manifest.read(path, Path())
    counts = {
        split: np.bincount(manifest.targets[manifest.indices(split)], minlength=len(manifest.classes)).tolist()
        for split in SPLITS
    }
    return manifest.classes, {split: row for split, row in counts.items() if any(row)}


def _audit(paths: RunPaths, info: BundleInfo | None) -> dict[str, Any]:
    """Return the newest audit.json of the images that the bundle was trained on; skip files that cannot be read."""
    root = str(info.provenance.get("data_root", "")) if info else ""
    if not root or paths.audits is None:
        return {}
    settings = (info.provenance.get("config") or {}).get("audit") or {} if info else {}
    configured = settings.get("output_dir")
    files = [Path(configured) / "audit.json"] if configured else list(paths.audits.glob("*/audit.json"))
    for _, path in sorted(((path.stat().st_mtime, path) for path in files if path.is_file()), reverse=True):
        try:
            content = read_sidecar(path, AuditFile, "run the audit of its images again, or remove it")
        except DataError as error:
            log.warning("skipped: %s", error)
            continue
        if content and Path(content["data"]["root"]).resolve() == Path(root).resolve():
            return content
    return {}
