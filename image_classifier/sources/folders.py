"""Which files of a folder count: one rule for training and inference."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# What systems, network drives and archivers put between people's files.
JUNK = frozenset(
    {
        "__MACOSX",
        "__pycache__",
        "lost+found",
        "Thumbs.db",
        "desktop.ini",
        "@eaDir",
        "#recycle",
        "#snapshot",
        "@Recycle",
        "@Recently-Snapshot",
        "$RECYCLE.BIN",
        "System Volume Information",
    }
)
Identity = tuple[int, int]  # device and inode


def is_visible(name: str) -> bool:
    """Return whether a file or folder of this name counts: it is neither hidden nor junk of a system.

    >>> [is_visible(name) for name in ("cat.jpg", ".DS_Store", "@eaDir")]
    [True, False, False]
    """
    return not name.startswith(".") and name not in JUNK


def is_visible_path(path: str) -> bool:
    """Return whether every part of a path inside an archive or a bucket counts.

    >>> is_visible_path("photos/./cat.jpg"), is_visible_path("__MACOSX/cat.jpg")
    (True, False)
    """
    return all(part in ("", ".", "..") or is_visible(part) for part in path.replace("\\", "/").split("/"))


def visible_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return the files and folders of a folder that count, in any order; OSError if it cannot be read."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if is_visible(entry.name)]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder without permission
        return False


def walk(folder: str, on_error: Callable[[str, OSError], None]) -> Iterator[os.DirEntry[str]]:
    """Yield every file below a folder that counts, sorted by path; the names of one folder at a time are in memory.

    Links to folders are followed, but never in a circle. `on_error` is called with a folder that cannot be read.
    """
    try:
        above = [_identity(os.stat(parent)) for parent in Path(os.path.abspath(folder)).parents]
    except OSError as error:
        on_error(folder, error)
        return
    yield from _walk(folder, tuple(above), on_error)


def _walk(
    folder: str, above: tuple[Identity, ...], on_error: Callable[[str, OSError], None]
) -> Iterator[os.DirEntry[str]]:
    try:
        entries = sorted(visible_entries(folder), key=lambda entry: entry.name)
        identity = _identity(os.stat(folder))
    except OSError as error:
        on_error(folder, error)
        return
    if identity in above:  # a link to a folder above this one would bring in everything again
        return
    for entry in entries:
        if is_folder(entry):
            yield from _walk(entry.path, (*above, identity), on_error)
        else:
            yield entry


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def expanded(path: str) -> str:
    """Return a path with `~` as the home folder, unless there is a file of that very name."""
    return path if not path.startswith("~") or os.path.lexists(path) else os.path.expanduser(path)
