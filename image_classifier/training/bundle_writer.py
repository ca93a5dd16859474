"""Writes the bundle at the end of a run: complete or not at all, its ONNX model compared with the trained one first."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from image_classifier.atomic_io import atomic_directory, write_text
from image_classifier.bundle import BundleInfo, seal
from image_classifier.dataset.audit.issues import issue_counts_text
from image_classifier.evaluation.reliability.ood import DETECTOR
from image_classifier.evaluation.report.page import run_page
from image_classifier.evaluation.report.run_data import AUDITS, RunPaths, gather, sizes_of
from image_classifier.evaluation.report.sentences import limits_in_words, val_in_words
from image_classifier.evaluation.results import shown
from image_classifier.exporting.onnx import export_onnx
from image_classifier.exporting.parity import check_embeddings, check_parity
from image_classifier.exporting.weights_file import write_weights_file
from image_classifier.inference.checkpoint import CheckpointBackend
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.inference.predictor import EmbeddingBackend
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.mappings import without_passwords
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.weight_origin import WeightOrigin, weights_in_words
from image_classifier.predictions import PredictionTable
from image_classifier.sampling import evenly_spaced
from image_classifier.training.builders import TrainingInputs
from image_classifier.training.checkpoint_io import save_whole
from image_classifier.training.diagnostics import measure_exports
from image_classifier.training.reporting import Results, TrainedRun
from image_classifier.training.run_dir import provenance

log = logging.getLogger(__name__)

_NUM_PARITY_IMAGES = 32
_NUM_GOLDEN_IMAGES = 8


def write_bundle(trained: TrainedRun, results: Results) -> dict[str, Any]:
    """Write `models/<name>/`, and return its provenance.

    Raises:
        ParityError: ONNX and torch predict something else; then nothing is written.
        StorageError: The disk refuses.
    """
    run, config, blueprint = trained.run, trained.config, trained.blueprint
    classifier = trained.classifier.cpu().to(memory_format=torch.contiguous_format)
    facts = _provenance(trained)
    size = blueprint["preprocess"]["size"]
    with atomic_directory(run.bundle, overwrite=config.run.overwrite or run.resumed) as directory:
        files = {"onnx": directory / "model.onnx", "checkpoint": directory / "model.ckpt"}
        _write_checkpoint(classifier, blueprint, files["checkpoint"])
        export_onnx(classifier, size, _onnx_metadata(blueprint), files["onnx"])
        if trained.detector:
            trained.detector.write(directory / DETECTOR)

        # The exported model must predict what the trained one does.
        onnx, checkpoint = OnnxBackend(files["onnx"]), CheckpointBackend(classifier)
        difference = _check_export(checkpoint, onnx, directory, trained.inputs)
        facts["onnx_largest_difference"] = difference
        log.info("ONNX agrees with torch: largest difference of a probability %.1e", difference)
        with np.load(directory / "golden.npz") as golden:
            write_weights_file(classifier, blueprint, golden["pixels"], directory)
        if config.diagnostics.latency:
            measure_exports({"onnx": (onnx, files["onnx"]), "checkpoint": (checkpoint, files["checkpoint"])}, run, size)

        # What describes the model, and last the index that makes the folder a bundle.
        trained.delivered_manifest.write(directory / "manifest.csv")
        write_text(directory / "config.yaml", config.yaml)
        info = _info(trained, results, facts)
        (directory / "MODEL_CARD.md").write_text(model_card(info, trained.delivered_manifest), encoding="utf-8")
        if page := _report(info, trained, directory, results.reported_split):
            write_text(directory / "report.html", page)
        seal(directory, info)
    return facts


def _provenance(trained: TrainedRun) -> dict[str, Any]:
    distillation = trained.inputs.distillation
    facts = provenance(
        trained.config.run.seed,
        manifest_sha256=trained.delivered_manifest.sha256,
        corrected=dict(trained.manifest.corrected),
        data_root=str(trained.manifest.root),
        images_per_second=round(trained.images_per_second, 1),
        baselines={baseline.name: baseline.as_dict() for baseline in trained.baselines},
        candidates=trained.choice.as_dict() if trained.choice else [],
        learning_curve=trained.probe.curve.as_dict(trained.manifest.classes) if trained.probe else {},
        config=trained.config.to_dict(),
        initial_weights=trained.blueprint["initial_weights"],
        **({"teacher": distillation.provenance} if distillation else {}),
    )
    if trained.folds:
        facts["out_of_fold"] = trained.folds
    if trained.refit and trained.refit.folds:
        facts["refit_folds"] = trained.refit.folds
    if trained.refit and trained.refit.epochs:
        facts["refit_epochs"] = trained.refit.epochs
    return dict(without_passwords(facts))


def _info(trained: TrainedRun, results: Results, facts: dict[str, Any]) -> BundleInfo:
    blueprint = trained.blueprint
    return BundleInfo(
        name=trained.run.name,
        classes=trained.manifest.classes,
        preprocess=blueprint["preprocess"],
        normalise=blueprint["normalise"],
        metrics=results.scores,
        intervals=results.intervals,
        provenance=facts,
        temperature=blueprint["temperature"],
        threshold=trained.decision.threshold,
        decision=trained.decision.as_dict(),
    )


def _report(info: BundleInfo, trained: TrainedRun, directory: Path, split: str) -> str:
    """Return report.html, made from the files that the run has written so far; "" where that fails, which is logged."""
    run = trained.run
    predictions = run.plots / split
    paths = RunPaths(predictions, directory, run.directory, Path(AUDITS), trained.manifest.root)
    try:
        table = PredictionTable.read(predictions)
        return run_page(gather(run.name, table, paths, info, sizes_of(directory), lenient=True))
    except Exception:  # a page is no reason to lose a trained model
        log.warning("the bundle has no report.html", exc_info=True)
        return ""


def _onnx_metadata(blueprint: dict[str, Any]) -> dict[str, Any]:
    return {key: blueprint[key] for key in ("classes", "preprocess", "normalise", "temperature", "decision")}


def _write_checkpoint(classifier: Classifier, blueprint: dict[str, Any], path: Path) -> None:
    """Write the weights and what is needed to rebuild the network; loadable with weights_only=True."""
    state = {f"classifier.{key}": value for key, value in classifier.state_dict().items()}
    save_whole({"state_dict": state, "hyper_parameters": {"blueprint": blueprint}}, path)


def _check_export(
    checkpoint: EmbeddingBackend, exported: EmbeddingBackend, directory: Path, inputs: TrainingInputs
) -> float:
    """Compare ONNX with torch on validation images, keep some as golden images, and return the largest difference."""
    rows = inputs.manifest.indices("val")
    rows = rows[evenly_spaced(len(rows), _NUM_PARITY_IMAGES)]
    pixels = np.ascontiguousarray(inputs.cache.gather(rows).transpose(0, 3, 1, 2))  # uint8 [N, 3, S, S]
    expected, embeddings = _in_batches(checkpoint, pixels)
    actual, exported_embeddings = _in_batches(exported, pixels)
    paths = [inputs.manifest.paths[row] for row in rows]
    difference = check_parity(expected, actual, paths, "ONNX Runtime")
    check_embeddings(embeddings, exported_embeddings, paths, "ONNX Runtime")
    golden = evenly_spaced(len(rows), _NUM_GOLDEN_IMAGES)
    np.savez(directory / "golden.npz", pixels=pixels[golden], logits=expected[golden], embeddings=embeddings[golden])
    return difference


def _in_batches(backend: EmbeddingBackend, pixels: np.ndarray, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, C] and embeddings [N, D]."""
    batches = (pixels[start : start + size] for start in range(0, len(pixels), size))
    logits, embeddings = zip(*(backend.logits_and_embeddings(batch) for batch in batches), strict=True)
    return np.concatenate(logits), np.concatenate(embeddings)


