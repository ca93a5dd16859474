"""Hydra and OmegaConf, known to this file and its two helpers only (refusal: errors; targets: objects): verbs run, settings typed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
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
from image_classifier.cli.config_errors import check_complete, explain, jobs, one_line, parse
from image_classifier.cli.multirun import Escape, Task, guarded
from image_classifier.cli.options import CommandLine, literal, root_groups, translate
from image_classifier.errors import ClassifierError, ConfigError
from image_classifier.instantiate import NETWORKS, check_targets, instantiate
from image_classifier.paths import CONF_DIR
from image_classifier.program import inherited
from image_classifier.text import did_you_mean, hide_passwords

__all__ = [
    "NETWORKS",
    "check_targets",
    "complete",
    "composed",
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
    "to_plain",
    "typed",
    "without",
    "without_passwords",
]

T = TypeVar("T")


def run_verb(verb: str, arguments: list[str], task: Task) -> None:
    """Check the command line, then run the task as a real Hydra application, with the full sys.argv back in place.

    Raises:
        ClassifierError: What the command line or the task refuses; other errors of the task pass as they are.
    """
    line = translate(verb, arguments)
    if line.has("--shell-completion"):
        return complete(list(line.overrides), [verb])
    full = list(sys.argv)

    def checked(config: DictConfig) -> object:
        check_complete(config, verb)
        check_targets(config, config.get("trusted_packages") or ())
        return task(config)

    try:
        with inherited():
            _run(verb, line, guarded(verb, checked, configure_logging))
    except Escape as escape:
        raise escape.error from escape.error.__cause__
    finally:
        sys.argv[:] = full


def _run(verb: str, line: CommandLine, task: Task) -> None:
    """One run on what is composed here; for sweeps and flags Hydra's own program, which composes all two times more (0.1 s each)."""
    config = None
    if not line.has("--hydra-help", "--version", "--experimental-rerun"):
        line, config = _checked(verb, line)
    if not line.has("--info"):  # which Hydra answers through its own log
        configure_logging()
    if config is None:
        _hydra(verb, line.argv(), task)
        return
    with _composer(CONF_DIR):
        callbacks = Callbacks(config)
        callbacks.on_run_start(config=config, config_name=verb)
        loader = GlobalHydra.instance().config_loader()
        done = run_job(task, config, "hydra.run.dir", None, HydraContext(config_loader=loader, callbacks=callbacks))
        callbacks.on_run_end(config=config, config_name=verb, job_return=done)


def _hydra(verb: str, argv: list[str], task: Task) -> None:
    sys.argv[1:] = argv
    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=verb)(task)()


def configure_logging() -> None:
    """Messages of ours and of Hydra, and warnings of all others, as plain lines on standard error."""
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
    """The line with its text quoted where Hydra's grammar needs it, and, for one run without flags, what it runs with.

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
    for name, place in (("--config-path", conf), ("--config-dir", Path(folder or "."))):
        if not place.is_dir() and "://" not in str(place):
            raise ConfigError(f"{name} {str(place)!r} is not a folder")
    sweep = line.has("--multirun") or any(override.input_line == "hydra.mode=MULTIRUN" for override in parsed)
    with _composer(conf):
        for overrides in jobs(parsed, sweep):
            config = _compose(verb, root, overrides, folder, True)
            if line.has("--resolve"):
                to_plain(without(config, "hydra"))
    return line, config if not (line.flags or sweep or config.hydra.mode == RunMode.MULTIRUN) else None


def _compose(verb: str, root: str, overrides: list[str], folder: str | None, with_hydra: bool = False) -> DictConfig:
    extra = [f"hydra.searchpath=[file://{os.path.abspath(folder)}]"] if folder else []
    try:
        return hydra.compose(root, overrides + extra, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error, root, overrides, extra, verb) from error


def composed(verb: str, overrides: Iterable[str]) -> DictConfig:
    """What another verb would run with, from where the running one has its configuration; refuses what that verb itself would refuse."""
    config = _compose(verb, verb, [parse(override).input_line or "" for override in overrides], None)
    check_complete(config, verb)
    check_targets(config, config.get("trusted_packages") or ())
    return config


def running_line(verb: str) -> CommandLine:
    """The flags and overrides with which the verb is running: of a sweep, those of this job."""
    return CommandLine(translate(verb, sys.argv[2:]).flags, tuple(HydraConfig.get().overrides.task))


def running_choice(group: str) -> str:
    """The choice of a group in the running verb."""
    return str(HydraConfig.get().runtime.choices[group])


@contextlib.contextmanager
def _composer(conf: Path) -> Iterator[None]:
    place = str(conf) if "://" not in str(conf) else str(CONF_DIR)
    with hydra.initialize_config_dir(os.path.abspath(place), version_base="1.3"):
        yield


def complete(arguments: list[str], verbs: list[str]) -> None:
    """Shell completion: install and uninstall are Hydra's; a query finds its verb in COMP_LINE."""
    command = next((word for word in arguments if "=" in word), "")
    if not command.startswith("query="):
        script = _completion(verbs[0], command)
        print(script.replace('grep "@hydra.main" $file_path -q', 'grep "@hydra.main" $file_path -q || return'), end="")
        return
    line = os.environ.get("COMP_LINE", "")
    words = line.partition(Path(sys.argv[0]).name)[2].split(" ")[1:]
    words = [word for word in words[:-1] if word] + words[-1:]
    separator = " " if command != "query=fish" else "\n"
    if len(words) < 2:
        print(separator.join(verb for verb in verbs if verb.startswith(words[0] if words else "")))
    elif (CONF_DIR / f"{words[0]}.yaml").is_file():
        print(separator.join(_candidates(words[0], words[1:-1], words[-1], command)))


