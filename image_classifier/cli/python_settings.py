"""Settings given in Python as the overrides of a command line, so that both front doors check and compose alike."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.cli.conf_files import root_groups
from image_classifier.cli.positional import data_choice, word_overrides
from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.prepare import DataSettings
from image_classifier.errors import ConfigError
from image_classifier.override_grammar import quoted
from image_classifier.paths import CONF_DIR
from image_classifier.text import did_you_mean


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
    from image_classifier.cli.verbs.prepare import typed_settings

    with hydra_app.composer(CONF_DIR):
        return typed_settings(hydra_app.composed("audit", _line("audit", data, settings)))


def checked_keys(cls: Any, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings where a dataclass has all of their keys.

    Raises:
        ConfigError: Names the unknown key, and the nearest right one.
    """
    names = [item.name for item in fields(cls)]
    for key in settings:
        if key not in names:
            raise ConfigError(
                f"there is no setting {key!r}", f"{did_you_mean(key, names)}The settings are {', '.join(names)}"
            )
    return settings


def _line(verb: str, data: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> list[str]:
    """Return the overrides of a verb whose first word names a data set."""
    given = list(_overrides(verb, settings))
    if data is None:
        return given
    word = os.fspath(data)
    overrides = [*word_overrides(verb, [word], given, [word]), *given]
    return [*data_choice(verb, overrides, None), *overrides]


def _overrides(verb: str, settings: Mapping[str, Any]) -> Iterator[str]:
    groups = {*root_groups(CONF_DIR, verb), "experiment"}
    for key, value in _flat(settings):
        is_choice = key in groups and isinstance(value, str)
        yield f"{key}={value if is_choice else _value(key, value)}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(key: str, value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | os.PathLike):
        return quoted(os.fspath(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(_value(key, item) for item in value)}]"
    raise ConfigError(
        f"{key} cannot hold a {type(value).__name__}", "use text, numbers, true or false, None, or lists of these"
    )
