"""Parse a Dockerfile, and run its steps in a folder: a test of an image without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One instruction, with its words as they stand."""

    name: str
    text: str

    def words(self) -> list[str]:
        """The JSON form of ENTRYPOINT, CMD and HEALTHCHECK's CMD."""
        found = json.loads(self.text[self.text.index("[") :])
        assert isinstance(found, list)
        return [str(word) for word in found]


def stages(path: Path) -> list[list[Step]]:
    """The steps of each stage; FROM is the first."""
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    steps = [Step(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]
    begins = [number for number, step in enumerate(steps) if step.name == "FROM"]
    return [steps[begin:end] for begin, end in zip(begins, [*begins[1:], len(steps)], strict=True)]


def the(name: str, stage: list[Step]) -> Step:
    (step,) = [step for step in stage if step.name == name]
    return step


def sent_to_the_builder(root: Path) -> list[str]:
    """The tracked files that .dockerignore lets through: the last line that fits decides."""
    lines = [
        line
        for line in (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in tracked.stdout.splitlines() if not _ignored(name, lines) and (root / name).is_file()]


def _ignored(name: str, lines: list[str]) -> bool:
    ignored = False
    ways = [name, *map(str, Path(name).parents)]
    for line in lines:
        pattern = line.lstrip("!").removeprefix("**/")
        if any(fnmatch(way if "**/" not in line else Path(way).name, pattern) for way in ways):
            ignored = not line.startswith("!")
    return ignored


def build(root: Path, stage: list[Step], folder: Path, python: Path) -> None:
    """Do the stage's COPY and RUN below `folder`, as if that were the root of a file system."""
    source = folder / "src"
    source.mkdir()
    sent = sent_to_the_builder(root)
    paths = {"/opt/": f"{folder}/opt/", "/wheels": f"{folder}/wheels"}
    settings = {}
    for step in stage:
        if step.name == "ENV":
            settings.update(word.split("=", 1) for word in step.text.split())
        elif step.name == "COPY":
            *names, target = step.text.split()
            for name in names:
                _copy(root, source, name, target, sent)
        elif step.name == "RUN":
            line = re.sub("|".join(paths), lambda found: paths[found[0]], step.text)
            line = re.sub(r"(^|&& )python ", lambda found: f"{found[1]}{python} ", line)
            done = subprocess.run(
                ["sh", "-c", line],
                cwd=source,
                env={**bare_environment(), **settings},
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def bare_environment() -> dict[str, str]:
    """This one's, without what would lead a Python elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def _copy(root: Path, source: Path, name: str, target: str, sent: list[str]) -> None:
    files = [path for path in sent if path == name or path.startswith(f"{name}/")]
    assert files, f"COPY {name}: .dockerignore lets nothing of it through"
    for path in files:
        inside = source / target / (Path(path).name if path == name else Path(path).relative_to(name))
        inside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, inside)
