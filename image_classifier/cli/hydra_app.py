"""Verbs run as Hydra applications; their configuration is composed, checked and turned into typed settings."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import hydra
import yaml
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from image_classifier.atomic_io import write_text
from image_classifier.cli.conf_files import own_conf
from image_classifier.cli.config_errors import check_complete, explain, jobs, one_line, parse
from image_classifier.cli.multirun import Escape, Task, guarded
from image_classifier.cli.options import CommandLine, translate
from image_classifier.cli.positional import given
from image_classifier.errors import ConfigError
from image_classifier.instantiate import NETWORKS, check_targets, instantiate
from image_classifier.mappings import flatten, literal_values, without_passwords
from image_classifier.override_grammar import quoted
from image_classifier.paths import CONF_DIR
from image_classifier.program import inherited
from image_classifier.text import did_you_mean

__all__ = [
    "NETWORKS",
    "check_targets",
    "composed",
    "composer",
    "configure_logging",
    "flatten",
    "instantiate",
    "only",
    "replaced",
    "resumed",
    "run_verb",
    "running_choice",
    "running_line",
    "save",
    "selected",
    "to_plain",
    "to_yaml",
    "typed",
    "without",
    "without_passwords",
]

T = TypeVar("T")


def run_verb(verb: str, arguments: list[str], task: Task) -> None:
    """Check the command line, then run the task as a real Hydra application, with the full sys.argv in place.

    Raises:
        ClassifierError: The command line or the task is refused; other errors of the task pass unchanged.
    """
    line = translate(verb, arguments)
    argv = list(sys.argv)

    def checked(config: DictConfig) -> object:
        check_complete(config, verb)
        check_targets(config, config.get("trusted_packages") or ())
        return task(config)

    try:
        with inherited():
            _run(verb, with_own_conf(line), guarded(verb, checked, configure_logging))
    except Escape as escape:
        raise escape.error from escape.error.__cause__
    finally:
        sys.argv[:] = argv


def with_own_conf(line: CommandLine) -> CommandLine:
    """Return the line with `--config-dir` for the user's own folder `conf`, where the line names no other folder."""
    own = own_conf()
    named = line.has("--config-dir", "--config-path", "--experimental-rerun") or "hydra.searchpath" in given(
        line.overrides
    )
    return line if own is None or named else replace(line, flags=(*line.flags, ("--config-dir", str(own))))


def _run(verb: str, line: CommandLine, task: Task) -> None:
    """Compose the configuration and run the task once.

    Sweeps and flags are left to Hydra's own program, which composes twice more (0.1 s each).
    """
    config = None
    if not line.has("--hydra-help", "--version", "--experimental-rerun"):
        line, config = _checked(verb, line)
    if not line.has("--info"):  # which Hydra answers through its own log
        configure_logging()
    if config is None:
        run_hydra(verb, line, task)
        return
    with composer(CONF_DIR):
        callbacks = Callbacks(config)
        callbacks.on_run_start(config=config, config_name=verb)
        loader = GlobalHydra.instance().config_loader()
        done = run_job(task, config, "hydra.run.dir", None, HydraContext(config_loader=loader, callbacks=callbacks))
        callbacks.on_run_end(config=config, config_name=verb, job_return=done)


def run_hydra(verb: str, line: CommandLine, task: Task) -> None:
    """Run Hydra's own program on a line; it reads sys.argv."""
    sys.argv[1:] = line.argv()
    with _unchecked_help():
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=verb)(task)()


@contextlib.contextmanager
def _unchecked_help() -> Iterator[None]:
    """Let argparse accept the help of Hydra's options.

    Python 3.14 refuses help that is not text, which hydra-core 1.3.8 has for --shell-completion.
    """
    argparse.ArgumentParser._check_help = lambda *_: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del argparse.ArgumentParser._check_help  # type: ignore[attr-defined]


