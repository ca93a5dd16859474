"""The verb `tune`: check a search space, run the study, and print the winner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from image_classifier.cli import hydra_app
from image_classifier.cli.options import TEXT_KEYS, CommandLine
from image_classifier.cli.verbs.prepare import typed_settings
from image_classifier.dataset.pixel_cache import open_cache
from image_classifier.dataset.run import prepare_dataset
from image_classifier.dataset.settings import DataSettings
from image_classifier.errors import ConfigError
from image_classifier.training.run_dir import RunSettings
from image_classifier.training.tune import run_study
from image_classifier.training.tuning.results import StudyPaths
from image_classifier.training.tuning.space import SearchDimension, as_plain, parse_space
from image_classifier.training.tuning.study import TuneSettings
from image_classifier.training.tuning.subprocess_run import spared_words, tracking_words
from image_classifier.training.tuning.worker import TrialPlan

_OWN_KEYS = ("name", "overwrite", "resume", "tune", "search")  # of this verb, not of a trial
_REPORTER = "image_classifier.training.callbacks.optuna_pruning.OptunaPruning"


def tune(config: DictConfig) -> float:
    """Run a study to the end of its budget, print its summary, and return the best trial's value."""
    settings = hydra_app.typed(TuneSettings, config.tune, "tune")
    run = hydra_app.selected(RunSettings, config)
    _check(settings, run)
    space = parse_space(hydra_app.to_plain(config.search))
    line = _trials_line(space)
    _check_trials(line, space)

    # Decoded once, before many trials need the pixels at the same time.
    data, audit, _ = typed_settings(config)
    manifest, _ = prepare_dataset(data, audit, run.trusted_packages)
    open_cache(manifest, data.preprocess, data.cache, data.limits)

    name = run.name or f"{data.name or manifest.root.resolve().name}-{hydra_app.running_choice('search')}".lstrip(".")
    folders = StudyPaths(name, Path(run.runs_dir), Path(run.models_dir), Path(run.plots_dir))
    flags = tuple(part for flag, value in line.flags for part in (flag, str(value)))
    last = _words_of_trials(hydra_app.to_plain(config), settings, name, line)
    plan = TrialPlan(space, (*flags, *line.overrides), last, folders)
    result = run_study(settings, plan, run.seed, _facts(settings, line, space))
    print("\n".join(result.summary))
    return result.best_value


def _check(settings: TuneSettings, run: RunSettings) -> None:
    if run.overwrite or run.resume:
        raise ConfigError(
            "a study resumes by itself and is never replaced",
            "leave overwrite= and resume= out, or choose another name=",
        )
    if settings.num_trials is None and settings.max_time is None:
        raise ConfigError("a study without a limit never ends", "set tune.num_trials or tune.max_time")


def _trials_line(space: tuple[SearchDimension, ...]) -> CommandLine:
    """Return the flags and overrides of this command that every trial is given too.

    Raises:
        ConfigError: A key is both given and searched.
    """
    line = hydra_app.running_line("tune").for_training(_OWN_KEYS)
    searched = {entry.key for entry in space}
    for text in line.overrides:
        if (key := text.lstrip("+~").partition("=")[0]) in searched:
            raise ConfigError(f"{key} is both given and searched", f"leave {key}= out, or search.{key}=null")
    return line


def _check_trials(line: CommandLine, space: tuple[SearchDimension, ...]) -> None:
    """Compose both ends of each range and each choice once, so that no trial is refused hours later."""
    first = [entry.extremes[0] for entry in space]
    for position, entry in enumerate(space):
        for extreme in entry.extremes:
            tried = [*line.overrides, *first[:position], extreme, *first[position + 1 :]]
            config = hydra_app.composed("train", tried)
            hydra_app.typed(DataSettings, config.data, "data")
            hydra_app.selected(RunSettings, config)


def _facts(settings: TuneSettings, line: CommandLine, space: tuple[SearchDimension, ...]) -> dict[str, Any]:
    """Return what must be equal for trials to be compared; folders and addresses may differ between machines."""
    free = ("logger", "trainer.accelerator", "data.cache", *(f"{key}=" for key in TEXT_KEYS["train"]))
    return {
        "search": as_plain(space),
        "metric": settings.metric,
        "mode": "max" if settings.maximise else "min",
        "command": sorted(text for text in line.overrides if not text.startswith(free)),
    }


def _words_of_trials(
    plain: Mapping[str, Any], settings: TuneSettings, study: str, line: CommandLine
) -> tuple[str, ...]:
    """Return the overrides of every trial: no test images or diagnostics, a reporter, the metric, MLflow's tags."""
    words = ["test=false", f"+callbacks.tuner._target_={_REPORTER}", f"+callbacks.tuner.metric={settings.metric}"]
    mode = "max" if settings.maximise else "min"
    for name in ("best_checkpoint", "early_stopping"):
        node = (plain.get("callbacks") or {}).get(name)
        if node and "monitor" in node and node["monitor"] != settings.metric:
            words += [f"callbacks.{name}.monitor={settings.metric}", f"callbacks.{name}.mode={mode}"]
    return (*words, *spared_words(line.overrides), *tracking_words(plain, study))
