"""The command line as text: options and plain words become Hydra's overrides. Loads neither Hydra nor torch."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import chain

from image_classifier.cli.positional import data_choice, model_choice, word_overrides
from image_classifier.errors import ConfigError
from image_classifier.override_grammar import quoted

# Values that are text and never Hydra's grammar, for each verb: names and paths. `--KEY VALUE` keeps them unchanged.
_DATA_TEXT = frozenset(
    {
        "data.dir",
        "data.archive",
        "data.manifest_path",
        "data.exclude_path",
        "data.fix_path",
        "data.cache.dir",
        "data.split.group",
        "audit.output_dir",
    }
)
TEXT_KEYS: dict[str, frozenset[str]] = {
    "prepare": _DATA_TEXT,
    "audit": _DATA_TEXT,
    "clean": frozenset({"cache_dir"}),
    "show": _DATA_TEXT | {"output", "plots_dir"},
    "baseline": _DATA_TEXT | {"model.weights", "model.from", "name", "plots_dir", "models_dir"},
    "train": _DATA_TEXT
    | {"model.weights", "model.from", "name", "resume", "models_dir", "plots_dir", "runs_dir", "logger.tracking_uri"},
    "test": frozenset({"cache_dir", "checkpoint_name", "test_dir", "output_dir", "models_dir", "plots_dir", "url"}),
    "infer": frozenset({"checkpoint_name", "output", "sort_into", "models_dir", "plots_dir", "url", "ray.address"}),
    "export": frozenset({"checkpoint_name", "data_dir", "models_dir", "triton.image"}),
    "verify": frozenset({"checkpoint_name", "models_dir", "url"}),
    "drift": frozenset({"checkpoint_name", "name", "models_dir", "log", "tracking_uri"}),
    "serve": frozenset({"checkpoint_name", "models_dir", "url", "host", "access.keys_file", "tracking_uri"}),
    "promote": frozenset({"checkpoint_name", "models_dir", "tracking_uri", "registered_name", "alias"}),
    "triton": frozenset({"checkpoint_name", "tritonserver", "models_dir", "runs_dir"}),
    "report": frozenset({"name", "other", "data_dir", "models_dir", "plots_dir", "runs_dir", "audit_dir", "output"}),
}
TEXT_KEYS["suspects"] = TEXT_KEYS["train"] | {"checkpoint_name"}
TEXT_KEYS["tune"] = TEXT_KEYS["train"] | {"tune.storage"}
LIST_KEYS: dict[str, frozenset[str]] = {
    "infer": frozenset({"images"}),
    "export": frozenset({"to"}),
    "triton": frozenset({"arguments"}),
}
_FILE_LISTS = frozenset({"images"})  # whose items may look like overrides
MAP_KEYS = frozenset({"data.rename", "models"})  # maps with any keys: an override may add new ones

# Hydra's own flags that stand alone, and those that take a value.
_ALONE = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--resolve",
    "--run",
    "-r",
    "--multirun",
    "-m",
    "--shell-completion",
    "-sc",
)
_VALUED = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--experimental-rerun",
)
_CFG = ("job", "hydra", "all")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_LONG = {
    "-h": "--help",
    "-c": "--cfg",
    "-p": "--package",
    "-r": "--run",
    "-m": "--multirun",
    "-sc": "--shell-completion",
    "-i": "--info",
}
_LONG |= {"-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir"}

_OVERRIDE = re.compile(r"(\+{1,2}|~)?[\w$][\w$.@/:-]*=|~[\w$][\w$.@/:-]*$")


@dataclass(frozen=True)
class CommandLine:
    """The command line after the verb: Hydra's flags, each with its value, and the overrides."""

    flags: tuple[tuple[str, str | None], ...] = ()
    overrides: tuple[str, ...] = ()

    def has(self, *flags: str) -> bool:
        """Return whether one of the flags is given."""
        return any(name in flags for name, _ in self.flags)

    def value(self, flag: str) -> str | None:
        """Return the value of a flag, or None."""
        return dict(self.flags).get(flag)

    def argv(self) -> list[str]:
        """Return the words for Hydra: flags first, because argparse accepts overrides only in one block."""
        flags = [(name,) if value is None else (name, value) for name, value in self.flags]
        return [*chain.from_iterable(flags), *self.overrides]

    def for_training(self, own_keys: Container[str]) -> CommandLine:
        """Return the line for the trainings that a verb starts: without the verb's own keys and most flags."""
        flags = tuple(item for item in self.flags if item[0] in ("--config-dir", "--config-path"))
        return CommandLine(flags, tuple(text for text in self.overrides if _root_key(text) not in own_keys))


