"""Thumbnails that lie inside a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from image_classifier.errors import UnreadableImage
from image_classifier.images import DEFAULT_LIMITS, DecodeLimits, decode

THUMBNAIL = 128  # longer side, pixels
WHITE = (255, 255, 255)
_PIXELATED = 48  # images up to this side keep their pixels


@dataclass(frozen=True)
class Thumbnail:
    """An image as a page holds it: a data: address, "" where it cannot be read; `small` keeps its pixels when it is enlarged."""

    address: str = ""
    small: bool = False


def thumbnail(path: Path, limits: DecodeLimits = DEFAULT_LIMITS, background: tuple[int, int, int] = WHITE) -> Thumbnail:
    """The image at `path`, its longer side at most 128 pixels."""
    try:
        image = Image.fromarray(decode(path, limits, background, at_least=(THUMBNAIL, THUMBNAIL)))
    except UnreadableImage:  # changed since it was looked at
        return Thumbnail()
    small = max(image.size) <= _PIXELATED
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=small, quality=75)
    return Thumbnail(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", small)
