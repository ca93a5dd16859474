"""The help pages, read from the files in conf/. Loads no Hydra."""

from __future__ import annotations

import re
from pathlib import Path

from image_classifier.cli.conf_files import all_choices, root_groups, roots
from image_classifier.cli.positional import usage

_IN_CONF = "python commands.py"  # how the examples in conf/ name the program
_GROUPS = "groups (default): choices; the keys of a choice are in conf/GROUP/CHOICE.yaml, write GROUP.KEY=VALUE"


def overview(program: str, verbs: dict[str, str]) -> str:
    """Return the first help page: the verbs, one line each."""
    width = max(map(len, verbs))
    lines = [f"usage: {program} VERB [key=value | --key value ...]", "", "verbs:"]
    lines += [f"  {verb:<{width}}  {text}" for verb, text in verbs.items()]
    lines += [
        "",
        "examples:",
        f"  {program} train photos/ model=resnet18",
        f"  {program} infer NAME photos/ --format json",
    ]
    return "\n".join([*lines, "", f"{program} VERB --help shows the keys of a verb."])


def verb_help(program: str, verb: str, text: str, conf: Path) -> str:
    """Return one verb's help page: its purpose, its keys with their defaults, its groups with their choices."""
    root, *bases = roots(conf, verb)
    comments = [line.lstrip("# ") for line in root.splitlines()]
    examples = [line for line in comments if line.startswith(_IN_CONF)]
    lines = [f"usage: {program} {verb} {usage(verb)}[key=value | --key value ...]", "", text, ""]
    lines += ["keys (default, meaning):", *(f"  {line}" for line in _keys(root, bases))]
    groups = root_groups(conf, verb)
    lines += ["", _GROUPS] if groups else []
    for group, chosen in groups.items():
        lines.append(f"  {f'{group} ({chosen})':<24} {', '.join(all_choices(conf, group)) or '(none yet)'}")
    lines += ["", "examples:", *(f"  {example}" for example in examples), ""]
    lines += [
        f"Hydra's flags: -m (one run for each of model=a,b), --cfg job (show, do not run); others: {verb} --hydra-help"
    ]
    return "\n".join(lines).replace(_IN_CONF, program)


def _keys(root: str, bases: list[str]) -> list[str]:
    """Return the lines of the keys of a root file, and of the keys that it inherits from others."""
    lines: dict[str, list[str]] = {}
    for text in (root, *bases):
        blocks = [block for block in re.split(r"^(?=\w)", text, flags=re.MULTILINE) if re.match(r"\w+:", block)]
        for block in blocks:
            rows = [line for line in block.splitlines() if re.match(r"(  )?\w+:", line)]
            lines.setdefault(block.partition(":")[0], rows)
    return [line for key, rows in lines.items() if key not in ("defaults", "run_dir") for line in rows]
