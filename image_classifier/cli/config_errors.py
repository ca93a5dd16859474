"""Errors of the command line in one line, before anything is loaded: the nearest name and the file that defines it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from image_classifier.cli.conf_files import is_base
from image_classifier.cli.options import TEXT_KEYS
from image_classifier.errors import ConfigError
from image_classifier.extras import install
from image_classifier.override_grammar import requoted
from image_classifier.paths import CONF_DIR
from image_classifier.program import program
from image_classifier.text import did_you_mean, nearest

_JOBLIB, _SUBMITIT = "hydra-joblib-launcher", "hydra-submitit-launcher"
_LAUNCHERS = {"joblib": _JOBLIB, "submitit_local": _SUBMITIT, "submitit_slurm": _SUBMITIT}  # of the extra `launchers`


def one_line(error: BaseException) -> str:
    """Return the message of an error and of its cause, without Hydra's advice and layout."""
    texts = [str(error), str(error.__cause__ or "")]
    lines = [
        line.strip() for text in texts for line in re.split(r"(?i)\n(?:config )?search path:", text)[0].splitlines()
    ]
    noise = ("full_key", "object_type", "reference_type", "See https", "Set the environment", "To append")
    return "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))


def parse(override: str) -> Override:
    """Return an override as Hydra parses it, quoted where that is needed.

    Raises:
        ConfigError: Hydra cannot parse it, quoted or not.
    """
    parser = OverridesParser.create()
    try:
        return parser.parse_overrides([override])[0]
    except OverrideParseException as error:
        again = requoted(override)
        if again is None:
            raise ConfigError(f"cannot read {override!r}", f"{one_line(error)} (quote it: 'key=\"value\"')") from error
    try:
        return parser.parse_overrides([again])[0]
    except OverrideParseException as error:
        raise ConfigError(f"cannot read {override!r}", "write key=value") from error


def jobs(parsed: list[Override], sweep: bool) -> list[list[str]]:
    """Return the lists of overrides to check: one, or, for a sweep, one for each choice of each group.

    Each choice is checked once, together with the first choices of the other groups.
    """
    fixed = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    swept = [override for override in parsed if override.is_sweep_override()]
    if swept and not sweep:
        line = swept[0].input_line or ""
        key, _, value = line.partition("=")
        hint = f"add -m to run each, write '{key}=[{value}]' for a list, or '{key}=\"{value}\"' for text"
        raise ConfigError(f"{line} names several values", hint)
    lists = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        for override in swept
        if override.is_discrete_sweep() and override.value_type != ValueType.GLOB_CHOICE_SWEEP
    ]
    first = [values[0] for values in lists if values]
    jobs = [fixed + first]
    for position, values in enumerate(values for values in lists if values):
        if "." not in values[0].partition("=")[0]:
            jobs += [fixed + first[:position] + [value] + first[position + 1 :] for value in values[1:]]
    return jobs


def check_complete(config: DictConfig, verb: str) -> None:
    """Raise ConfigError for a tree with a `???` or with an interpolation of an unknown key."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if not missing:
            OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve {error.full_key or 'the configuration'}", one_line(error)) from error
    if missing:
        write = " ".join(f"{key}={_placeholder(key, verb)}" for key in missing)
        raise ConfigError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing", f"write {write}")


def _placeholder(key: str, verb: str) -> str:
    if key.endswith(("dir", "path", "archive", "images")):
        return "PATH"
    return "NAME" if key in TEXT_KEYS.get(verb, ()) else "VALUE"


def explain(error: Exception, root: str, overrides: list[str], extra: list[str], verb: str) -> ConfigError:
    """Return the error of one override, found by checking each alone; else Hydra's own message.

    Called inside an initialised Hydra; `extra` are overrides of ours, such as the search path.
    """
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create().parse_overrides(overrides)
    refused = _missing_launcher(loader, root, parsed, extra)
    if refused:
        return refused
    parsed = [override for override in parsed if not override.is_hydra_override()]
    groups, keys = _split(loader, root, parsed, extra)
    try:
        chosen = _chosen(loader, root, extra)
    except (HydraException, OSError):  # the root file itself is refused
        return ConfigError("Hydra cannot compose the configuration", one_line(error))
    for override in groups:
        refused = _refused_group(loader, root, override, chosen, extra)
        if refused:
            return refused
    kept = [override.input_line or "" for override in groups] + extra
    return _refused_key(loader, root, keys, kept, verb) or ConfigError(
        "Hydra refuses the command line", one_line(error)
    )


def _missing_launcher(loader: ConfigLoader, root: str, parsed: list[Override], extra: list[str]) -> ConfigError | None:
    """Return the refusal of a launcher whose package is not installed, None for other refusals."""
    for override in parsed:
        package = _LAUNCHERS.get(str(override.value())) if override.key_or_group == "hydra/launcher" else None
        if package and override.value() not in _options(loader, root, "hydra/launcher", extra):
            fact = f"{override.input_line} needs the package {package}, which is not installed"
            return ConfigError(fact, install("launchers"))
    return None


def _split(
    loader: ConfigLoader, root: str, parsed: list[Override], extra: list[str]
) -> tuple[list[Override], list[Override]]:
    def is_group(override: Override) -> bool:
        return bool(_options(loader, root, override.key_or_group, extra)) and not isinstance(override.value(), dict)

    groups = [override for override in parsed if is_group(override)]
    return groups, [override for override in parsed if override not in groups]


def _options(loader: ConfigLoader, root: str, group: str, extra: list[str]) -> list[str]:
    found: list[str] = loader.get_group_options(group, ObjectType.CONFIG, config_name=root, overrides=extra)
    return [name for name in found if not is_base(name)]


def _chosen(loader: ConfigLoader, root: str, extra: list[str]) -> dict[str, Any]:
    """Return the groups of the root's defaults list, each with its choice."""
    choices: dict[str, Any] = loader.compute_defaults_list(root, extra, RunMode.RUN).overrides.known_choices
    return {group: choice for group, choice in choices.items() if not group.startswith("hydra")}


