"""Where answers may be written: over no device and no folder, no image that is asked about, and nothing that somebody else is half-way through."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from image_classifier.atomic_io import is_replaceable
from image_classifier.errors import ConfigError, storage_errors
from image_classifier.images import is_image_name
from image_classifier.sources.image_source import ImageSource


def check_output(output: Path, named: Iterable[str]) -> None:
    """ConfigError where a file of answers would take the place of something else, as far as the things `named` on the command line tell."""
    with storage_errors(output):
        if output.is_dir():
            raise ConfigError(f"output={str(output)!r} is a folder", "name a file in it")
        if not is_replaceable(output):
            raise ConfigError(
                f"output={str(output)!r} is no file", "leave --output out, and answers go to standard output"
            )
    own, same = output.resolve(), _same(output)
    for item in named:
        within = is_image_name(output.name) and os.path.isdir(item) and own.is_relative_to(Path(item).resolve())
        if within or (
            output.exists() and any(map(same, [item] if os.path.exists(item) else glob.iglob(item, recursive=True)))
        ):
            raise _is_asked_about(output)


def spared(items: Iterable[ImageSource], output: Path) -> Iterator[ImageSource]:
    """The images as they come, those that only a table or standard input names too; ConfigError for the one in whose place answers would come."""
    same = _same(output)
    for item in items:
        if isinstance(item.source, Path) and same(item.source):
            raise _is_asked_about(output)
        yield item


def _same(output: Path) -> Callable[[str | Path], bool]:
    """Whether a path is that of the output, by whatever name; none is where there is no such file yet."""
    try:
        known = output.stat()
    except OSError:
        return lambda path: False

    def same(path: str | Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), known)
        except (OSError, ValueError):  # its row will say so
            return False

    return same


def _is_asked_about(output: Path) -> ConfigError:
    return ConfigError(f"output={str(output)!r} is among the images", "choose another --output")
