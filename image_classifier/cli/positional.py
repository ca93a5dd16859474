"""Plain words of the command line: `train photos/`, `infer NAME photos/`, `test NAME`. Loads no Hydra."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from image_classifier.cli.conf_files import all_choices, own_conf, root_groups
from image_classifier.errors import ConfigError
from image_classifier.override_grammar import quoted
from image_classifier.paths import CONF_DIR
from image_classifier.program import program
from image_classifier.sources.suffixes import ARCHIVE_SUFFIXES, TABLE_SUFFIXES
from image_classifier.text import nearest

# Verbs whose plain words are images to learn from: folders, archives, tables, or their addresses.
DATA_VERBS = frozenset({"prepare", "audit", "show", "baseline", "suspects", "train", "tune"})
# Verbs that choose the network by the images where nobody else does.
AUTO_VERBS = frozenset({"train"})
# The keys of the plain words of the other verbs, in their order.
WORD_KEYS: dict[str, tuple[str, ...]] = {
    "report": ("name", "other"),
    "test": ("checkpoint_name", "test_dir"),
    "infer": ("checkpoint_name", "images"),
    "export": ("checkpoint_name",),
    "verify": ("checkpoint_name",),
    "serve": ("checkpoint_name",),
    "drift": ("checkpoint_name",),
    "promote": ("checkpoint_name",),
    "triton": ("action", "checkpoint_name"),
}
REPEATED = frozenset({"images"})  # keys that take all the words that are left
_SHOWN = {"checkpoint_name": "NAME", "name": "NAME", "images": "IMAGES...", "test_dir": "[FOLDER]", "other": "[OTHER]"}
_HUBS = {"hf:": "hf", "kaggle:": "kaggle"}  # how a name of a hub begins, and its choice of the group data


def usage(verb: str) -> str:
    """Return the plain words of a verb as its help page shows them.

    >>> usage("infer"), usage("train"), usage("clean")
    ('NAME IMAGES... ', '[FOLDER] ', '')
    """
    words = ["[FOLDER]"] if verb in DATA_VERBS else [_SHOWN.get(key, key.upper()) for key in WORD_KEYS.get(verb, ())]
    return "".join(f"{word} " for word in words)


def word_overrides(verb: str, words: Sequence[str], overrides: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return the overrides that the plain words of a line stand for.

    Args:
        verb: The verb of the line.
        words: The plain words, in their order.
        overrides: What the rest of the line gives.
        arguments: The line after the verb, to show it corrected.

    Raises:
        ConfigError: A word that has no meaning here.
    """
    if not words:
        return []
    if verb in DATA_VERBS:
        return _data_override(verb, words, overrides, arguments)
    keys = [key for key in WORD_KEYS.get(verb, ()) if key not in given(overrides)]
    _check_model_named(verb, keys, words)
    made, rest = [], list(words)
    for key in keys:
        if rest and key in REPEATED:
            made.append(f"{key}=[{','.join(quoted(word) for word in rest)}]")
            rest = []
        elif rest:
            made.append(f"{key}={quoted(rest.pop(0))}")
    if rest:
        shown = f"{program()} {verb} {usage(verb)}KEY=VALUE"
        raise ConfigError(f"unexpected word {rest[0]!r}", f"write {shown}, see {program()} {verb} --help for the keys")
    return made


def given(overrides: Iterable[str]) -> set[str]:
    """Return the keys that overrides set.

    >>> sorted(given(["data.dir=x", "+a.b=1", "~logger"]))
    ['a.b', 'data.dir', 'logger']
    """
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def _check_model_named(verb: str, keys: Sequence[str], words: Sequence[str]) -> None:
    """Refuse `infer photos/`, which names images and no model."""
    word = words[0]
    is_model = word.endswith((".ckpt", ".onnx")) or os.path.isfile(os.path.join(word, "bundle.json"))
    if verb != "infer" or list(keys) != ["checkpoint_name", "images"] or len(words) > 1:
        return
    if os.path.exists(word) and not is_model:
        raise ConfigError("infer needs the name of a model", f"{program()} infer NAME {shlex.quote(word)}")


