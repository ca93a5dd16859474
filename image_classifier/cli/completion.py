"""Shell completion: verbs, groups, choices and keys, names of bundles. Where nothing fits, bash offers files."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path

from image_classifier.cli.conf_files import is_base, root_groups
from image_classifier.cli.hydra_app import run_hydra, with_own_conf
from image_classifier.cli.options import translate
from image_classifier.cli.positional import WORD_KEYS
from image_classifier.errors import ClassifierError, ConfigError
from image_classifier.paths import CONF_DIR
from image_classifier.program import program

# Without arrays, so that zsh's bashcompinit runs it too.
_INSTALL_BASH = """\
image_classifier_completion()
{
    local first=${COMP_LINE%% *} rest=${COMP_LINE#* } program choices
    case "${first##*/}" in
    python*)
        case "$rest" in
        "-m image_classifier "*) program="$first -m image_classifier" ;;
        *)
            program=${rest%% *}
            [ -f "$program" ] && grep -q "@hydra.main" "$program" || return
            program="$first $program" ;;
        esac ;;
    *) program=$first ;;
    esac
    choices=$(COMP_POINT=$COMP_POINT COMP_LINE=$COMP_LINE $program -sc query=bash 2> /dev/null)
    COMPREPLY=($(compgen -W "$choices" -- "${COMP_LINE##* }"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F image_classifier_completion NAME
"""
_UNINSTALL_BASH = "complete -r NAME\nunset -f image_classifier_completion\n"


def complete(arguments: list[str], verbs: list[str]) -> None:
    """Print what Hydra prints for `-sc install=SHELL`, `-sc uninstall=SHELL` or `-sc query=SHELL`.

    A query finds its verb in COMP_LINE.

    Raises:
        ConfigError: None of the three.
    """
    command = next((word for word in arguments if "=" in word), "")
    if command in ("install=bash", "uninstall=bash"):
        name = shlex.split(program())[0]
        print((_INSTALL_BASH if command == "install=bash" else _UNINSTALL_BASH).replace("NAME", name), end="")
    elif command.startswith(("install=", "uninstall=")):
        print(_completion(verbs[0], command), end="")
    elif command.startswith("query="):
        words = _words(os.environ.get("COMP_LINE", ""))
        separator = " " if command != "query=fish" else "\n"
        print(separator.join(_candidates(words, verbs, command)))
    else:
        raise ConfigError("-sc needs a shell", f'in bash: eval "$({program()} -sc install=bash)"')


def _words(line: str) -> list[str]:
    """Return the words after the program's name; the last one, which may be empty, is being written."""
    words = line.split(" ")
    words = [word for word in words[:-1] if word] + words[-1:]
    if not Path(words[0]).name.startswith("python"):
        return words[1:]
    return words[3:] if words[1:2] == ["-m"] else words[2:]


def _candidates(words: list[str], verbs: list[str], command: str) -> list[str]:
    if len(words) < 2:
        return [verb for verb in verbs if verb.startswith(words[0] if words else "")]
    if not (CONF_DIR / f"{words[0]}.yaml").is_file():
        return []
    return _of_verb(words[0], words[1:-1], words[-1], command)


def _of_verb(verb: str, earlier: list[str], word: str, command: str) -> list[str]:
    """Return what may stand in place of `word`: for `--key` as for `key`, and after `--key ` its values."""
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
    items = [
        item
        for item in _completion(verb, command).split()
        if not is_base(item.rpartition("=")[2])
        and (re.split("[=./]", item)[0] not in foreign or word.startswith("hydra"))
    ]
    return _models(verb, word) * (not strip and not prefix) + [
        prefix + item.removeprefix(strip) for item in items if item.startswith(strip)
    ]


def _models(verb: str, word: str) -> list[str]:
    """Return the names of the bundles in models/ that begin with a word, for the verbs that take one."""
    if not {"checkpoint_name", "name"} & set(WORD_KEYS.get(verb, ())):
        return []
    names = sorted(path.parent.name for path in Path("models").glob("*/bundle.json"))
    return [name for name in names if name.startswith(word)]


def _completion(verb: str, command: str) -> str:
    """Return what Hydra prints for `-sc COMMAND`."""
    argv = list(sys.argv)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            run_hydra(verb, with_own_conf(translate(verb, ["-sc", command])), lambda config: None)
    except SystemExit:
        return ""
    finally:
        sys.argv[:] = argv
    return text.getvalue()
