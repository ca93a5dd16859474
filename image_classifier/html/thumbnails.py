"""Thumbnails as data: addresses inside a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from image_classifier.errors import UnreadableImage
from image_classifier.images import DEFAULT_LIMITS, WHITE, DecodeLimits, decode

THUMBNAIL = 128  # longer side, pixels
BUDGET = 7_000_000  # characters of thumbnails and captions; a page stays below 10 MB
_PIXELATED = 48  # images up to this size keep their pixels


@dataclass(frozen=True)
class Thumbnail:
    """An image on a page: a data: address, "" without an image; a `small` image keeps its pixels when enlarged."""

    address: str = ""
    small: bool = False


NO_PICTURE = Thumbnail()


def thumbnail(
    path: Path,
    limits: DecodeLimits = DEFAULT_LIMITS,
    background: tuple[int, int, int] = WHITE,
    side: int = THUMBNAIL,
    quality: int = 75,
) -> Thumbnail:
    """Return the thumbnail of a file, its longer side at most `side` pixels; NO_PICTURE if it cannot be read."""
    try:
        image = Image.fromarray(decode(path, limits, background, at_least=(side, side)))
    except UnreadableImage:  # moved or changed since the scan
        return NO_PICTURE
    small = max(image.size) <= _PIXELATED
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=small, quality=quality)
    return Thumbnail(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", small)
