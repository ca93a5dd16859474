"""The command line as text: options to Hydra overrides, help pages, shell completion's words, exit codes. Loads neither Hydra nor torch."""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from image_classifier.errors import ClassifierError, ConfigError
from image_classifier.text import printable

# Values that are text and never Hydra's grammar, for each verb: names and paths. `--KEY VALUE` keeps them to the letter.
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
WORD_KEYS: dict[str, tuple[str, ...]] = {
    "report": ("name", "other"),
    "export": ("checkpoint_name",),
    "verify": ("checkpoint_name",),
    "serve": ("checkpoint_name",),
    "drift": ("checkpoint_name",),
    "promote": ("checkpoint_name",),
    "triton": ("action", "checkpoint_name"),
}  # what bare words mean, in their order
MAP_KEYS = frozenset({"data.rename", "models"})  # of any names: Hydra must be told that they are new

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

_CHECKOUT = "python commands.py"  # which the examples in conf/ begin with
_OVERRIDE = re.compile(r"(\+{1,2}|~)?[\w$][\w$.@/:-]*=|~[\w$][\w$.@/:-]*$")


@dataclass(frozen=True)
class CommandLine:
    """What follows the verb: Hydra's own flags, each with its value, and the overrides."""

    flags: tuple[tuple[str, str | None], ...] = ()
    overrides: tuple[str, ...] = ()

    def has(self, *flags: str) -> bool:
        """Whether one of the flags was given."""
        return any(name in flags for name, _ in self.flags)

    def value(self, flag: str) -> str | None:
        """The flag's value, or None."""
        return dict(self.flags).get(flag)

    def argv(self) -> list[str]:
        """The line for Hydra: flags first, as argparse takes overrides from one place only."""
        return [part for name, value in self.flags for part in ((name,) if value is None else (name, value))] + list(
            self.overrides
        )


def translate(verb: str, arguments: Sequence[str]) -> CommandLine:
    """`--key value` and `--key=value` to `key=value`; Hydra's own flags and overrides stay as they are.

    Raises:
        ConfigError: A word that is neither a flag, an option nor an override.
    """
    flags: list[tuple[str, str | None]] = []
    overrides: list[str] = []
    rest, keys = list(arguments), list(WORD_KEYS.get(verb, ()))
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in (*_ALONE, *_VALUED, "--info", "-i"):
            flags.append((_LONG.get(name, name), _flag_value(name, value if equals else None, rest)))
        elif word.startswith("--") and len(name) > 2:
            overrides.append(_mapped(_option(verb, name[2:], value if equals else None, rest)))
        elif word.startswith("-"):
            raise ConfigError(f"{word!r} is not an option", "write --key value, key=value, or see --help")
        elif _is_override(word) or "--shell-completion" in dict(flags):
            overrides.append(_mapped(_listed(verb, word)))
        elif keys:
            overrides.append(f"{keys.pop(0)}={quoted(word)}")
        else:
            raise ConfigError(f"{word!r} is not key=value", "write key=value or --key value")
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
        raise ConfigError(f"{name} cannot show {value!r}", f"use one of {', '.join(_CFG)}")
    return os.path.abspath(value) if name in ("--config-path", "-cp") and "://" not in value else value


def _option(verb: str, key: str, value: str | None, rest: list[str]) -> str:
    """One `--key …` as an override; takes its values from the front of `rest`."""
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
    """`images=a.png` is a list of one; `[a.png,b.png]`, quotes and `${…}` stay Hydra's."""
    key, _, value = override.partition("=")
    if value.startswith("(") and key in TEXT_KEYS.get(verb, ()):  # such as a regular expression
        return f"{key}={quoted(value)}"
    plain = key in LIST_KEYS.get(verb, ()) and value and value[0] not in "[{('\"$" and "," not in value
    return f"{key}=[{quoted(value)}]" if plain else override


def _mapped(override: str) -> str:
    """`data.rename={a: b}` as `++data.rename={a: b}`, which may add names; and the entries of a search space, which any key may be."""
    key = override.partition("=")[0]
    return f"++{override}" if key in MAP_KEYS or key.startswith("search.") else override


def _is_option(word: str) -> bool:
    return len(word) > 1 and word.startswith("-") and not re.match(r"-[\d.]", word)


def _is_override(word: str) -> bool:
    return _OVERRIDE.match(word) is not None