def model_card(info: BundleInfo, manifest: Manifest) -> str:
    """Return MODEL_CARD.md, from facts only."""
    counts = {split: len(manifest.indices(split)) for split in SPLITS}
    facts, size = info.provenance, info.preprocess["size"]
    corrected = f" Corrected by fix.csv: {issue_counts_text(manifest.corrected)}." if manifest.corrected else ""
    teacher = facts.get("teacher")
    distilled = f" Distilled from {_escaped(teacher['name'])} (sha256 `{teacher['sha256']}`)." if teacher else ""
    sections = [
        f"# {_escaped(info.name)}",
        f"An image classifier for {len(info.classes)} classes: {', '.join(map(_escaped, info.classes))}.",
        "## Data",
        f"{len(manifest)} images ({', '.join(f'{count} {split}' for split, count in counts.items())}), "
        f"manifest sha256 `{facts['manifest_sha256']}`.{corrected}",
        *_initial_weights_section(facts),
        "## Input and output",
        f"Pixels uint8 [batch, 3, {size}, {size}] after preprocessing `{json.dumps(info.preprocess)}`; "
        "logits float32 [batch, classes]. Normalisation is inside the model; "
        f"probabilities are softmax(logits / {info.temperature:.6g}), "
        f"the temperature {'fitted on val' if info.temperature != 1 else 'left at 1'}.",
        "## Results",
        *(f"Split val: {sentence}" for sentence in val_in_words(facts)),
        "\n".join(_result_rows(info)),
        "### Baselines",
        "What simple classifiers reach on the same splits:",
        "\n".join(_baseline_rows(facts.get("baselines", {}), info.metrics)),
        *_tried_sections(facts),
        "## When it abstains",
        "\n".join(f"- {name}: {limit}." for name, limit in limits_in_words(info.decision).items()),
        "## Origin",
        f"Trained {facts['created']} by image_classifier {facts['version']} at commit `{facts['git']}`, "
        f"seed {facts['seed']}, torch {facts['packages']['torch']}, Python {facts['python']}.{distilled}",
    ]
    return "\n\n".join(sections) + "\n"


