"""Results of a finished run: metrics, tables and figures, the loggers' final values, and the summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from image_classifier.atomic_io import write_text
from image_classifier.evaluation import baselines as simple
from image_classifier.evaluation.baselines import Baseline
from image_classifier.evaluation.leaks import LeakScore, leak_score
from image_classifier.evaluation.metrics.compute import ClassificationMetrics, compute_metrics
from image_classifier.evaluation.plots.learning_curves import (
    plot_curves_in_parts,
    plot_learning_curves,
    plot_loss_in_parts,
)
from image_classifier.evaluation.reliability.abstention import Decision
from image_classifier.evaluation.reliability.ood import Detector
from image_classifier.evaluation.reliability_results import Trust, write_trust
from image_classifier.evaluation.results import answer_columns, class_columns, metrics_lines, scalars, write_evaluation
from image_classifier.inference.predictor import EmbeddingBackend
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.predictions import PredictionTable
from image_classifier.training.builders import TrainingInputs
from image_classifier.training.callbacks.csv_metrics import CSVMetrics
from image_classifier.training.config import TrainConfig
from image_classifier.training.diagnostics import diagnose
from image_classifier.training.loggers import RunLoggers
from image_classifier.training.run_dir import RunDir
from image_classifier.training.transfer.candidates import CandidateChoice
from image_classifier.training.transfer.probe import Probe
from image_classifier.training.transfer.refit import Refit


@dataclass(frozen=True)
class TrainedRun:
    """Everything that a training has produced, before any of it is written.

    Attributes:
        run: Name and folders.
        inputs: What it was trained from.
        classifier: The best epoch's weights.
        backend: Makes the same, as fast as this machine computes it.
        blueprint: What a checkpoint needs to rebuild the classifier, calibration included.
        tables: Calibrated predictions by split.
        decision: When the model abstains.
        detector: Finds images unlike the training's; None: there is none.
        baselines: Simple classifiers to compare with.
        probe: The logistic regression that the head started from; None: it did not.
        choice: The candidates for delivery; None: there was one.
        history: The metrics of each epoch.
        images_per_second: Training images.
        epochs: Epochs trained.
        steps: Optimizer steps.
        folds: The number of folds where the model is the mean of all; val are then the training images, out of fold.
        refit: How it was fitted again to train and val, which gave its scores on val; None: it was not.
    """

    run: RunDir
    inputs: TrainingInputs
    classifier: Classifier
    backend: Callable[[], EmbeddingBackend]
    blueprint: dict[str, Any]
    tables: Mapping[str, PredictionTable]
    decision: Decision
    detector: Detector | None
    baselines: Sequence[Baseline]
    probe: Probe | None
    choice: CandidateChoice | None
    history: CSVMetrics
    images_per_second: float
    epochs: int
    steps: int
    folds: int | None = None
    refit: Refit | None = None

    @property
    def config(self) -> TrainConfig:
        """The configuration, with the values that were found by trying."""
        return self.inputs.config

    @property
    def manifest(self) -> Manifest:
        """The images."""
        return self.inputs.manifest

    @property
    def delivered_manifest(self) -> Manifest:
        """The images as the bundle lists them: val images that the model was fitted to are training images."""
        return self.manifest.moved("val", "train") if self.folds or self.refit else self.manifest

    @property
    def images_seen(self) -> int:
        """Training images, counted once an epoch."""
        return self.epochs * len(self.manifest.indices("train"))


@dataclass(frozen=True)
class Results:
    """The scores of a model by split: metrics, those of leaked images, all as plain numbers, and reliability."""

    metrics: dict[str, ClassificationMetrics]
    leaks: dict[str, LeakScore | None]
    scores: dict[str, dict[str, float]]
    trusts: dict[str, Trust]

    @property
    def score(self) -> float:
        """What sweeps compare: F1 on val, never on test."""
        return self.metrics["val"].f1_macro

    @property
    def reported_split(self) -> str:
        """The split whose metrics are reported: test, where it was evaluated."""
        return next(split for split in reversed(SPLITS) if split in self.metrics)

    @property
    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """The 95 % intervals of each split by name, where there is one."""
        return {
            split: {name: list(bounds) for name, bounds in metrics.intervals.items() if bounds}
            for split, metrics in self.metrics.items()
        }


def write_results(trained: TrainedRun) -> Results:
    """Compute the metrics of the predictions, and write tables and figures to the run's folder in plots/."""
    run, tables, figures = trained.run, trained.tables, trained.config.run.plots.figures
    metrics = {split: compute_metrics(table) for split, table in tables.items()}
    leaks = {split: leak_score(table, trained.manifest.leaked(split)) for split, table in tables.items()}
    trusts = {
        split: write_trust(table, trained.decision, run.plots / split, f"{run.name}, {split}", figures)
        for split, table in tables.items()
    }
    scores = {split: scalars(metrics[split], leaks[split]) for split in tables}
    write_text(run.plots / "metrics.json", json.dumps(scores, indent=2) + "\n")
    if figures:
        _plot_curves(trained)
    for split, table in tables.items():
        write_evaluation(
            table,
            metrics[split],
            trained.manifest.part(split),
            run.plots / split,
            f"{run.name}, {split}",
            trained.config.data.limits,
            leaks[split],
            simple.baseline_scores(trained.baselines, split),
            figures,
        )
    return Results(metrics, leaks, scores, trusts)


