"""One image to answer for, wherever it lies: a file, bytes of an archive, an address on the web."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from image_classifier.errors import UnreadableImage

Content = Path | bytes


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image's `name` in the answers, and its file, its bytes, or what fetches them when it is their turn."""

    name: str
    source: Content | Callable[[], bytes]

    @classmethod
    def file(cls, path: Path) -> ImageSource:
        """A file, named as its path is written."""
        return cls(str(path), path)

    @classmethod
    def missing(cls, name: str, reason: str) -> ImageSource:
        """An image that cannot be had: its row says why."""
        return cls(name, partial(_refuse, name, reason))

    def content(self) -> Content:
        """The file or the bytes; UnreadableImage where they cannot be had."""
        return self.source() if callable(self.source) else self.source


def _refuse(name: str, reason: str) -> NoReturn:
    raise UnreadableImage(name, reason)
