"""The verb `tune`: from a search space to the best settings, read top to bottom; loads no torch, as its trials are processes."""

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
from image_classifier.training.tuning.space import SearchDimension, as_facts, parse_space
from image_classifier.training.tuning.study import TuneSettings, open_study
from image_classifier.training.tuning.subprocess_run import sigterm_stops, spared_words, tracking_words
from image_classifier.training.tuning.trials import Trials, owner_in
from image_classifier.training.tuning.worker import TrialPlan, Workers

log = logging.getLogger(__name__)

_OURS = ("name", "overwrite", "resume", "tune", "search")  # of the command line, not a trial's
_REPORTER = "image_classifier.training.callbacks.optuna_pruning.OptunaPruning"


def tune(config: Any) -> float:
    """Run a study to the end of its budget; returns the best trial's value."""
    asked = hydra_app.typed(TuneSettings, config.tune, "tune")
    run = hydra_app.typed(RunSettings, hydra_app.only(config, *(item.name for item in fields(RunSettings))), "")
    if run.overwrite or config.get("resume"):
        raise ConfigError(
            "a study goes on by itself and is never replaced",
            "leave overwrite= and resume= out, or choose another name=",
        )
    if asked.num_trials is None and asked.max_time is None:
        raise ConfigError("a study without a bound never ends", "set tune.num_trials or tune.max_time")
    space = parse_space(hydra_app.to_plain(config.search))
    line = _trials_line(space)
    _check_trials(line, space)
    manifest, data = prepare_from(config)
    open_cache(manifest, data.preprocess, data.cache, data.limits)  # once, before many trials want it
    name = run.name or f"{data.name or manifest.root.resolve().name}-{hydra_app.running_choice('search')}".lstrip(".")
    places = StudyPaths(name, Path(run.runs_dir), Path(run.models_dir), Path(run.plots_dir))
    trials = open_study(asked, name, run.seed, _facts(asked, line, space))
    flags = tuple(part for flag, value in line.flags for part in (flag, str(value)))
    plan = TrialPlan(space, (*flags, *line.overrides), _for_trials(config, asked, name, line), places)
    log.info(
        "study %s: %d trials so far, in %s", name, len(trials.trials()), hydra_app.without_passwords(asked.storage)
    )
    places.folder.mkdir(parents=True, exist_ok=True)
    with sigterm_stops(), owner_in(places.folder) as owner:
        Workers(trials, asked, plan, owner).run()
    return _summarise(trials, asked, plan)


def _trials_line(space: tuple[SearchDimension, ...]) -> CommandLine:
    """The flags and overrides of this command that are every trial's too.

    Raises:
        ConfigError: A key is given and searched.
    """
    line = hydra_app.running_line("tune")
    overrides = [
        text for text in line.overrides if re.split(r"[.=]", text.lstrip("+~"))[0].partition("@")[0] not in _OURS
    ]
    searched = {entry.key for entry in space}
    for text in overrides:
        if (key := text.lstrip("+~").partition("=")[0]) in searched:
            raise ConfigError(f"{key} is given and searched", f"leave {key}= out, or the entry: search.{key}=null")
    return CommandLine(
        tuple((flag, value) for flag, value in line.flags if flag in ("--config-dir", "--config-path")),
        tuple(overrides),
    )


def _check_trials(line: CommandLine, space: tuple[SearchDimension, ...]) -> None:
    """Compose what trials may be given, both ends of each range and each choice once, so that none is refused hours later."""
    first = [entry.extremes[0] for entry in space]
    for position, entry in enumerate(space):
        for extreme in entry.extremes:
            tried = [*line.overrides, *first[:position], extreme, *first[position + 1 :]]
            config = hydra_app.composed("train", tried)
            hydra_app.typed(DataSettings, config.data, "data")
            hydra_app.typed(RunSettings, hydra_app.only(config, *(item.name for item in fields(RunSettings))), "")


def _facts(asked: TuneSettings, line: CommandLine, space: tuple[SearchDimension, ...]) -> dict[str, Any]:
    """What must be the same for trials to be compared; folders and addresses may differ from machine to machine."""
    places = [f"{key}=" for key in TEXT_KEYS["train"]]
    same = sorted(
        text for text in line.overrides if not text.startswith(("logger", "trainer.accelerator", "data.cache", *places))
    )
    return {
        "search": as_facts(space),
        "metric": asked.metric,
        "mode": "max" if asked.maximise else "min",
        "command": same,
    }


def _for_trials(config: Any, asked: TuneSettings, study: str, line: CommandLine) -> tuple[str, ...]:
    """What every trial is given beside the user's words: no test part or diagnostics, whom to report to, the best weights' metric, MLflow's tags."""
    words = ["test=false", f"+callbacks.tuner._target_={_REPORTER}", f"+callbacks.tuner.metric={asked.metric}"]
    mode = "max" if asked.maximise else "min"
    for name in ("best_checkpoint", "early_stopping"):
        node = (config.get("callbacks") or {}).get(name)
        if node and "monitor" in node and node.monitor != asked.metric:
            words += [f"callbacks.{name}.monitor={asked.metric}", f"callbacks.{name}.mode={mode}"]
    return (*words, *spared_words(line.overrides), *tracking_words(config, study))


def _summarise(trials: Trials, asked: TuneSettings, plan: TrialPlan) -> float:
    """Write trials.csv and the figures, print the table and how to train the winner; TrainingError where no trial is complete."""
    rows = trials.trials()
    best = ranked(rows, asked.maximise)
    if not best:
        failed = [trial.user_attrs.get("reason", "") for trial in rows if trial.state is TrialState.FAIL]
        if failed:
            raise TrainingError(
                f"no trial is complete, and {len(failed)} failed, the last with: {failed[-1]}",
                f"see {plan.places.folder}/",
            )
        raise TrainingError("no trial is complete yet", "run the same command again to go on")
    study = plan.places.study
    plots = plan.places.plots_dir / study
    write_csv(rows, asked, plots / "trials.csv")
    print("\n".join(table(rows, asked)))
    print("\n".join(plot_study(trials.study, asked.metric, plots)))
    winner = best[0]
    print(f"best     trial {winner.number}, {asked.metric} {winner.value:.4f}")
    if plan.places.bundle(winner.number).exists():
        print(f"bundle   {plan.places.bundle(winner.number)}")
    print(f"trials   {plots / 'trials.csv'}; what each said: {plan.places.folder}/")
    own = [entry.override(winner.params[entry.key]) for entry in plan.space]
    print(f"next     {winner_command(plan.first, own, study)}")
    return float(winner.value or 0.0)
