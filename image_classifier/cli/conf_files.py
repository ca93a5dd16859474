"""The configuration files as text: groups, their choices, and a folder `conf` of the user's own. Loads no Hydra."""

from __future__ import annotations

import re
from pathlib import Path

from image_classifier.paths import CONF_DIR


def own_conf() -> Path | None:
    """Return the folder `conf` in the current folder, where it adds choices to the groups of this program."""
    folder = Path("conf").absolute()
    if not folder.is_dir() or folder.samefile(CONF_DIR):
        return None
    groups = (path.name for path in CONF_DIR.iterdir() if path.is_dir() and path.name != "hydra")
    return folder if any(choices(folder, group) for group in groups) else None


def roots(conf: Path, verb: str) -> list[str]:
    """Return the text of a verb's root file, and of those that it builds on."""
    root = (conf / f"{verb}.yaml").read_text(encoding="utf-8")
    return [root, *(text for base in re.findall(r"^  - ([a-z]+)$", root, re.MULTILINE) for text in roots(conf, base))]


def root_groups(conf: Path, verb: str) -> dict[str, str]:
    """Return the groups of a verb's root file, each with its default choice."""
    pairs = re.findall(r"^  - (?:optional )?([a-z]+): *(\w+)", "\n".join(roots(conf, verb)), re.MULTILINE)
    return {group: chosen for group, chosen in pairs if group != "hydra"}


def choices(conf: Path, group: str) -> list[str]:
    """Return the names of a group's files, without those that only others build on."""
    return sorted(file.stem for file in (conf / group).glob("*.yaml") if not is_base(file.stem))


def all_choices(conf: Path, group: str) -> list[str]:
    """Return the choices of a group, those of the user's own folder among them."""
    own = own_conf()
    return sorted({*choices(conf, group), *(choices(own, group) if own else ())})


def is_base(choice: str) -> bool:
    """Return whether a group's file only serves the others to build on.

    >>> is_base("base"), is_base("_shared"), is_base("resnet18")
    (True, True, False)
    """
    return choice == "base" or choice.startswith("_")
