"""Everything that the report of one run says, read from the files that lie around: what is absent stays empty."""

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
    Check,
    is_audit,
    is_calibration,
    is_latency,
    is_robustness,
    of_metrics,
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
    """Where the files of a run lie; any of them may be missing.

    Args:
        part: Of predictions.csv, logits.npy and metrics.json, plots/NAME/SPLIT; there or, of a model's own part, beside it robustness.json
            and latency.json; beside it explain/.
        bundle: Of manifest.csv and the exports, models/NAME.
        run: Of the learning curves, runs/NAME.
        audits: Of one folder a data set with audit.json, data/audit.
        root: What the paths of the predictions start from.
    """

    part: Path
    bundle: Path | None = None
    run: Path | None = None
    audits: Path | None = None
    root: Path | None = None

    @property
    def explanations(self) -> Path:
        """Where `infer --explain` leaves its figures."""
        return self.part.parent / "explain"

    def measured(self, name: str) -> Path:
        """Where a measurement lies: in the part's folder, else, where the part is one of the model's own, beside it."""
        inside = self.part / name
        return inside if inside.is_file() or self.part.name not in SPLITS else self.part.parent / name


@dataclass(frozen=True)
class RunData:
    """One run, judged on one part.

    Args:
        name: Of the run.
        table: Its predictions.
        metrics: As metrics.json has them.
        places: Where the files lie.
        info: What bundle.json says, or will say.
        curves: Metric -> (epoch, value) points.
        parts: Split -> images of each class, in the order of `labels`.
        labels: Classes of the manifest.
        audit: As audit.json has it.
        robustness: Corruption -> severity -> accuracy, and `about` what it rests on.
        calibration: As calibration.json has it.
        latency: `backends` -> backend -> figure -> value, and the `hardware`.
        sizes: File of the bundle -> (bytes, sha256).
    """

    name: str
    table: PredictionTable
    metrics: Mapping[str, Any]
    places: RunPaths
    info: BundleInfo | None = None
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    parts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    labels: Sequence[str] = ()
    audit: Mapping[str, Any] = field(default_factory=dict)
    robustness: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    latency: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """The part that was judged."""
        return self.places.part.name

    def interval(self, metric: str) -> Interval | None:
        """The 95 % interval of a single number, where metrics.json holds one; of the accuracy always (Wilson, 1927)."""
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
        """Where the images lie now and, as the bundle says, lay in training: under both names they may have been explained."""
        known = self.info.provenance.get("data_root") if self.info else None
        return [*([self.places.root] if self.places.root else []), *([Path(str(known))] if known else [])]

    @property
    def measured(self) -> Mapping[str, Any]:
        """What the bundle's limits do on this part; {} where that was not measured, or of other limits."""
        found = self.calibration.get("decision") or {}
        own = {key: value for key, value in self.info.decision.items() if key != "evidence"} if self.info else {}
        return found if all(found.get(key) == value for key, value in own.items()) else {}

    @property
    def test_command(self) -> str:
        """What judges this part again."""
        return _test_command(self.name, self.split)


def _test_command(name: str, part: str) -> str:
    more = "" if part == "test" else f" --split {part}" if part in SPLITS else " --test_dir PATH"
    return f"{program()} test --checkpoint_name {shlex.quote(name)}{more}"


def gather(
    name: str,
    table: PredictionTable,
    places: RunPaths,
    info: BundleInfo | None,
    sizes: Mapping[str, tuple[int, str]],
    lenient: bool = False,
) -> RunData:
    """Read what there is; of a damaged file DataError, or, where that is `lenient`, a warning."""
    again = _test_command(name, places.part.name)

    def read(reader: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return reader()
        except DataError as error:
            if not lenient:
                raise
            log.warning("left out of the report: %s", error)
            return {}

    def sidecar(path: Path, check: Check, option: str = "") -> dict[str, Any]:
        return read(lambda: read_sidecar(path, check, f"write it again with `{again}{option}`, or remove it"))

    run, (labels, parts) = places.run, _counts_of_parts(places)
    return RunData(
        name,
        table,
        sidecar(places.part / "metrics.json", of_metrics(table))
        or json.loads(json.dumps(metrics_dict(compute_metrics(table), None))),
        places,
        info,
        read(lambda: read_curves(run / "metrics.csv", "remove it to have a report without learning curves"))
        if run
        else {},
        parts,
        labels,
        _audit(places, info),
        sidecar(places.measured("robustness.json"), is_robustness, " --robustness"),
        sidecar(places.part / "calibration.json", is_calibration),
        sidecar(places.measured("latency.json"), is_latency, " --latency"),
        sizes,
    )


def sizes_of(bundle: Path | None) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 of each file of a bundle; {} where there is none."""
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != INFO_NAME) if bundle else []
    return (
        {path.relative_to(bundle).as_posix(): (path.stat().st_size, sha256_of(path)) for path in files}
        if bundle
        else {}
    )


def _counts_of_parts(places: RunPaths) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """The manifest's classes and how many images each part has of them."""
    path = places.bundle / "manifest.csv" if places.bundle else None
    if path is None or not path.is_file():
        return (), {}
    manifest = Manifest.read(path, Path())
    counts = {
        split: np.bincount(manifest.targets[manifest.indices(split)], minlength=len(manifest.classes)).tolist()
        for split in SPLITS
    }
    return manifest.classes, {split: row for split, row in counts.items() if any(row)}


def _audit(places: RunPaths, info: BundleInfo | None) -> dict[str, Any]:
    """The newest audit.json of the images that the bundle was trained on; those that cannot be read are passed over."""
    root = str(info.provenance.get("data_root", "")) if info else ""
    if not root or places.audits is None:
        return {}
    settings = (info.provenance.get("config") or {}).get("audit") or {} if info else {}
    paths = (
        [Path(settings["output_dir"]) / "audit.json"]
        if settings.get("output_dir")
        else list(places.audits.glob("*/audit.json"))
    )
    for _, path in sorted(((path.stat().st_mtime, path) for path in paths if path.is_file()), reverse=True):
        try:
            content = read_sidecar(path, is_audit, "audit its images again, or remove it")
        except DataError as error:
            log.warning("passed over: %s", error)
            continue
        if content and Path(content["data"]["root"]).resolve() == Path(root).resolve():
            return content
    return {}