def configure_logging() -> None:
    """Log our own and Hydra's messages, and the warnings of all others, as plain lines on standard error."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.name == __name__]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.name = __name__
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(handler)
    for name in ("image_classifier", "hydra", "hydra_plugins"):
        logging.getLogger(name).setLevel(logging.INFO)


def _checked(verb: str, line: CommandLine) -> tuple[CommandLine, DictConfig | None]:
    """Return the line, quoted where Hydra's grammar needs it, and, for one run without flags, its configuration.

    Raises:
        ConfigError: Hydra would refuse the line.
    """
    if line.has("--resolve") and not line.has("--cfg"):
        raise ConfigError("--resolve goes with --cfg", "write --cfg job --resolve")
    if line.has("--multirun") and line.has("--cfg", "--info"):
        raise ConfigError("-m goes neither with --cfg nor with --info", "leave -m out to see the configuration")
    parsed = [parse(override) for override in line.overrides]
    line = CommandLine(line.flags, tuple(override.input_line or "" for override in parsed))
    root, folder = line.value("--config-name") or verb, line.value("--config-dir")
    conf = Path(line.value("--config-path") or CONF_DIR)
    for name, path in (("--config-path", conf), ("--config-dir", Path(folder or "."))):
        if not path.is_dir() and "://" not in str(path):
            raise ConfigError(f"{name} {str(path)!r} is not a folder")
    sweep = line.has("--multirun") or any(override.input_line == "hydra.mode=MULTIRUN" for override in parsed)
    with composer(conf):
        for overrides in jobs(parsed, sweep):
            config = _compose(verb, root, overrides, _search_path(folder), True)
            if line.has("--resolve"):
                to_plain(without(config, "hydra"))
    needs_hydra = any(flag != "--config-dir" for flag, _ in line.flags)
    return line, config if not (needs_hydra or sweep or config.hydra.mode == RunMode.MULTIRUN) else None


def _search_path(folder: str | None) -> list[str]:
    """Return the override that adds a folder to Hydra's search path, after conf/ itself."""
    return [f"hydra.searchpath=[{quoted(f'file://{os.path.abspath(folder)}')}]"] if folder else []


def _compose(verb: str, root: str, overrides: list[str], extra: list[str], with_hydra: bool = False) -> DictConfig:
    """Return a root file's configuration; `extra` are overrides of ours, such as the search path."""
    try:
        return hydra.compose(root, overrides + extra, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error, root, overrides, extra, verb) from error


def composed(verb: str, overrides: Iterable[str]) -> DictConfig:
    """Return the configuration of a verb, composed from the files that the running verb uses.

    Raises:
        ConfigError: The verb would refuse these overrides.
    """
    if HydraConfig.initialized():
        extra = [item for item in HydraConfig.get().overrides.hydra if item.startswith("hydra.searchpath=")]
    else:  # called from Python
        extra = _search_path(with_own_conf(CommandLine()).value("--config-dir"))
    config = _compose(verb, verb, [parse(override).input_line or "" for override in overrides], extra)
    check_complete(config, verb)
    check_targets(config, config.get("trusted_packages") or ())
    return config


def running_line(verb: str) -> CommandLine:
    """Return the flags and overrides of the running verb; in a sweep those of this job."""
    line = with_own_conf(translate(verb, sys.argv[2:]))
    return CommandLine(line.flags, tuple(HydraConfig.get().overrides.task))


def running_choice(group: str) -> str:
    """Return the choice of a group in the running verb."""
    return str(HydraConfig.get().runtime.choices[group])


@contextlib.contextmanager
def composer(conf: Path) -> Iterator[None]:
    """Let configurations be composed from this folder in the block."""
    folder = CONF_DIR if "://" in str(conf) else conf
    with hydra.initialize_config_dir(os.path.abspath(folder), version_base="1.3"):
        yield


def typed(cls: type[T], node: DictConfig, key: str) -> T:
    """Return a node as a checked dataclass.

    Raises:
        ConfigError: A wrong type, an unknown or a missing key; errors of `__post_init__` pass unchanged.
    """
    plain = to_plain(node)
    try:
        merged = OmegaConf.merge(_writable(OmegaConf.structured(cls)), literal_values(plain))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        full = _join(key, str(error.full_key or ""))
        raise ConfigError(f"{full} is missing", f"write {full}=VALUE") from error
    except ConfigKeyError as error:
        full = _join(key, str(error.full_key or error.key))
        raise ConfigError(f"{full} is not a key", did_you_mean(full, _field_names(cls, key))) from error
    except OmegaConfBaseException as error:
        raise _wrong_type(cls, plain, key, error) from error


def _writable(node: DictConfig) -> DictConfig:
    """Return a structured node made writable, although its dataclasses are frozen."""
    OmegaConf.set_readonly(node, False)
    for _, value in node.items_ex(resolve=False):
        if isinstance(value, DictConfig) and OmegaConf.get_type(value) not in (None, dict):
            _writable(value)
    return node