def quoted(text: str) -> str:
    """Text as a value of Hydra's override grammar that comes out of the composed config to the letter."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)\Z", r"\1\1", literal(text))) + "'"


def literal(text: str) -> str:
    """Text as OmegaConf must hold it to give it back to the letter: `${` starts no interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def requoted(override: str) -> str | None:
    """The same override with its value quoted, or None where the value was meant as Hydra's grammar."""
    key, equals, value = override.partition("=")
    if not equals or not value or value[0] in "[{('\"$":
        return None
    return f"{key}={quoted(value)}"


def overview(program: str, verbs: dict[str, str]) -> str:
    """The first help page: the verbs, one line each."""
    width = max(map(len, verbs))
    lines = [f"usage: {program} VERB [key=value | --key value ...]", "", "verbs:"]
    lines += [f"  {verb:<{width}}  {text}" for verb, text in verbs.items()]
    lines += ["", "examples:", f"  {program} train data=folder data.dir=PATH model=resnet18"]
    lines += [f"  {program} infer --checkpoint_name NAME --images PATH --format json", ""]
    return "\n".join([*lines, f"{program} VERB --help shows the keys of a verb."])


def verb_help(program: str, verb: str, text: str, conf: Path) -> str:
    """One verb's help page, read from its root file: what it does, its keys with their defaults, its groups with their choices."""
    root, *bases = _roots(conf, verb)
    lines = [line.lstrip("# ") for line in root.splitlines()]
    examples = [line for line in lines if line.startswith(_CHECKOUT)]
    keys = [line for line in root.splitlines() if re.match(r"([a-z_]+|  \w+):", line)]
    keys += [
        line
        for base in bases
        for line in base.splitlines()
        if re.match(r"[a-z_]+:", line) and f"\n{line.partition(':')[0]}:" not in root
    ]
    keys = [line for line in keys if not line.startswith(("defaults:", "run_dir:"))]
    lines = [f"usage: {program} {verb} [key=value | --key value ...]", "", text, "", "keys (default, meaning):"]
    lines += [f"  {line}" for line in keys]
    groups = root_groups(conf, verb)
    if groups:
        lines += [
            "",
            "groups (default): choices; the keys of a choice are in conf/GROUP/CHOICE.yaml, write GROUP.KEY=VALUE",
        ]
    for group, chosen in groups.items():
        lines.append(f"  {f'{group} ({chosen})':<24} {', '.join(choices(conf, group)) or '(none yet)'}")
    lines += ["", "examples:", *(f"  {example}" for example in examples)]
    flags = f"Hydra's flags: -m (one run for each of model=a,b), --cfg job (show, do not run); the others: {verb} --hydra-help"
    return "\n".join([*lines, "", flags]).replace(_CHECKOUT, program)


def root_groups(conf: Path, verb: str) -> dict[str, str]:
    """The groups of a verb's root file, each with its default choice."""
    found = re.findall(r"^  - (?:optional )?([a-z]+): *(\w+)", "\n".join(_roots(conf, verb)), re.MULTILINE)
    return {group: chosen for group, chosen in found if group != "hydra"}


def _roots(conf: Path, verb: str) -> list[str]:
    """The text of a verb's root file, and of those that it builds on."""
    root = (conf / f"{verb}.yaml").read_text(encoding="utf-8")
    return [root, *(text for base in re.findall(r"^  - ([a-z]+)$", root, re.MULTILINE) for text in _roots(conf, base))]


def choices(conf: Path, group: str) -> list[str]:
    """The names of a group's files, without those that only others build on."""
    return sorted(file.stem for file in (conf / group).glob("*.yaml") if not is_base(file.stem))


def is_base(choice: str) -> bool:
    """Whether a group's file is there for the others to build on."""
    return choice == "base" or choice.startswith("_")


def exit_code(action: Callable[[], None]) -> int:
    """Run the program: 0, or 2 and one line for what the user can mend, 130 for Ctrl-C; a bug keeps its traceback."""
    try:
        action()
        sys.stdout.flush()
    except ClassifierError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _reader_left():
            raise  # another pipe: a bug that must be seen
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's last flush stays quiet
        return 141
    except (KeyboardInterrupt, ImportError, SystemExit) as error:
        if not _interrupted(error):
            raise
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    return 0


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind the error: an import of a C extension turns it into ImportError, Lightning into exit code 1."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # an error can be its own cause
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more (`| head`)."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file behind it
        return False
