"""A study of many trainings, from its settings to the winner; loads no torch, as its trials are processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from image_classifier.errors import TrainingError
from image_classifier.mappings import without_passwords
from image_classifier.training.tuning.plots import plot_study
from image_classifier.training.tuning.results import ranked, table, winner_command, write_csv
from image_classifier.training.tuning.study import TuneSettings, open_study
from image_classifier.training.tuning.subprocess_run import sigterm_stops
from image_classifier.training.tuning.trials import Trials, owner_in
from image_classifier.training.tuning.worker import TrialPlan, Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyResult:
    """The best value, and the summary for a person."""

    best_value: float
    summary: tuple[str, ...]


def run_study(settings: TuneSettings, plan: TrialPlan, seed: int, facts: Mapping[str, Any]) -> StudyResult:
    """Run a study to the end of its budget, and write trials.csv and figures to its plots folder.

    Args:
        settings: The keys of `tune`.
        plan: What its trials share.
        seed: Of the sampler.
        facts: Must be equal whenever the study is resumed.

    Raises:
        TrainingError: No trial is complete.
        ConfigError: The study was begun with other facts.
        StorageError: The database does not answer.
    """
    trials = open_study(settings, plan.paths.study, seed, facts)
    storage = without_passwords(settings.storage)
    log.info("study %s: %d trials so far, in %s", plan.paths.study, len(trials.trials()), storage)
    folder = plan.paths.folder
    folder.mkdir(parents=True, exist_ok=True)
    with sigterm_stops(), owner_in(folder) as owner:
        Workers(trials, settings, plan, owner).run()
    rows = trials.trials()
    best = ranked(rows, settings.maximise)
    if not best:
        raise _nothing_complete(rows, folder)
    plots = plan.paths.plots_dir / plan.paths.study
    write_csv(rows, settings, plots / "trials.csv")
    return StudyResult(float(best[0].value or 0.0), tuple(_summary(trials, settings, plan, best[0], plots)))


def _nothing_complete(rows: Sequence[FrozenTrial], folder: Path) -> TrainingError:
    reasons = [trial.user_attrs.get("reason", "") for trial in rows if trial.state is TrialState.FAIL]
    if reasons:
        return TrainingError(
            f"no trial is complete, and {len(reasons)} failed, the last with: {reasons[-1]}", f"see {folder}/"
        )
    return TrainingError("no trial is complete yet", "run the same command again to resume the study")


def _summary(
    trials: Trials, settings: TuneSettings, plan: TrialPlan, winner: FrozenTrial, plots: Path
) -> Iterator[str]:
    """Yield the table of trials, the figures, the best trial, and how to train it again."""
    yield from table(trials.trials(), settings)
    yield from plot_study(trials.study, settings.metric, plots)
    yield f"best     trial {winner.number}, {settings.metric} {winner.value:.4f}"
    bundle = plan.paths.bundle(winner.number)
    if bundle.exists():
        yield f"bundle   {bundle}"
    yield f"trials   {plots / 'trials.csv'}; their logs: {plan.paths.folder}/"
    yield f"next     {winner_command(plan.first, plan.overrides(winner), plan.paths.study)}"