def _field_names(cls: Any, prefix: str) -> Iterator[str]:
    for name, kind in get_type_hints(cls).items():
        yield _join(prefix, name)
        if is_dataclass(kind):
            yield from _field_names(kind, _join(prefix, name))


def _wrong_type(cls: type, plain: Mapping[str, Any], key: str, error: OmegaConfBaseException) -> ConfigError:
    groups = [
        name
        for name, kind in get_type_hints(cls).items()
        if is_dataclass(kind) and not isinstance(plain.get(name, {}), Mapping)
    ]
    path = str(error.full_key or (groups or [""])[0])
    value: Any = plain
    expected: Any = cls
    for part in filter(None, path.replace("[", ".").replace("]", "").split(".")):
        value = (
            value[int(part)] if isinstance(value, list) else value.get(part) if isinstance(value, Mapping) else value
        )
        expected = get_type_hints(expected).get(part) if is_dataclass(expected) else expected
    return ConfigError(f"{_join(key, path) or 'the configuration'} must be {_article(expected)}, got {value!r}")


def _article(expected: Any) -> str:
    if is_dataclass(expected):
        return "a group of keys"
    name = expected.__name__ if isinstance(expected, type) and not hasattr(expected, "__args__") else str(expected)
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def to_plain(node: Any) -> dict[str, Any]:
    """Return a node as resolved plain dicts, lists and scalars."""
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve {error.full_key}", one_line(error)) from error


def without(node: DictConfig, *keys: str) -> DictConfig:
    """Return a copy of a node without some keys, with the same parent for interpolations."""
    copy = node.copy()
    OmegaConf.set_struct(copy, False)
    for key in keys:
        copy.pop(key, None)
    return copy


def replaced(node: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """Return a copy of a configuration with other values at these dotted keys, which may be new."""
    copy = node.copy()
    OmegaConf.set_struct(copy, False)
    for key, value in values.items():
        OmegaConf.update(copy, key, value, merge=False, force_add=True)
    return copy


def only(node: DictConfig, *keys: str) -> DictConfig:
    """Return those of the keys that a node has, resolved."""
    plain = to_plain(node)
    return OmegaConf.create({key: literal_values(plain[key]) for key in keys if key in plain})


def selected(cls: type[T], node: DictConfig, key: str = "") -> T:
    """Return those keys of a node that a dataclass has, typed; a node may have others."""
    return typed(cls, only(node, *(item.name for item in fields(cls))), key)  # type: ignore[arg-type]


def to_yaml(node: DictConfig) -> str:
    """Return a node as YAML with every interpolation resolved and passwords hidden."""
    return OmegaConf.to_yaml(OmegaConf.create(literal_values(without_passwords(to_plain(node)))))


def save(node: DictConfig, path: Path) -> None:
    """Write a node as YAML with every interpolation resolved, completely or not at all."""
    write_text(path, to_yaml(node))


def resumed(config: DictConfig, path: Path, overrides: Iterable[str]) -> DictConfig:
    """Return a configuration that `save` wrote, with the values that `overrides` set taken from `config`.

    Raises:
        ConfigError: The file cannot be read, or it had a password, which is not saved and not given again.
    """
    try:
        saved = OmegaConf.load(path)
        assert isinstance(saved, DictConfig)
    except (OSError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {str(path)!r}, the settings of the run", one_line(error)) from error
    keys = [parse(override).key_or_group.replace("/", ".") for override in overrides]
    keys = (
        [str(key) for key in config] if "experiment" in keys else [key for key in keys if not key.startswith("hydra")]
    )
    for key in (*keys, *(str(key) for key in config if key not in saved)):
        value = OmegaConf.select(config, key)
        value = literal_values({"": to_plain(value) if OmegaConf.is_config(value) else value})[""]
        OmegaConf.update(saved, key, value, merge=False, force_add=True)
    for key, value in flatten(to_plain(saved)).items():
        if isinstance(value, str) and "://***@" in value:
            again = OmegaConf.select(config, key)
            if without_passwords(again) != value:
                raise ConfigError(
                    f"{key} was given with a password, which the run folder does not keep", "give it again"
                )
            OmegaConf.update(saved, key, again)
    OmegaConf.set_struct(saved, True)
    return saved
