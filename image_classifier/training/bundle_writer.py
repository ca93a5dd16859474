"""The end of a run: the bundle, written whole or not at all, its ONNX model compared with the trained one first."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from image_classifier.atomic_io import atomic_directory, write_text
from image_classifier.bundle import BundleInfo, seal
from image_classifier.cli import hydra_app
from image_classifier.dataset.audit.issues import issue_counts_text
from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.evaluation.baselines import Baseline
from image_classifier.evaluation.reliability.abstention import Decision
from image_classifier.evaluation.reliability.ood import DETECTOR, Detector
from image_classifier.evaluation.report.page import run_page
from image_classifier.evaluation.report.run_data import AUDITS, RunPaths, gather, sizes_of
from image_classifier.evaluation.report.sentences import limits_in_words
from image_classifier.evaluation.results import shown
from image_classifier.exporting.onnx import export_onnx
from image_classifier.exporting.parity import check_embeddings, check_parity
from image_classifier.inference.checkpoint import CheckpointBackend
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.inference.predictor import EmbeddingBackend
from image_classifier.manifest import Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.predictions import PredictionTable
from image_classifier.sampling import evenly_spaced
from image_classifier.training.checkpoint_io import save_whole
from image_classifier.training.diagnostics import diagnostics_settings, measure_exports
from image_classifier.training.reporting import Results
from image_classifier.training.run_dir import RunDir, provenance

log = logging.getLogger(__name__)

_NUM_PARITY_IMAGES = 256
_NUM_GOLDEN_IMAGES = 8


def write_bundle(
    classifier: Classifier,
    blueprint: dict[str, Any],
    run: RunDir,
    manifest: Manifest,
    cache: PixelCache,
    results: Results,
    baselines: Sequence[Baseline],
    config: Any,
    images_per_second: float,
    decision: Decision,
    detector: Detector | None,
) -> dict[str, Any]:
    """Write `models/<name>/` and return its provenance; ParityError where ONNX and torch disagree, and then nothing is written."""
    classifier = classifier.cpu().to(memory_format=torch.contiguous_format)
    facts: dict[str, Any] = hydra_app.without_passwords(
        provenance(
            config.seed,
            manifest_sha256=manifest.sha256,
            corrected=dict(manifest.corrected),
            data_root=str(manifest.root),
            images_per_second=round(images_per_second, 1),
            baselines={baseline.name: baseline.as_dict() for baseline in baselines},
            config=hydra_app.to_plain(config),
        )
    )
    with atomic_directory(run.bundle, overwrite=config.overwrite or run.resumed) as directory:
        _write_checkpoint(classifier, blueprint, directory / "model.ckpt")
        export_onnx(classifier, blueprint["preprocess"]["size"], _plain(blueprint), directory / "model.onnx")
        if detector:
            detector.write(directory / DETECTOR)
        backends: dict[str, EmbeddingBackend] = {
            "onnx": OnnxBackend(directory / "model.onnx"),
            "checkpoint": CheckpointBackend(classifier),
        }
        difference = _gate(backends["checkpoint"], backends["onnx"], directory, manifest, cache)
        facts["onnx_largest_difference"] = difference
        log.info("ONNX agrees with torch: largest difference of a probability %.1e", difference)
        if diagnostics_settings(config).latency:
            files = {"onnx": directory / "model.onnx", "checkpoint": directory / "model.ckpt"}
            measure_exports(
                {name: (backend, files[name]) for name, backend in backends.items()},
                run,
                blueprint["preprocess"]["size"],
            )
        manifest.write(directory / "manifest.csv")
        hydra_app.save(config, directory / "config.yaml")
        info = BundleInfo(
            name=run.name,
            classes=manifest.classes,
            preprocess=blueprint["preprocess"],
            normalise=blueprint["normalise"],
            metrics=results.scores,
            intervals=results.intervals,
            provenance=facts,
            temperature=blueprint["temperature"],
            threshold=decision.threshold,
            decision=decision.as_dict(),
        )
        (directory / "MODEL_CARD.md").write_text(model_card(info, manifest), encoding="utf-8")
        if page := _report(info, run, manifest, directory, results.judged):
            write_text(directory / "report.html", page)
        seal(directory, info)
    return facts


def _report(info: BundleInfo, run: RunDir, manifest: Manifest, directory: Path, judged: str) -> str:
    """report.html, read from the files that the run has written so far, the bundle's in `directory`; "" where that fails, which is said."""
    part = run.plots / judged
    places = RunPaths(part, directory, run.directory, Path(AUDITS), manifest.root)
    try:
        return run_page(gather(run.name, PredictionTable.read(part), places, info, sizes_of(directory), lenient=True))
    except Exception:  # a page is no reason to lose a trained model
        log.warning("the bundle has no report.html", exc_info=True)
        return ""