def _data_override(verb: str, words: Sequence[str], overrides: Sequence[str], arguments: Sequence[str]) -> list[str]:
    taken = given(overrides) & {"data.dir", "data.archive"}
    if taken:
        raise ConfigError(f"unexpected word {words[0]!r}", f"the images are given already: {', '.join(sorted(taken))}")
    for word in words:
        _check_images(verb, word, arguments)
    key = "data.archive" if all(word.lower().endswith(ARCHIVE_SUFFIXES) for word in words) else "data.dir"
    names = ",".join(quoted(word) for word in words)
    return [f"{key}={names}" if len(words) == 1 else f"{key}=[{names}]"]


def _check_images(verb: str, word: str, arguments: Sequence[str]) -> None:
    """Refuse a word that is neither a folder nor an archive, a table or an address."""
    if "://" in word or word.startswith(tuple(_HUBS)) or os.path.isdir(word):
        return
    if os.path.isfile(word):
        if not word.lower().endswith((*ARCHIVE_SUFFIXES, *TABLE_SUFFIXES)):
            hint = f"give a folder with one sub-folder per class: {program()} {verb} FOLDER"
            raise ConfigError(f"{word!r} is neither a folder nor an archive nor a table", hint)
        return
    near = _near_path(word)
    if near is not None:
        hint = f"did you mean {near!r}? {_corrected(verb, arguments, word, near)}"
        raise ConfigError(f"{word!r} does not exist", hint)
    for group in root_groups(CONF_DIR, verb):
        if word in all_choices(CONF_DIR, group):
            corrected = _corrected(verb, arguments, word, f"{group}={word}")
            raise ConfigError(f"{word!r} is not a folder", f"it is a choice of {group}: {corrected}")
    hint = f"give a folder with one sub-folder per class, an archive or a table: {program()} {verb} FOLDER"
    raise ConfigError(f"{word!r} does not exist", hint)


def _near_path(word: str) -> str | None:
    """Return the path most like a misspelt one, in the same folder."""
    path = Path(word)
    try:
        names = [item.name for item in path.parent.iterdir() if not item.name.startswith(".")]
    except OSError:
        return None
    near = nearest(path.name, names)
    return os.fspath(path.with_name(near)) if near else None


def _corrected(verb: str, arguments: Sequence[str], word: str, right: str) -> str:
    """Return the line with one word replaced, ready for a shell."""
    return f"{program()} {shlex.join([verb, *(right if item == word else item for item in arguments)])}"


def data_choice(verb: str, overrides: Sequence[str], conf_dir: str | None) -> list[str]:
    """Return `data=folder` where the line names images of one's own and nothing chooses the data set, else nothing.

    Args:
        verb: The verb of the line.
        overrides: All that the line gives.
        conf_dir: The value of --config-dir, where an experiment may lie.
    """
    values = {override.lstrip("+").partition("=")[0]: override.partition("=")[2] for override in overrides}
    named = [values[key] for key in ("data.dir", "data.archive") if values.get(key, "null") not in ("", "null")]
    if verb not in DATA_VERBS or not named or "data" in values or values.get("resume", "null") != "null":
        return []
    # An experiment that brings its own data set keeps it: only its folder is another one.
    if any(_chooses_data(name, conf_dir) for name in re.findall(r"\w+", values.get("experiment", ""))):
        return []
    hub = next((choice for prefix, choice in _HUBS.items() if named[0].lstrip("'\"").startswith(prefix)), "folder")
    return [f"data={hub}"]


def model_choice(verb: str, overrides: Sequence[str]) -> list[str]:
    """Return `model=auto` where a training is on images of one's own and nothing chooses the network, else nothing.

    >>> model_choice("train", ["data=folder", "data.dir=photos"]), model_choice("train", ["data=digits"])
    (['model=auto'], [])
    """
    values = {override.lstrip("+~").partition("=")[0]: override.partition("=")[2] for override in overrides}
    chosen = any(key in ("model", "experiment") or key.startswith(("model.backbone", "search")) for key in values)
    is_own = values.get("data") in ("folder", "table", *_HUBS.values()) and values.get("resume", "null") == "null"
    named = not {"data.dir", "data.archive"}.isdisjoint(values)
    return ["model=auto"] if verb in AUTO_VERBS and is_own and named and not chosen else []


def _chooses_data(experiment: str, conf_dir: str | None) -> bool:
    folders = [CONF_DIR, own_conf(), Path(conf_dir) if conf_dir else None]
    files = [folder / "experiment" / f"{experiment}.yaml" for folder in folders if folder]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    return any(re.search(r"^\s*- (override )?/?data:", text, re.MULTILINE) for text in texts)
