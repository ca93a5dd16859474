"""Settings given in Python as the overrides of a command line, so that both front doors check and compose alike."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig

from image_classifier.cli import hydra_app
from image_classifier.cli.conf_files import root_groups
from image_classifier.cli.positional import data_choice, model_choice, word_overrides
from image_classifier.cli.recipes import flat_values, override_value
from image_classifier.cli.verbs.prepare import typed_settings
from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.settings import DataSettings
from image_classifier.paths import CONF_DIR

T = TypeVar("T")


def train_overrides(data: str | os.PathLike[str] | None, name: str | None, settings: Mapping[str, Any]) -> list[str]:
    """Return the overrides of `train` for a data set, a name and settings by key.

    Raises:
        ConfigError: The data set does not exist, or a value that no configuration can hold.
    """
    return _line("train", data, ({} if name is None else {"name": name}) | dict(settings))


def audit_settings(
    data: str | os.PathLike[str] | None, settings: Mapping[str, Any]
) -> tuple[DataSettings, AuditSettings, tuple[str, ...]]:
    """Return what the verb `audit` would run with.

    Raises:
        ConfigError: A setting is unknown or invalid.
    """
    return typed_settings(_composed("audit", _line("audit", data, settings)))


def verb_settings(cls: type[T], verb: str, settings: Mapping[str, Any]) -> T:
    """Return the settings of a verb as its dataclass, with the defaults of conf/VERB.yaml.

    Raises:
        ConfigError: A setting is unknown or invalid.
    """
    return hydra_app.typed(cls, _composed(verb, _overrides(verb, settings)), "")


def _composed(verb: str, overrides: Iterable[str]) -> DictConfig:
    with hydra_app.composer(CONF_DIR):
        return hydra_app.composed(verb, overrides)


def _line(verb: str, data: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> list[str]:
    """Return the overrides of a verb whose first word names a data set."""
    given = list(_overrides(verb, settings))
    if data is None:
        return given
    word = os.fspath(data)
    overrides = [*word_overrides(verb, [word], given, [word]), *given]
    overrides = [*data_choice(verb, overrides, None), *overrides]
    return [*model_choice(verb, overrides), *overrides]


def _overrides(verb: str, settings: Mapping[str, Any]) -> Iterator[str]:
    groups = {*root_groups(CONF_DIR, verb), "experiment"}
    for key, value in flat_values(settings):
        is_choice = key in groups and isinstance(value, str)
        yield f"{key}={value if is_choice else override_value(key, value)}"
