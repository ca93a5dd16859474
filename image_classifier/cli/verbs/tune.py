"""The verb `tune`: search for the best settings; loads no torch, as its trials are processes."""

from __future__ import annotations

import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from image_classifier.cli import hydra_app
from image_classifier.cli.options import TEXT_KEYS, CommandLine
from image_classifier.dataset.pixel_cache import open_cache
from image_classifier.dataset.prepare import DataSettings
from image_classifier.dataset.run import prepare_from
from image_classifier.errors import ConfigError, TrainingError
from image_classifier.training.run_dir import RunSettings
from image_classifier.training.tuning.plots import plot_study
from image_classifier.training.tuning.results import StudyPaths, ranked, table, winner_command, write_csv
from image_classifier.training.tuning.space import SearchDimension, as_plain, parse_space
from image_classifier.training.tuning.study import TuneSettings, open_study
from image_classifier.training.tuning.subprocess_run import sigterm_stops, spared_words, tracking_words
from image_classifier.training.tuning.trials import Trials, owner_in
from image_classifier.training.tuning.worker import TrialPlan, Workers

log = logging.getLogger(__name__)

_NOT_FOR_TRIALS = ("name", "overwrite", "resume", "tune", "search")
_PRUNING = "image_classifier.training.callbacks.optuna_pruning.OptunaPruning"


def tune(config: Any) -> float:
    """Run a study to the end of its budget; return the best trial's value."""
    settings = hydra_app.typed(TuneSettings, config.tune, "tune")
    run = hydra_app.typed(RunSettings, hydra_app.only(config, *(item.name for item in fields(RunSettings))), "")
    if run.overwrite or config.get("resume"):
        raise ConfigError(
            "a study resumes by itself and is never overwritten",
            "leave overwrite= and resume= out, or choose another name=",
        )
    if settings.num_trials is None and settings.max_time is None:
        raise ConfigError("a study without a limit never ends", "set tune.num_trials or tune.max_time")
    space = parse_space(hydra_app.to_plain(config.search))
    line = _trials_line(space)
    _check_trials(line, space)
    manifest, data = prepare_from(config)
    open_cache(manifest, data.preprocess, data.cache, data.limits)  # once, before many trials want it
    name = run.name or f"{data.name or manifest.root.resolve().name}-{hydra_app.running_choice('search')}".lstrip(".")
    paths = StudyPaths(name, Path(run.runs_dir), Path(run.models_dir), Path(run.plots_dir))
    trials = open_study(settings, name, run.seed, _fingerprint(settings, line, space))
    flags = tuple(part for flag, value in line.flags for part in (flag, str(value)))
    plan = TrialPlan(space, (*flags, *line.overrides), _trial_overrides(config, settings, name, line), paths)
    storage = hydra_app.without_passwords(settings.storage)
    log.info("study %s: %d trials so far, in %s", name, len(trials.trials()), storage)
    paths.folder.mkdir(parents=True, exist_ok=True)
    with sigterm_stops(), owner_in(paths.folder) as owner:
        Workers(trials, settings, plan, owner).run()
    return _summarise(trials, settings, plan)


def _trials_line(space: tuple[SearchDimension, ...]) -> CommandLine:
    """Return the flags and overrides of this command that go to every trial.

    Raises:
        ConfigError: A key is both given and searched.
    """
    line = hydra_app.running_line("tune")
    overrides = [
        text
        for text in line.overrides
        if re.split(r"[.=]", text.lstrip("+~"))[0].partition("@")[0] not in _NOT_FOR_TRIALS
    ]
    searched = {dimension.key for dimension in space}
    for text in overrides:
        if (key := text.lstrip("+~").partition("=")[0]) in searched:
            raise ConfigError(
                f"{key} is both given and searched", f"leave {key}= out, or its dimension: search.{key}=null"
            )
    return CommandLine(
        tuple((flag, value) for flag, value in line.flags if flag in ("--config-dir", "--config-path")),
        tuple(overrides),
    )


def _check_trials(line: CommandLine, space: tuple[SearchDimension, ...]) -> None:
    """Compose a trial with both ends of each range and with each choice, so that none is refused hours later."""
    first = [dimension.extremes[0] for dimension in space]
    for position, dimension in enumerate(space):
        for extreme in dimension.extremes:
            tried = [*line.overrides, *first[:position], extreme, *first[position + 1 :]]
            config = hydra_app.composed("train", tried)
            hydra_app.typed(DataSettings, config.data, "data")
            hydra_app.typed(RunSettings, hydra_app.only(config, *(item.name for item in fields(RunSettings))), "")


def _fingerprint(settings: TuneSettings, line: CommandLine, space: tuple[SearchDimension, ...]) -> dict[str, Any]:
    """Return what must be the same for trials to be comparable; paths and addresses may differ between machines."""
    free = ("logger", "trainer.accelerator", "data.cache", *(f"{key}=" for key in TEXT_KEYS["train"]))
    return {
        "search": as_plain(space),
        "metric": settings.metric,
        "mode": "max" if settings.maximise else "min",
        "command": sorted(text for text in line.overrides if not text.startswith(free)),
    }


def _trial_overrides(config: Any, settings: TuneSettings, study: str, line: CommandLine) -> tuple[str, ...]:
    """Return the overrides of every trial besides the user's.

    They leave out the test split and diagnostics, add the pruning callback, choose the weights by the study's metric,
    and set MLflow's tags.
    """
    metric, mode = settings.metric, "max" if settings.maximise else "min"
    overrides = ["test=false", f"+callbacks.tuner._target_={_PRUNING}", f"+callbacks.tuner.metric={metric}"]
    for name in ("best_checkpoint", "early_stopping"):
        node = (config.get("callbacks") or {}).get(name)
        if node and "monitor" in node and node.monitor != metric:
            overrides += [f"callbacks.{name}.monitor={metric}", f"callbacks.{name}.mode={mode}"]
    return (*overrides, *spared_words(line.overrides), *tracking_words(hydra_app.to_plain(config), study))


def _summarise(trials: Trials, settings: TuneSettings, plan: TrialPlan) -> float:
    """Write trials.csv and the figures; print the table and how to train the winner.

    Raises:
        TrainingError: No trial is complete.
    """
    rows = trials.trials()
    best = ranked(rows, settings.maximise)
    if not best:
        failed = [trial.user_attrs.get("reason", "") for trial in rows if trial.state is TrialState.FAIL]
        if failed:
            raise TrainingError(
                f"no trial is complete, and {len(failed)} failed, the last with: {failed[-1]}",
                f"see {plan.paths.folder}/",
            )
        raise TrainingError("no trial is complete yet", "run the same command again to continue")
    winner = best[0]
    plots = plan.paths.plots_dir / plan.paths.study
    write_csv(rows, settings, plots / "trials.csv")
    lines = [
        *table(rows, settings),
        *plot_study(trials.study, settings.metric, plots),
        f"best     trial {winner.number}, {settings.metric} {winner.value:.4f}",
    ]
    if plan.paths.bundle(winner.number).exists():
        lines.append(f"bundle   {plan.paths.bundle(winner.number)}")
    lines += [
        f"trials   {plots / 'trials.csv'}; their logs: {plan.paths.folder}/",
        f"next     {winner_command(plan.first, plan.overrides(winner), plan.paths.study)}",
    ]
    print("\n".join(lines))
    return float(winner.value or 0.0)