def _initial_weights_section(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the training started from, and what its licence restricts; nothing where that is not recorded."""
    origin = WeightOrigin.from_dict(facts.get("initial_weights"))
    if origin is None:
        return
    yield "## Initial weights"
    yield _escaped(" ".join(weights_in_words(origin)))
    rows = {"page": origin.page, "sha256 of the file": origin.sha256}
    if lines := [f"- {name}: `{value.replace('`', '')}`" for name, value in rows.items() if value]:
        yield "\n".join(lines)


def _tried_sections(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of Markdown: the models that were compared on val, where there were several."""
    if rows := facts.get("candidates"):
        yield "### Candidates"
        yield "Compared on val; p is that of McNemar's paired test against the delivered one."
        yield "\n".join(
            [
                "| model | val accuracy | val log loss | p | delivered |\n|---|---|---|---|---|",
                *(
                    f"| {row['name']}: {row['about']} | {row['val_accuracy']:.4f} | {row['val_log_loss']:.4f} "
                    f"| {'' if row['p_value'] is None else format(row['p_value'], '.2f')} "
                    f"| {'yes' if row['delivered'] else ''} |"
                    for row in rows
                ),
            ]
        )


def _escaped(text: str) -> str:
    """Return text for Markdown: the name of a folder must not write any."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", " ".join(text.split()))


def _result_rows(info: BundleInfo) -> Iterator[str]:
    """Yield a table of Markdown: each metric of each split with its interval."""
    yield "| split | metric | value | 95 % interval |\n|---|---|---|---|"
    for split, values in info.metrics.items():
        intervals = info.intervals.get(split, {})
        for name, value in values.items():
            yield f"| {split} | {name} | {value:.4f} | {shown(intervals.get(name)).strip()} |"


def _baseline_rows(baselines: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yield a table of Markdown: accuracy and F1 of each baseline and of the model, for each split."""
    yield "| split | classifier | accuracy | f1_macro |\n|---|---|---|---|"
    for split, scores in metrics.items():
        compared = [
            (f"{name}: {baseline['about']}", baseline["scores"][split])
            for name, baseline in baselines.items()
            if split in baseline["scores"]
        ]
        for name, values in [*compared, ("**this model**", scores)]:
            yield f"| {split} | {name} | {values['accuracy']:.4f} | {values['f1_macro']:.4f} |"
