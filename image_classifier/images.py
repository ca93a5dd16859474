"""Pixels: `decode` any picture to upright RGB, `Preprocess` it to the network's square. The one evaluation path; numpy and Pillow only."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from image_classifier.errors import ConfigError, UnreadableImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MODES = ("crop", "squash", "pad")


@dataclass(frozen=True)
class DecodeLimits:
    """What a file may ask of the machine; checked before a pixel is decoded."""

    max_bytes: int = 50 * 2**20
    max_pixels: int = 50_000_000


DEFAULT_LIMITS = DecodeLimits()


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: a known suffix in any case, and not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def load_bytes(path: Path, limits: DecodeLimits = DEFAULT_LIMITS) -> bytes:
    """The file's bytes, never more than `limits.max_bytes`; UnreadableImage where it is no file, empty or too large."""
    try:
        if not path.is_file():  # a pipe or a device would block or never end
            raise UnreadableImage(path, "no such file" if not path.exists() else "not a file")
        with path.open("rb") as file:
            content = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        raise UnreadableImage(path, _reason(error)) from error
    return _checked_length(path, content, limits)


def read_size(source: Path | bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Width and height in pixels after EXIF orientation, from the header alone; UnreadableImage where there is none."""
    with _opened(source, limits) as (image, content):
        width, height = image.size
        return (height, width) if _orientation(image, content) >= 5 else (width, height)


def decode(source: Path | bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> np.ndarray:
    """The picture as a person sees it: uint8 RGB [H, W, 3].

    Upright by EXIF, transparency laid on white, deep samples scaled to 0..255, the first frame of an animation.

    Raises:
        UnreadableImage: The file is damaged, cut short, larger than `limits`, or none of the formats in `FORMATS`.
    """
    with _opened(source, limits) as (image, content):
        image.load()
        turn = _TRANSPOSE.get(_orientation(image, content))
        pixels = _to_rgb(image if turn is None else image.transpose(turn))
    return pixels


@contextmanager
def _opened(source: Path | bytes, limits: DecodeLimits) -> Iterator[tuple[Image.Image, bytes]]:
    """The image, only its header read; whatever goes wrong inside the block becomes UnreadableImage."""
    name = "<bytes>" if isinstance(source, bytes) else source
    content = _checked_length(name, source, limits) if isinstance(source, bytes) else load_bytes(source, limits)
    try:
        with _quiet, Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_pixels(image, limits)
            yield image, content
    except Exception as error:  # Pillow's plugins raise anything: OSError, ValueError, SyntaxError, struct.error, MemoryError ...
        raise UnreadableImage(name, _reason(error)) from error


def _checked_length(name: str | Path, content: bytes, limits: DecodeLimits) -> bytes:
    if not content:
        raise UnreadableImage(name, "the file is empty")
    if len(content) > limits.max_bytes:
        raise UnreadableImage(name, f"larger than {limits.max_bytes / 2**20:.0f} MiB")
    return content


def _check_pixels(image: Image.Image, limits: DecodeLimits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than the {limits.max_pixels / 1e6:.0f} megapixels allowed")


def _orientation(image: Image.Image, content: bytes) -> int:
    """EXIF orientation 1..8; 1 where there is none or it cannot be parsed."""
    if image.format == "TIFF":  # Pillow turns these itself, header and pixels
        return 1
    # getexif() decodes a whole PNG to look for a late chunk: ask only where the bytes name one.
    if image.format == "PNG" and not any(mark in content for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata around good pixels: the picture is as its pixels lie
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _to_rgb(image: Image.Image) -> np.ndarray:
    """A loaded image of any mode as uint8 [H, W, 3]."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_deep_to_grey(image)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _deep_to_grey(image: Image.Image) -> np.ndarray:
    """Samples of more than 8 bits as uint8 [H, W], scaled by their depth and never clipped (`convert` clips: a white picture)."""
    samples = np.asarray(image).astype(np.float64)
    if not np.isfinite(samples).all():
        raise ValueError("holds samples that are not numbers")
    low, high = _sample_range(image.mode, float(samples.min()), float(samples.max()))
    grey = np.rint((samples - low) * (255.0 / (high - low))).astype(np.uint8)
    key = image.info.get("transparency")
    return np.where(samples == key, np.uint8(255), grey) if isinstance(key, int) else grey


def _sample_range(mode: str, low: float, high: float) -> tuple[float, float]:
    """The values that stand for black and white: the format's own where it has them, else the darkest and lightest sample."""
    if mode == "F":
        full = 1.0 if high <= 1 else 255.0 if high <= 255 else 65535.0
    else:
        full = 65535.0
    if low >= 0 and high <= full:
        return 0.0, full
    return low, max(high, low + 1.0)


def _reason(error: BaseException) -> str:
    if isinstance(error, UnreadableImage):
        return error.reason
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    if "cannot identify image file" in text:
        return "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"
    return text[:120] or type(error).__name__


class _Quiet:
    """Pillow's warnings off for as long as any thread decodes.

    `warnings.catch_warnings` alone is unsafe here: two threads that overlap restore each other's filters.
    """

    def __init__(self) -> None:
        self._lock, self._depth, self._saved = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._saved.__exit__(None, None, None)


_quiet = _Quiet()


@dataclass(frozen=True)
class Preprocess:
    """From a picture of any size to the network's square, for every path that evaluates.

    Args:
        size: Side of the square, pixels.
        mode: "crop" resizes the shorter side to round(size / crop_fraction) and keeps the centre, "squash" resizes both
            sides, "pad" fits the longer side and fills with black.
        interpolation: "bilinear" or "bicubic", antialiased.
        crop_fraction: Part of the shorter side that the crop keeps, in (0, 1].

    Raises:
        ConfigError: A value that cannot be.
    """

    size: int
    mode: str = "crop"
    interpolation: str = "bilinear"
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 4096:
            raise ConfigError(f"data.image_size must be between 1 and 4096 pixels, not {self.size}")
        if self.mode not in _MODES:
            raise ConfigError(f"data.resize must be one of {', '.join(_MODES)}, not {self.mode!r}")
        if self.interpolation not in _RESAMPLING:
            raise ConfigError(f"data.interpolation must be one of {', '.join(_RESAMPLING)}, not {self.interpolation!r}")
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"data.crop_fraction must be above 0 and at most 1, not {self.crop_fraction}")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Image uint8 [H, W, 3] to pixels uint8 [size, size, 3]."""
        picture = Image.fromarray(image)
        filter_ = _RESAMPLING[self.interpolation]
        if self.mode == "pad":
            return self._padded(picture, filter_)
        box = _crop_box(picture.size, self.size, self.crop_fraction) if self.mode == "crop" else None
        return np.array(picture.resize((self.size, self.size), filter_, box=box))

    def _padded(self, picture: Image.Image, filter_: Image.Resampling) -> np.ndarray:
        scale = self.size / max(picture.size)
        width, height = (min(self.size, max(1, round(side * scale))) for side in picture.size)
        pixels = np.zeros((self.size, self.size, 3), dtype=np.uint8)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        pixels[top : top + height, left : left + width] = np.asarray(picture.resize((width, height), filter_))
        return pixels

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to a bundle."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `as_dict`; ConfigError where a key is unknown or the size is missing."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown or "size" not in values:
            fact = f"preprocess has no key {', '.join(unknown)}" if unknown else "preprocess has no size"
            raise ConfigError(fact, f"its keys are {', '.join(field.name for field in fields(cls))}")
        return cls(**values)


def _crop_box(shape: tuple[int, int], size: int, fraction: float) -> tuple[float, float, float, float]:
    """The part of the picture that "shorter side to round(size / fraction), then the centre" keeps: left, top, right, bottom.

    Resizing only this part gives the same pixels and never builds the whole resized picture: one of 1 x 50 000 000 cannot
    fill the memory.
    """
    shorter = round(size / fraction)
    scale = shorter / min(shape)
    resized = [max(shorter, round(side * scale)) for side in shape]
    starts = [(side - size) // 2 for side in resized]
    left, top = (start * side / whole for start, side, whole in zip(starts, shape, resized, strict=True))
    right, bottom = (min((start + size) * side / whole, side) for start, side, whole in zip(starts, shape, resized, strict=True))
    return left, top, right, bottom