def _candidates(verb: str, earlier: list[str], word: str, command: str) -> list[str]:
    """What may stand in the place of `word`: for `--key` as for `key`, and after `--key ` its values."""
    prefix, strip = "", ""
    if earlier and earlier[-1].startswith("--") and "=" not in earlier[-1] and not word.startswith("-"):
        strip = earlier.pop()[2:] + "="
        word = strip + word
    elif word.startswith("--"):
        prefix, word = "--", word[2:]
    try:
        known = translate(verb, earlier).argv()
    except ClassifierError:
        return []
    os.environ["COMP_LINE"] = " ".join(["python", "commands.py", *known, word])
    foreign = {path.name for path in CONF_DIR.iterdir() if path.is_dir()} - root_groups(CONF_DIR, verb).keys()
    found = [
        item
        for item in _completion(verb, command).split()
        if re.split("[=./]", item)[0] not in foreign or word.startswith("hydra")
    ]
    return [prefix + item.removeprefix(strip) for item in found if item.startswith(strip)]


def _completion(verb: str, command: str) -> str:
    """What Hydra prints for `-sc COMMAND`."""
    full = list(sys.argv)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            _hydra(verb, ["-sc", command], lambda config: None)
    except SystemExit:
        return ""
    finally:
        sys.argv[:] = full
    return text.getvalue()


def typed(cls: type[T], node: DictConfig, key: str) -> T:
    """The node as a checked dataclass; `key` is where it hangs in the tree, for messages.

    Raises:
        ConfigError: A wrong type, an unknown or a missing key; what `__post_init__` raises passes through.
    """
    plain = to_plain(node)
    try:
        merged = OmegaConf.merge(_writable(OmegaConf.structured(cls)), _literal(plain))
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
    """A structured node that takes values though its dataclasses are frozen."""
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


def _literal(value: Any) -> Any:
    """Plain values whose text holds no interpolation any more: `${x}` stays these four characters."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return literal(value) if isinstance(value, str) else value


def to_plain(node: Any) -> dict[str, Any]:
    """A node as resolved plain dicts, lists and scalars."""
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve {error.full_key}", one_line(error)) from error


def without(node: DictConfig, *keys: str) -> DictConfig:
    """A copy of a node, at its place in the tree, that lacks some keys."""
    copy = node.copy()
    OmegaConf.set_struct(copy, False)
    for key in keys:
        copy.pop(key, None)
    return copy


def replaced(node: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """A copy of a whole configuration with other values at these dotted keys, new ones among them."""
    copy = node.copy()
    OmegaConf.set_struct(copy, False)
    for key, value in values.items():
        OmegaConf.update(copy, key, value, merge=False, force_add=True)
    return copy


def without_passwords(value: Any) -> Any:
    """The same plain value with the `user:password@` of every address in it hidden, for what is written down."""
    if isinstance(value, Mapping):
        return {key: without_passwords(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_passwords(item) for item in value]
    return hide_passwords(value) if isinstance(value, str) else value


def only(node: DictConfig, *keys: str) -> DictConfig:
    """The keys of a node that are named here and there, resolved."""
    plain = to_plain(node)
    return OmegaConf.create({key: _literal(plain[key]) for key in keys if key in plain})


def save(node: DictConfig, path: Path) -> None:
    """Write a node as YAML with every interpolation resolved, whole or not at all."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(_literal(without_passwords(to_plain(node))))))


def resumed(config: DictConfig, path: Path, overrides: Iterable[str]) -> DictConfig:
    """The configuration that `save` wrote, with what `overrides` gives in its place; `config` is what the running command line composes.

    Raises:
        ConfigError: The file cannot be read, or held a password that is not given again.
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
        value = _literal({"": to_plain(value) if OmegaConf.is_config(value) else value})[""]
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


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """Nested keys as dotted ones, for parameter logs; a list becomes its JSON text."""
    flat: dict[str, str | int | float | bool | None] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = (
                value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, default=str)
            )
    return flat