def _refused_group(
    loader: ConfigLoader, root: str, override: Override, chosen: dict[str, Any], extra: list[str]
) -> ConfigError | None:
    group, choice = override.key_or_group, override.value()
    if group not in chosen and not override.is_add():
        hint = f"{did_you_mean(group, chosen)}To add one write +{group}=..."
        return ConfigError(f"{group} is not a group of {root}", hint)
    if group in chosen and override.is_add() and chosen[group] is not None:
        return ConfigError(f"{group} is chosen already", f"write {group}={choice} without +")
    options = _options(loader, root, group, extra)
    names = choice if isinstance(choice, list) else [choice]
    for name in names:
        if name is not None and not override.is_delete() and str(name).removesuffix(".yaml") not in options:
            hint = f"{did_you_mean(str(name), options)}{_folder(loader, group)} has {', '.join(options)}"
            return ConfigError(f"{name} is not a choice of {group}", hint)
    return None


def _refused_key(
    loader: ConfigLoader, root: str, keys: list[Override], kept: list[str], verb: str
) -> ConfigError | None:
    try:
        added = [override.input_line or "" for override in keys if override.is_force_add()]
        config = hydra.compose(root, kept + added)
    except (HydraException, OmegaConfBaseException, ValueError):
        return None
    groups = _chosen(loader, root, kept)
    for override in keys:
        key = override.key_or_group
        known = key in _keys(config)
        if override.is_add() and known and not isinstance(override.value(), (dict, list)):
            return ConfigError(f"{key} is a key already", f"write {(override.input_line or '')[1:]} without +")
        if not known and not override.is_add() and not override.is_force_add():
            valid = _keys(config) | set(groups)
            return ConfigError(f"{key} is not a key", _hint(loader, root, kept, override, valid, verb))
    return None


def _hint(loader: ConfigLoader, root: str, kept: list[str], override: Override, valid: set[str], verb: str) -> str:
    near = nearest(override.key_or_group, valid)
    guess = (
        f"did you mean {near} ({_file(loader, root, kept, near)})?"
        if near
        else f"{program()} {verb} --cfg job shows all keys."
    )
    return guess if override.is_delete() else f"{guess} To add a new key write +{override.key_or_group}=..."


def _keys(node: DictConfig) -> set[str]:
    """Return every key of a tree, dotted."""
    return set(_walk(OmegaConf.to_container(node, resolve=False), ""))


def _walk(plain: Any, prefix: str) -> Iterator[str]:
    for name, value in plain.items() if isinstance(plain, dict) else ():
        yield f"{prefix}{name}"
        yield from _walk(value, f"{prefix}{name}.")


def _file(loader: ConfigLoader, root: str, kept: list[str], key: str) -> str:
    """Return the file that sets a key (the last one of the defaults list), or a group's folder."""
    for default in reversed(loader.compute_defaults_list(root, kept, RunMode.RUN).defaults):
        package = default.package or ""
        inside = key.removeprefix(f"{package}.") if package else key
        if (package and inside == key) or default.config_path is None:
            continue
        for file in _files(loader, default.config_path):
            if _holds(file, inside):
                return _shown(file)
    return _folder(loader, key)


def _holds(file: Path, key: str) -> bool:
    node: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _files(loader: ConfigLoader, name: str) -> Iterator[Path]:
    for source in loader.get_sources():
        file = Path(source.path) / f"{name.removesuffix('.yaml')}.yaml"
        if source.scheme() == "file" and file.is_file():
            yield file


def _folder(loader: ConfigLoader, group: str) -> str:
    for source in loader.get_sources():
        if source.scheme() == "file" and (Path(source.path) / group).is_dir():
            return f"{_shown(Path(source.path) / group)}/"
    return f"{group}/"


def _shown(path: Path) -> str:
    """Return a path relative to the current folder or to the folder of `conf`, where it is below one of them."""
    for base in (Path.cwd(), CONF_DIR.parent):
        if path.is_relative_to(base):
            return os.fspath(path.relative_to(base))
    return os.fspath(path)
