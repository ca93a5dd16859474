"""The command that started this process: as hints name it, and as child processes are started."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from image_classifier.paths import CONF_DIR, PACKAGE_DIR

SCRIPT = "image-classifier"
_VARIABLE = "IMAGE_CLASSIFIER_PROGRAM"
_IS_CHECKOUT = CONF_DIR.parent != PACKAGE_DIR


def program() -> str:
    """Return the command as the user typed it, ready for a shell.

    It is `python commands.py`, `image-classifier` or `python -m image_classifier`. A child process names the command
    of its parent. Where the package is used from Python, it is the command that works beside the package.
    """
    return os.environ.get(_VARIABLE) or _typed(sys.argv[0])


def _typed(path: str) -> str:
    script = Path(path)
    if script.name == "commands.py":
        return shlex.join(["python", path])
    if script.name == "__main__.py" and script.parent.name == PACKAGE_DIR.name:
        return f"python -m {PACKAGE_DIR.name}"
    return "python commands.py" if _IS_CHECKOUT and script.stem != SCRIPT else SCRIPT


def child_command() -> tuple[str, ...]:
    """Return the words that start this program in a process of its own, whatever its current folder is."""
    # `python image_classifier/__main__.py` would put the package's folder on the path: its html/ would hide Python's.
    if _IS_CHECKOUT:
        return sys.executable, str(CONF_DIR.parent / "commands.py")
    return sys.executable, "-m", PACKAGE_DIR.name


def torchrun_target() -> str:
    """Return what stands for this program on the command line of torchrun."""
    target = program().removeprefix("python ")
    return f"-m {PACKAGE_DIR.name}" if target == SCRIPT else target


@contextmanager
def inherited() -> Iterator[None]:
    """Let the processes that are started in the block import this package and name the same command in their hints."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", _VARIABLE)}
    os.environ[_VARIABLE] = program()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PACKAGE_DIR.parent), before["PYTHONPATH"])))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
