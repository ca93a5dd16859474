"""Thumbnails as data: addresses, which a page carries in itself."""

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
_PIXELATED = 48  # images up to this side keep their pixels


@dataclass(frozen=True)
class Thumbnail:
    """An image as a page shows it: a data: address, "" where there is no picture; `small` keeps its pixels when it is enlarged."""

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
    """The picture of a file, its longer side at most `side` pixels; one of no address where the file cannot be read any more."""
    try:
        image = Image.fromarray(decode(path, limits, background, at_least=(side, side)))
    except UnreadableImage:  # moved or changed since it was looked at
        return NO_PICTURE
    small = max(image.size) <= _PIXELATED
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=small, quality=quality)
    return Thumbnail(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", small)