def _plain(blueprint: dict[str, Any]) -> dict[str, Any]:
    return {key: blueprint[key] for key in ("classes", "preprocess", "normalise", "temperature", "decision")}


def _write_checkpoint(classifier: Classifier, blueprint: dict[str, Any], path: Path) -> None:
    """Weights and what is needed to rebuild the network; loadable with weights_only=True."""
    state = {f"classifier.{key}": value for key, value in classifier.state_dict().items()}
    save_whole({"state_dict": state, "hyper_parameters": {"blueprint": blueprint}}, path)


def _gate(
    checkpoint: EmbeddingBackend, exported: EmbeddingBackend, directory: Path, manifest: Manifest, cache: PixelCache
) -> float:
    """Compare ONNX with torch on real validation images, and keep some of them as golden answers."""
    rows = manifest.indices("val")
    rows = rows[evenly_spaced(len(rows), _NUM_PARITY_IMAGES)]
    pixels = np.ascontiguousarray(cache.gather(rows).transpose(0, 3, 1, 2))
    expected, embeddings = _in_batches(checkpoint, pixels)
    actual, others = _in_batches(exported, pixels)
    paths = [manifest.paths[row] for row in rows]
    difference = check_parity(expected, actual, paths, "ONNX Runtime")
    check_embeddings(embeddings, others, paths, "ONNX Runtime")
    golden = evenly_spaced(len(rows), _NUM_GOLDEN_IMAGES)
    np.savez(directory / "golden.npz", pixels=pixels[golden], logits=expected[golden], embeddings=embeddings[golden])
    return difference


def _in_batches(backend: EmbeddingBackend, pixels: np.ndarray, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    answers = [backend.logits_and_embeddings(pixels[start : start + size]) for start in range(0, len(pixels), size)]
    return np.concatenate([logits for logits, _ in answers]), np.concatenate([embeddings for _, embeddings in answers])


def model_card(info: BundleInfo, manifest: Manifest) -> str:
    """MODEL_CARD.md, from facts only."""
    counts = {split: len(manifest.indices(split)) for split in ("train", "val", "test")}
    rows = [
        f"| {split} | {name} | {value:.4f} | {shown(info.intervals.get(split, {}).get(name)).strip()} |"
        for split, values in info.metrics.items()
        for name, value in values.items()
    ]
    facts = info.provenance
    lines = [
        f"# {_escaped(info.name)}",
        f"An image classifier for {len(info.classes)} classes: {', '.join(map(_escaped, info.classes))}.",
        "## Data",
        f"{len(manifest)} images ({', '.join(f'{count} {split}' for split, count in counts.items())}), manifest sha256 `{facts['manifest_sha256']}`."
        + (f" Corrected by fix.csv: {issue_counts_text(manifest.corrected)}." if manifest.corrected else ""),
        "## Input and output",
        f"Pixels uint8 [batch, 3, {info.preprocess['size']}, {info.preprocess['size']}] after preprocessing `{json.dumps(info.preprocess)}`; "
        "logits float32 [batch, classes]. Normalisation is inside the model; "
        f"probabilities are softmax(logits / {info.temperature:.6g}), the temperature {'fitted on val' if info.temperature != 1 else 'left at 1'}.",
        "## Results",
        "| part | metric | value | 95 % interval |\n|---|---|---|---|\n" + "\n".join(rows),
        "### Baselines",
        "What simple classifiers reach on the same parts:",
        "\n".join(_baseline_rows(facts.get("baselines", {}), info.metrics)),
        "## Limits of an answer",
        "\n".join(f"- {name}: {limit}." for name, limit in limits_in_words(info.decision).items()),
        "## Origin",
        f"Trained {facts['created']} by image_classifier {facts['version']} at commit `{facts['git']}`, seed {facts['seed']}, "
        f"torch {facts['packages']['torch']}, Python {facts['python']}.",
    ]
    return "\n\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text as it stands in Markdown, which a folder's name shall not write."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", " ".join(text.split()))


def _baseline_rows(baselines: Mapping[str, Any], own: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """A table of Markdown: accuracy and F1 of each baseline and of the model, for each part."""
    yield "| part | classifier | accuracy | f1_macro |\n|---|---|---|---|"
    for split, scores in own.items():
        beside = [
            (f"{name}: {value['about']}", value["scores"][split])
            for name, value in baselines.items()
            if split in value["scores"]
        ]
        for name, values in [*beside, ("**this model**", scores)]:
            yield f"| {split} | {name} | {values['accuracy']:.4f} | {values['f1_macro']:.4f} |"
