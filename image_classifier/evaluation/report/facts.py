"""Everything that the report of one run says, read from the files that lie around: what is absent stays empty."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.bundle import INFO_NAME, BundleInfo, sha256_of
from image_classifier.evaluation.metrics import compute_metrics
from image_classifier.evaluation.report.found import read_json
from image_classifier.evaluation.results import metrics_dict
from image_classifier.predictions import PredictionTable
from image_classifier.records import SPLITS, Manifest

Interval = tuple[float, float]


@dataclass(frozen=True)
class Places:
    """Where the files of a run lie; any of them may be missing.

    Args:
        part: Of predictions.csv, logits.npy and metrics.json, plots/NAME/SPLIT; beside it robustness.json, latency.json and explain/.
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


@dataclass(frozen=True)
class RunFacts:
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
        latency: `backends` -> backend -> figure -> value, and the `hardware`.
        sizes: File of the bundle -> (bytes, sha256).
    """

    name: str
    table: PredictionTable
    metrics: Mapping[str, Any]
    places: Places
    info: BundleInfo | None = None
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    parts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    labels: Sequence[str] = ()
    audit: Mapping[str, Any] = field(default_factory=dict)
    robustness: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
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
        return wilson(float(self.metrics["accuracy"]), len(self.table.targets)) if metric == "accuracy" else None


def gather(name: str, table: PredictionTable, places: Places, info: BundleInfo | None, sizes: Mapping[str, tuple[int, str]]) -> RunFacts:
    """Read what there is; DataError where a file is damaged."""
    labels, parts = _parts(places)
    return RunFacts(
        name,
        table,
        read_json(places.part / "metrics.json") or json.loads(json.dumps(metrics_dict(compute_metrics(table), None))),
        places,
        info,
        _curves(places.run / "metrics.csv") if places.run else {},
        parts,
        labels,
        _audit(places, info),
        read_json(places.part.parent / "robustness.json"),
        read_json(places.part.parent / "latency.json"),
        sizes,
    )


def sizes_of(bundle: Path | None) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 of each file of a bundle; {} where there is none."""
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != INFO_NAME) if bundle else []
    return {path.relative_to(bundle).as_posix(): (path.stat().st_size, sha256_of(path)) for path in files} if bundle else {}


def _parts(places: Places) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """The manifest's classes and how many images each part has of them."""
    path = places.bundle / "manifest.csv" if places.bundle else None
    if path is None or not path.is_file():
        return (), {}
    manifest = Manifest.read(path, Path())
    counts = {split: np.bincount(manifest.targets[manifest.indices(split)], minlength=len(manifest.classes)).tolist() for split in SPLITS}
    return manifest.classes, {split: row for split, row in counts.items() if any(row)}


def _curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The points of each metric in the metrics.csv of a run folder; {} where there is none."""
    if not path.is_file():
        return {}
    curves: dict[str, list[tuple[float, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("epoch", "step") and math.isfinite(float(value)):
                    curves.setdefault(name, []).append((float(row["epoch"]), float(value)))
    return curves


def _audit(places: Places, info: BundleInfo | None) -> dict[str, Any]:
    """The newest audit.json of the images that the bundle was trained on."""
    root = str(info.provenance.get("data_root", "")) if info else ""
    if not root or places.audits is None:
        return {}
    settings = (info.provenance.get("config") or {}).get("audit") or {} if info else {}
    paths = [Path(settings["output_dir"]) / "audit.json"] if settings.get("output_dir") else list(places.audits.glob("*/audit.json"))
    found = sorted(((path.stat().st_mtime, path) for path in paths if path.is_file()), reverse=True)
    contents = (read_json(path) for _, path in found)
    return next((content for content in contents if Path(content.get("data", {}).get("root", "")).resolve() == Path(root).resolve()), {})


def wilson(share: float, count: int) -> Interval:
    """The 95 % interval of a share of `count` images."""
    z = 1.959964
    middle, reach = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - reach) / (1 + z * z / count), (middle + reach) / (1 + z * z / count)
