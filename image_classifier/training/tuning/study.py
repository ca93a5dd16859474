"""Settings of `tune`, and Optuna's study with its sampler and pruner."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from image_classifier.errors import ConfigError
from image_classifier.text import did_you_mean
from image_classifier.training.tuning.storage import open_storage, patiently
from image_classifier.training.tuning.trials import Trials

SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "hyperband", "none")
MODES = ("auto", "max", "min")


@dataclass(frozen=True)
class TuneSettings:
    """The keys of `tune` in conf/tune.yaml."""

    num_trials: int | None = 20
    max_time: str | None = None
    workers: int = 1
    metric: str = "val/f1_macro"
    mode: str = "auto"
    sampler: str = "tpe"
    pruner: str = "median"
    keep: int | None = 1
    storage: str = "sqlite:///tune.db"

    def __post_init__(self) -> None:
        for name in ("num_trials", "workers", "keep"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"tune.{name} must be at least 1, not {value}")
        for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS), ("mode", MODES)):
            value = getattr(self, name)
            if isinstance(value, str) and value != "???" and value not in known:
                raise ConfigError(
                    f"invalid tune.{name}={value}", f"{did_you_mean(value, known)}use one of {', '.join(known)}"
                )
        if isinstance(self.metric, str) and not self.metric.startswith("val/"):
            raise ConfigError(
                f"tune.metric={self.metric} is not a validation metric",
                "trials are compared by a metric that starts with val/, such as val/f1_macro",
            )
        _ = self.max_seconds  # checks max_time

    @property
    def maximise(self) -> bool:
        """Whether a larger metric is better."""
        return self.mode == "max" or (self.mode == "auto" and not self.metric.endswith("loss"))

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds: days:hours:minutes:seconds, as in trainer.max_time, or minutes alone."""
        if self.max_time is None:
            return None
        text = str(self.max_time)
        if re.fullmatch(r"\d+(\.\d+)?", text):
            return float(text) * 60
        if not re.fullmatch(r"\d+(:\d+){3}", text):
            raise ConfigError(
                f"invalid tune.max_time={text}",
                "write days:hours:minutes:seconds, such as 00:02:00:00, or minutes, such as 120",
            )
        days, hours, minutes, seconds = map(int, text.split(":"))
        return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def open_study(settings: TuneSettings, name: str, seed: int, fingerprint: Mapping[str, Any]) -> Trials:
    """Open the study of that name, or create it.

    Args:
        settings: The keys of `tune`.
        name: The study's name in the database.
        seed: Of the sampler.
        fingerprint: What must stay the same for trials to be comparable, as plain values.

    Raises:
        StorageError: The database cannot be opened.
        ConfigError: The study was begun with another `fingerprint`.
    """
    _quiet()
    storage = open_storage(settings.storage)
    direction = StudyDirection.MAXIMIZE if settings.maximise else StudyDirection.MINIMIZE
    study = patiently(
        lambda: optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
    )
    known = study.user_attrs.get("facts")
    if known is None:
        patiently(lambda: study.set_user_attr("facts", dict(fingerprint)))
    _check_same(name, known or {}, fingerprint)
    study.sampler = SamplerByNumber(settings.sampler, seed)
    study.pruner = _pruner(settings.pruner)
    return Trials(study, storage)


def _check_same(name: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for key, value in known.items():
        if given.get(key) != value:
            text = " ".join(value) or "none" if isinstance(value, list) else value
            shown = "" if key == "search" else f": {text}"
            raise ConfigError(
                f"the study {name!r} was begun with another {key}{shown}", "use the same, or another name="
            )


def _quiet() -> None:
    optuna.logging.disable_default_handler()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # Trials.heartbeat records it.
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with Study.optimize")


def _pruner(name: str) -> optuna.pruners.BasePruner:
    if name == "median":
        # The first validations vary too much to compare trials by.
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3)
    return optuna.pruners.HyperbandPruner() if name == "hyperband" else optuna.pruners.NopPruner()


class SamplerByNumber(BaseSampler):
    """A sampler seeded by `seed` and the trial's number: workers differ, and a resumed study does not repeat itself."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.seed = seed
        self._of_thread = threading.local()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        seed = int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0])
        if self.name == "random":
            self._of_thread.sampler = RandomSampler(seed)
        else:
            # constant_liar: values that other workers are trying now are not tried again.
            self._of_thread.sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)

    @property
    def _sampler(self) -> BaseSampler:
        return cast(BaseSampler, self._of_thread.sampler)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)