def _plot_curves(trained: TrainedRun) -> None:
    if not trained.history.rows:
        return
    curves, plots, parts = trained.history.curves(), trained.run.plots, trained.config.run.plots.parts
    plot_learning_curves(curves, plots)
    if parts:
        plot_curves_in_parts(curves, plots, parts)
    else:
        plot_loss_in_parts(curves, plots)


def log_outcome(loggers: RunLoggers, trained: TrainedRun, results: Results, provenance: Mapping[str, Any]) -> None:
    """Give the loggers the final values: scores, intervals, robustness, latency, tables, the bundle and the figures."""
    run = trained.run
    values = {**_final_scores(results), **diagnose(run), **simple.as_metrics(trained.baselines)}
    loggers.log_metrics(values, max(0, trained.epochs - 1), trained.steps)
    for split, table in trained.tables.items():
        columns = {
            f"tables/{split}_answers": answer_columns(table),
            f"tables/{split}_classes": class_columns(results.metrics[split]),
        }
        loggers.keep_tables(columns)
    tags = {"git_commit": str(provenance["git"]), "bundle": str(run.bundle)}
    loggers.keep(tags, {"bundle": run.bundle, "plots": run.plots})
    loggers.finish()


def _final_scores(results: Results) -> dict[str, float]:
    scores = {f"test/{name}": value for name, value in results.scores.get("test", {}).items()}
    for split, trust in results.trusts.items():
        scores |= {f"{split}/{name}": value for name, value in trust.scalars().items()}
    for name, (low, high) in results.intervals.get("test", {}).items():
        scores |= {f"test/{name}_low": low, f"test/{name}_high": high}
    return scores


def summary_lines(trained: TrainedRun, results: Results, logged_to: Sequence[str]) -> Iterator[str]:
    """Yield the lines that a person reads at the end: metrics, baselines, speed, and where everything is."""
    split, run = results.reported_split, trained.run
    scores = results.metrics[split].scalars()
    simple.warn_if_not_better(trained.baselines, split, scores)
    yield from metrics_lines(results.metrics[split], split, results.leaks[split])
    yield from results.trusts[split].lines(split)
    yield from simple.lines(trained.baselines, split, scores)
    if split == "val":
        has_test = bool(len(trained.manifest.indices("test")))
        hint = "test=false kept the test images for later" if has_test else "get test images with data.split.test=0.1"
        images = "training images out of fold" if trained.folds else "validation images"
        picked = "picked the best epoch" if trained.epochs or trained.folds else "chose the model"
        yield f"these scores are from the {images}, which also {picked}, so they are slightly too good; {hint}"
        if trained.refit:
            yield "the delivered model was then fitted to these images too; the scores are of models before that"
    if trained.images_per_second:
        yield f"images/s {trained.images_per_second:.1f}"
    yield f"bundle   {run.bundle}"
    yield f"plots    {run.plots}"
    yield from logged_to
    yield f"log      {run.directory / 'train.log'}"
