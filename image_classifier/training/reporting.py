"""What a finished run leaves and says: figures and tables, the loggers' last words, the lines in the terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from image_classifier.atomic_io import write_text
from image_classifier.evaluation import baselines as simple
from image_classifier.evaluation.baselines import Baseline
from image_classifier.evaluation.leaks import LeakScore, leak_score
from image_classifier.evaluation.metrics.compute import ClassificationMetrics, compute_metrics
from image_classifier.evaluation.plots.run_plots import plot_curves_in_parts, plot_learning_curves, plot_loss_in_parts
from image_classifier.evaluation.reliability.abstention import Decision
from image_classifier.evaluation.reliability.results import Trust, write_trust
from image_classifier.evaluation.results import answer_columns, class_columns, metrics_lines, scalars, write_evaluation
from image_classifier.images import DecodeLimits
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.predictions import PredictionTable
from image_classifier.program import program
from image_classifier.training.callbacks.csv_metrics import CSVMetrics
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.diagnostics import diagnose
from image_classifier.training.loggers import RunLoggers
from image_classifier.training.run_dir import PlotSettings, RunDir


@dataclass(frozen=True)
class Results:
    """What the model reached on each part: the metrics, those of leaked and clean images apart, and all of them as plain numbers by name."""

    metrics: dict[str, ClassificationMetrics]
    leaks: dict[str, LeakScore | None]
    scores: dict[str, dict[str, float]]
    trusts: dict[str, Trust]

    @property
    def score(self) -> float:
        """What sweeps compare: F1 on val, never on test."""
        return self.metrics["val"].f1_macro

    @property
    def judged(self) -> str:
        """The part that the figures are read from: test, where it was judged."""
        return next(split for split in reversed(SPLITS) if split in self.metrics)

    @property
    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """The 95 % intervals of each part by name, where there is one."""
        return {
            split: {name: list(bounds) for name, bounds in metrics.intervals.items() if bounds}
            for split, metrics in self.metrics.items()
        }


def write_results(
    run: RunDir,
    manifest: Manifest,
    tables: dict[str, PredictionTable],
    history: CSVMetrics,
    baselines: Sequence[Baseline],
    decision: Decision,
    plots: PlotSettings,
    limits: DecodeLimits,
) -> Results:
    """Judge the predictions, and write the tables of the run and, if asked for, its figures to its folder in plots/."""
    metrics = {split: compute_metrics(table) for split, table in tables.items()}
    leaks = {split: leak_score(table, manifest.leaked(split)) for split, table in tables.items()}
    trusts = {
        split: write_trust(table, decision, run.plots / split, f"{run.name}, {split}", plots.figures)
        for split, table in tables.items()
    }
    results = Results(metrics, leaks, {split: scalars(metrics[split], leaks[split]) for split in tables}, trusts)
    write_text(run.plots / "metrics.json", json.dumps(results.scores, indent=2) + "\n")
    if plots.figures:
        plot_learning_curves(history.curves(), run.plots)
        plot_curves_in_parts(history.curves(), run.plots, plots.parts) if plots.parts else plot_loss_in_parts(
            history.curves(), run.plots
        )
    for split, table in tables.items():
        beside = simple.beside(baselines, split)
        title, directory = f"{run.name}, {split}", run.plots / split
        write_evaluation(
            table, metrics[split], manifest.part(split), directory, title, limits, leaks[split], beside, plots.figures
        )
    return results


def log_outcome(
    loggers: RunLoggers,
    run: RunDir,
    results: Results,
    tables: dict[str, PredictionTable],
    baselines: Sequence[Baseline],
    facts: dict[str, Any],
    trainer: pl.Trainer,
) -> None:
    """Give the loggers what is known at the end: scores, intervals, robustness, latency, tables of answers and classes, bundle, figures."""
    scores = {f"test/{name}": value for name, value in results.scores.get("test", {}).items()}
    scores |= {
        f"{split}/{name}": value for split, trust in results.trusts.items() for name, value in trust.scalars().items()
    }
    bounds = results.intervals.get("test", {}).items()
    scores |= {
        f"test/{name}_{end}": value for name, pair in bounds for end, value in zip(("low", "high"), pair, strict=True)
    }
    loggers.log_metrics(
        {**scores, **diagnose(run), **simple.as_metrics(baselines)},
        max(0, trainer.current_epoch - 1),
        trainer.global_step,
    )
    for split, table in tables.items():
        loggers.keep_tables(
            {
                f"tables/{split}_answers": answer_columns(table),
                f"tables/{split}_classes": class_columns(results.metrics[split]),
            }
        )
    loggers.keep(
        {"git_commit": str(facts["git"]), "bundle": str(run.bundle)}, {"bundle": run.bundle, "plots": run.plots}
    )
    loggers.finish()


def summarise(
    run: RunDir,
    results: Results,
    baselines: Sequence[Baseline],
    throughput: Throughput,
    logged: list[str],
    has_test_part: bool,
) -> None:
    """Print what was reached, beside the baselines, and where everything is."""
    split = results.judged
    own = results.metrics[split].scalars()
    simple.warn_if_not_better(baselines, split, own)
    said = (*metrics_lines(results.metrics[split], split, results.leaks[split]), *results.trusts[split].lines(split))
    print("\n".join([*said, *simple.lines(baselines, split, own)]))
    if split == "val" and has_test_part:
        print("these figures are of the part that chose the best epoch; test=false left the test part alone")
    elif split == "val":
        print(
            "there is no test part: these figures are of the part that chose the best epoch; ask for one with data.split.test=0.1"
        )
    print(f"images/s {throughput.images_per_second:.1f}")
    print(
        "\n".join(
            [f"bundle   {run.bundle}", f"plots    {run.plots}", *logged, f"log      {run.directory / 'train.log'}"]
        )
    )
    print(f"next     {program()} infer --checkpoint_name {shlex.quote(run.name)} --images PATH")