def _root_key(override: str) -> str:
    return re.split(r"[.=]", override.lstrip("+~"))[0].partition("@")[0]


def translate(verb: str, arguments: Sequence[str]) -> CommandLine:
    """Translate `--key value`, `--key=value` and plain words to `key=value`; Hydra's flags and overrides stay.

    >>> translate("train", ["--name", "a=b", "--overwrite", "-m", "seed=1,2"]).argv()
    ['--multirun', "name='a=b'", 'overwrite=true', 'seed=1,2']

    Raises:
        ConfigError: A word that has no meaning here.
    """
    flags: list[tuple[str, str | None]] = []
    overrides: list[str] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in (*_ALONE, *_VALUED, "--info", "-i"):
            flags.append((_LONG.get(name, name), _flag_value(name, value if equals else None, rest)))
        elif word.startswith("--") and len(name) > 2:
            overrides.append(_mapped(_option(verb, name[2:], value if equals else None, rest)))
        elif _is_option(word):
            raise ConfigError(f"{word!r} is not an option", "write --key value, key=value, or see --help")
        elif (_is_override(word) and not _is_path(word)) or "--shell-completion" in dict(flags):
            overrides.append(_mapped(_listed(verb, word)))
        else:
            words.append(word)
    overrides = [*word_overrides(verb, words, overrides, arguments), *overrides]
    if "--config-name" not in dict(flags):
        overrides = [*data_choice(verb, overrides, dict(flags).get("--config-dir")), *overrides]
        overrides = [*model_choice(verb, overrides), *overrides]
    return CommandLine(tuple(flags), tuple(overrides))


def _flag_value(name: str, value: str | None, rest: list[str]) -> str | None:
    if name in ("--info", "-i"):
        return value or (rest.pop(0) if rest and rest[0] in _INFO else "all")
    if name in _ALONE:
        return None
    if value is None and not rest:
        raise ConfigError(f"{name} needs a value")
    value = rest.pop(0) if value is None else value
    if name in ("--cfg", "-c") and value not in _CFG:
        raise ConfigError(f"invalid {name} {value}", f"expected {', '.join(_CFG)}")
    return os.path.abspath(value) if name in ("--config-path", "-cp") and "://" not in value else value


def _option(verb: str, key: str, value: str | None, rest: list[str]) -> str:
    """Return one `--key ...` as an override; its values are removed from the front of `rest`."""
    if key in LIST_KEYS.get(verb, ()):
        values = [] if value is None else [value]
        while rest and not _is_option(rest[0]) and (key in _FILE_LISTS or not _is_override(rest[0])):
            values.append(rest.pop(0))
        if not values:
            raise ConfigError(f"--{key} needs at least one value")
        return f"{key}=[{','.join(quoted(item) for item in values)}]"
    text = key in TEXT_KEYS.get(verb, ())
    if value is None and rest and not _is_option(rest[0]) and (text or not _is_override(rest[0])):
        value = rest.pop(0)
    if value is None and text:
        raise ConfigError(f"--{key} needs a value")
    return f"{key}={quoted(value or '') if text else 'true' if value is None else value}"


def _listed(verb: str, override: str) -> str:
    """Return `images=a.png` as a list of one; `[a.png,b.png]`, quotes and `${...}` are left to Hydra."""
    key, _, value = override.partition("=")
    if value.startswith("(") and key in TEXT_KEYS.get(verb, ()):  # a regular expression, for one
        return f"{key}={quoted(value)}"
    plain = key in LIST_KEYS.get(verb, ()) and value and value[0] not in "[{('\"$" and "," not in value
    return f"{key}=[{quoted(value)}]" if plain else override


def _mapped(override: str) -> str:
    """Return `data.rename={a: b}` and the entries of a search space with `++`, because they may add new keys."""
    key = override.partition("=")[0]
    return f"++{override}" if key in MAP_KEYS or key.startswith("search.") else override


def _is_option(word: str) -> bool:
    return len(word) > 1 and word.startswith("-") and not re.match(r"-[\d.]", word)


def _is_path(word: str) -> bool:
    """Return whether a word that reads like an override is a path: photos/a=b.jpg."""
    return "/" in word and os.path.exists(word)


def _is_override(word: str) -> bool:
    return _OVERRIDE.match(word) is not None
