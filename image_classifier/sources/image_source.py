"""One image to answer for: a file, bytes of an archive, or an address on the web."""

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
    """An image's `name` in the answers, and its file, its bytes, or a function that fetches them."""

    name: str
    source: Content | Callable[[], bytes]

    @classmethod
    def file(cls, path: Path) -> ImageSource:
        """Return the image of a file, named as its path is written."""
        return cls(str(path), path)

    @classmethod
    def missing(cls, name: str, reason: str) -> ImageSource:
        """Return an image that cannot be read, for the given reason."""
        return cls(name, partial(_refuse, name, reason))

    def content(self) -> Content:
        """Return the file or the bytes; UnreadableImage if there are none."""
        return self.source() if callable(self.source) else self.source


def _refuse(name: str, reason: str) -> NoReturn:
    raise UnreadableImage(name, reason)
