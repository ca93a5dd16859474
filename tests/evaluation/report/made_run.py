"""A whole run as files: bundle, predictions, curves, audit, robustness, latency, an explanation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from image_classifier.bundle import BundleInfo, seal
from image_classifier.evaluation import baselines
from image_classifier.evaluation.metrics.compute import compute_metrics
from image_classifier.evaluation.plots.heat_map import explanation_name
from image_classifier.evaluation.results import metrics_dict
from image_classifier.manifest import Manifest, Record
from image_classifier.predictions import PredictionTable
from tests.conftest import write_image

HOSTILE = "<img src=x onerror=window.hacked=1>"


def make_run(
    home: Path, num_classes: int = 5, each: int = 12, accuracy: float = 0.7, pictures: bool = True
) -> PredictionTable:
    """Write models/run, plots/run/test, runs/run and data/audit under `home`, and the test images into images."""
    classes = tuple(sorted([f"class_{code:03d}" for code in range(num_classes - 1)] + [HOSTILE]))
    manifest = Manifest.of(home / "images", list(_records(classes, each)))
    if pictures:
        for row, record in enumerate(manifest.part("test")):
            write_image(manifest.file(record), row, 24)
    table = _answers(manifest, accuracy)
    _write_part(home / "plots/run", table, manifest, accuracy)
    _write_bundle(home / "models/run", manifest)
    _write(
        home / "runs/run/metrics.csv",
        "epoch,step,train/loss,train/accuracy,val/loss,val/accuracy,val/f1_macro\n1,5,2,0.3,2.1,,\n2,10,1,0.6,1.2,0.5,0.4\n",
    )
    audit = {
        "data": {"root": str(manifest.root)},
        "counts": {"near_duplicates": {"severity": "warning", "findings": 2, "files": 5}},
        "headlines": {},
    }
    _write(home / "data/audit/images-1/audit.json", json.dumps(audit))
    return table


def _records(classes: tuple[str, ...], each: int) -> Any:
    for code, label in enumerate(classes):
        for number in range(each):
            digest = f"{code * each + number:064x}"
            for split in ("train", "test"):
                yield Record(f"{split}/{label}/{number}.png", label, split, digest[-16:], digest, 24, 24)


def _answers(manifest: Manifest, accuracy: float) -> PredictionTable:
    part, generator = manifest.part("test"), np.random.default_rng(0)
    wrong = generator.random(len(part)) > accuracy
    answers = np.where(wrong, (part.targets + 1) % len(part.classes), part.targets)
    logits = generator.normal(size=(len(part), len(part.classes))) + 6 * np.eye(len(part.classes))[answers]
    return PredictionTable(tuple(part.paths), part.targets, logits.astype(np.float32), part.classes)


def _write_part(plots: Path, table: PredictionTable, manifest: Manifest, accuracy: float) -> None:
    replace(table, temperature=1.5).write(plots / "test")
    found = json.loads(
        json.dumps(
            metrics_dict(
                compute_metrics(table), None, baselines.baseline_scores([baselines.most_frequent_of(manifest)], "test")
            )
        )
    )
    found["intervals"] = {"accuracy": [accuracy - 0.1, accuracy + 0.1], "f1_macro": [0.5, 0.9], "ece": None}
    for row in found["per_class"]:
        row["intervals"] = {"precision": [0.4, 0.9], "recall": None, "f1": [0.5, 0.8]}
    _write(plots / "test/metrics.json", json.dumps(found))
    _write(
        plots / "robustness.json",
        json.dumps(
            {"blur": {"1": 0.6, "3": 0.4, "5": 0.2}, "jpeg": {"1": 0.7, "3": 0.65, "5": 0.6}, "about": {"images": 60}}
        ),
    )
    _write(
        plots / "latency.json",
        json.dumps({"backends": {"onnx": {"p50_ms": 3.25}, "checkpoint": {"p50_ms": 7.5}}, "hardware": {"cores": 2}}),
    )
    predicted = table.logits.argmax(axis=1)
    probabilities = table.probabilities.max(axis=1)
    worst = max(np.flatnonzero(predicted != table.targets), key=lambda row: probabilities[row])
    explanation = plots / "explain" / explanation_name(manifest.root / table.paths[worst])
    explanation.parent.mkdir(parents=True)
    Image.new("RGB", (480, 240), "red").save(explanation)


def _write_bundle(bundle: Path, manifest: Manifest) -> None:
    _write(bundle / "model.onnx", "x" * 250_000)
    manifest.write(bundle / "manifest.csv")
    provenance = {
        "data_root": str(manifest.root),
        "command": ["python", "commands.py", "train", "name=a b"],
        "git": "abc123",
        "seed": 7,
        "initial_weights": {"origin": "file", "name": HOSTILE, "licence": "cc-by-nc-4.0", "sha256": "ab" * 32},
    }
    seal(bundle, BundleInfo("run", manifest.classes, {"size": 24}, {}, {}, provenance, temperature=1.5, threshold=0.25))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
