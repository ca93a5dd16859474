"""Images to pixels: `decode` to upright RGB, `Preprocess` to the square that the network sees.

This is the one path of all evaluation; it needs numpy and Pillow only.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from image_classifier import pillow_decoding
from image_classifier.errors import ConfigError, UnreadableImage
from image_classifier.pillow_decoding import Colour, OpenedImage, Size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
WHITE: Colour = (255, 255, 255)

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MODES = ("crop", "squash", "pad")


@dataclass(frozen=True)
class DecodeLimits:
    """The limits of one image file, checked before a pixel is decoded.

    Args:
        max_bytes: Maximum size of the file.
        max_pixels: Maximum of width times height. Decoding needs at most 20 bytes for each, and the file's own bytes.
        formats: The formats to read, out of `FORMATS`.

    Raises:
        ConfigError: An invalid value.
    """

    max_bytes: int = 50 * 2**20
    max_pixels: int = 50_000_000
    formats: tuple[str, ...] = FORMATS

    def __post_init__(self) -> None:
        for key, limit in (("max_bytes", 2**31 - 1), ("max_pixels", pillow_decoding.MAX_PIXELS)):
            value = getattr(self, key)
            if not isinstance(value, int) or not 1 <= value <= limit:
                raise ConfigError(f"data.limits.{key} must be an integer from 1 to {limit}, not {value!r}")
        object.__setattr__(self, "formats", _checked_formats(self.formats))


def _checked_formats(value: Any) -> tuple[str, ...]:
    names = list(value) if isinstance(value, list | tuple) else []
    if not names:
        raise ConfigError(f"data.limits.formats must be a list such as [JPEG, PNG], not {value!r}")
    for name in names:
        if name not in FORMATS:
            near = difflib.get_close_matches(str(name).upper(), FORMATS, n=1)
            raise ConfigError(
                f"unknown format {name!r} in data.limits.formats",
                f"did you mean {near[0]}?" if near else f"choose from {', '.join(FORMATS)}",
            )
    return tuple(name for name in FORMATS if name in names)


DEFAULT_LIMITS = DecodeLimits()


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file, read before a pixel is decoded."""

    format: str  # one of FORMATS
    mode: str  # Pillow's: RGB, L, P, CMYK, RGBA, I;16 ...
    width: int  # pixels, after EXIF orientation
    height: int
    orientation: int  # EXIF, 1..8
    frames: int  # pictures in the file; the first is used
    transparent: bool  # has alpha or a transparent colour
    bits: int  # of one sample: 1, 8, 16 or 32


def is_image_name(name: str) -> bool:
    """Return whether a file of this name counts as an image: a known suffix in any case, and not hidden.

    >>> is_image_name("cat.JPG"), is_image_name(".hidden.png"), is_image_name("notes.txt")
    (True, False, False)
    """
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def load_bytes(path: Path, limits: DecodeLimits = DEFAULT_LIMITS) -> bytes:
    """Return the bytes of a file; raise UnreadableImage where it is no regular file, empty or too large."""
    try:
        if not path.is_file():  # a pipe or a device would block or never end
            raise UnreadableImage(path, "no such file" if not path.exists() else "not a file")
        with path.open("rb") as file:
            content = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        raise UnreadableImage(path, _reason(error, limits)) from error
    return _checked_length(path, content, limits)


def read_size(source: Path | bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> Size:
    """Return width and height in pixels after EXIF orientation, from the header, or raise UnreadableImage."""
    with _opened(source, limits) as opened:
        return opened.size


def read_header(source: Path | bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> Header:
    """Return the header of a file; raise UnreadableImage where it has none or exceeds `limits`."""
    with _opened(source, limits) as opened:
        return _header(opened)


def decode(
    source: Path | bytes,
    limits: DecodeLimits = DEFAULT_LIMITS,
    background: Colour = WHITE,
    at_least: Size | None = None,
) -> np.ndarray:
    """Return the picture as a person sees it: uint8 RGB [H, W, 3].

    It is upright by EXIF; transparent pixels show `background`; samples of more than 8 bits are scaled to 0..255 and
    never clipped; of an animation it is the first frame. Colour profiles (ICC) are not applied.

    Args:
        source: A file or its bytes.
        limits: The limits of the file.
        background: RGB, 0..255, seen through transparent pixels.
        at_least: Width and height that are enough, in upright pixels: a JPEG is then decoded at 1/2, 1/4 or 1/8 of its
            size, which is faster, as long as both sides stay at or above these.

    Raises:
        UnreadableImage: The file is damaged, cut off (even by its end marker alone), beyond `limits` or of another
            format.
        ConfigError: The background is not a colour.
    """
    background = _checked_background(background)
    with _opened(source, limits) as opened:
        return opened.pixels(background, at_least)


def inspect(
    source: Path | bytes,
    limits: DecodeLimits = DEFAULT_LIMITS,
    background: Colour = WHITE,
    at_least: Size | None = None,
) -> tuple[Header, np.ndarray]:
    """Return the results of `read_header` and `decode`; the header has the width and height of the full picture."""
    background = _checked_background(background)
    with _opened(source, limits) as opened:
        return _header(opened), opened.pixels(background, at_least)


def _header(opened: OpenedImage) -> Header:
    return Header(
        opened.format,
        opened.image.mode,
        *opened.size,
        opened.orientation,
        opened.frames,
        opened.transparent,
        opened.bits,
    )


@contextmanager
def _opened(source: Path | bytes, limits: DecodeLimits) -> Iterator[OpenedImage]:
    """Yield the image with only its header read; any error inside the block becomes UnreadableImage."""
    name = "<bytes>" if isinstance(source, bytes) else source
    content = _checked_length(name, source, limits) if isinstance(source, bytes) else load_bytes(source, limits)
    try:
        with pillow_decoding.opened(content, limits.formats, lambda size: _check_size(size, limits)) as image:
            yield image
    except (
        Exception
    ) as error:  # Pillow's plugins raise anything: OSError, ValueError, SyntaxError, struct.error, MemoryError ...
        raise UnreadableImage(name, _reason(error, limits)) from error


def _checked_length(name: str | Path, content: bytes, limits: DecodeLimits) -> bytes:
    if not content:
        raise UnreadableImage(name, "the file is empty")
    if len(content) > limits.max_bytes:
        raise UnreadableImage(name, f"larger than {limits.max_bytes / 2**20:.0f} MiB")
    return content


def _check_size(size: Size, limits: DecodeLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ValueError(f"{width} x {height} pixels, {_too_many(limits)}")


def _too_many(limits: DecodeLimits) -> str:
    return f"more than the {limits.max_pixels:,} allowed"


def _checked_background(value: Any) -> Colour:
    """Return a colour, also from a list of the configuration; raise ConfigError where it is none."""
    colour = tuple(value) if isinstance(value, list | tuple) else ()
    if len(colour) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in colour):
        raise ConfigError(f"data.background must be three numbers from 0 to 255, not {value!r}")
    return colour


def _reason(error: BaseException, limits: DecodeLimits) -> str:
    if isinstance(error, UnreadableImage):
        return error.reason
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own limit comes before ours
        return f"its pixels are {_too_many(limits)}"
    if "cannot identify image file" in text:
        *others, last = ("WebP" if name == "WEBP" else name for name in limits.formats)
        return f"not a {', '.join(others)} or {last} image" if others else f"not a {last} image"
    return text[:120] or type(error).__name__


@dataclass(frozen=True)
class Preprocess:
    """The steps from a picture of any size to the square that the network sees, the same for all evaluation.

    >>> pixels = Preprocess(size=32)(np.zeros((48, 64, 3), np.uint8))
    >>> pixels.shape, pixels.dtype.name
    ((32, 32, 3), 'uint8')

    Args:
        size: Side of the square, pixels.
        mode: "crop" resizes the shorter side to round(size / crop_fraction) and keeps the centre, "squash" resizes both
            sides, "pad" fits the longer side and fills with black.
        interpolation: "bilinear" or "bicubic", antialiased.
        crop_fraction: Fraction of the shorter side that the crop keeps, in (0, 1].
        background: RGB, 0..255, seen through transparent pixels.
        scaled_decoding: Whether `read` decodes a JPEG at 1/2, 1/4 or 1/8 of its size, where that is at least twice the
            resized picture.

    Raises:
        ConfigError: An invalid value.
    """

    size: int
    mode: str = "crop"
    interpolation: str = "bilinear"
    crop_fraction: float = 1.0
    background: Colour = WHITE
    scaled_decoding: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 4096:
            raise ConfigError(f"data.image_size must be between 1 and 4096 pixels, not {self.size}")
        if self.mode not in _MODES:
            raise ConfigError(
                f"data.resize must be one of {', '.join(_MODES)}, not {self.mode!r}", "a training also takes auto"
            )
        if self.interpolation not in _RESAMPLING:
            raise ConfigError(f"data.interpolation must be one of {', '.join(_RESAMPLING)}, not {self.interpolation!r}")
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"data.crop_fraction must be above 0 and at most 1, not {self.crop_fraction}")
        if not isinstance(self.scaled_decoding, bool):
            raise ConfigError(f"data.scaled_decoding must be true or false, not {self.scaled_decoding!r}")
        object.__setattr__(self, "background", _checked_background(self.background))

    def read(self, source: Path | bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> np.ndarray:
        """Return the pixels of a file or its bytes, uint8 [size, size, 3]; raise UnreadableImage like `decode`."""
        with _opened(source, limits) as opened:
            full_size = opened.size
            at_least = self._min_decoded_size(full_size) if self.scaled_decoding else None
            picture = opened.picture(self.background, at_least)
            mirrored = opened.mirrored
        return self._square(picture, full_size, mirrored)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the pixels, uint8 [size, size, 3], of an image, uint8 [H, W, 3]."""
        picture = Image.fromarray(image)
        return self._square(picture, picture.size)

    def _min_decoded_size(self, full_size: Size) -> Size:
        """Return twice the width and height to which the full picture is resized."""
        if self.mode == "squash":
            return 2 * self.size, 2 * self.size
        if self.mode == "pad":
            width, height = _fitted(full_size, self.size)
        else:
            width, height = _covering(full_size, round(self.size / self.crop_fraction))
        return 2 * width, 2 * height

    def _square(
        self, picture: Image.Image, full_size: Size, mirrored: tuple[bool, bool] = (False, False)
    ) -> np.ndarray:
        """Return the square, uint8 [size, size, 3], of a picture that may be decoded at 1/2, 1/4 or 1/8 of `full_size`.

        All coordinates are those of the full picture, so that the square shows the same as without scaled decoding.
        """
        # The scale at which libjpeg decoded: the smallest one that covers the full picture again.
        scale = next(scale for scale in (1, 2, 4, 8) if scale * max(picture.size) >= max(full_size))
        # A side that the scale does not divide is rounded up: the picture ends within its last pixel, or, where it is
        # stored mirrored, begins within its first. `blank` is that fraction of a pixel, for width and height.
        sides = zip(picture.size, full_size, mirrored, strict=True)
        blank = [side - full / scale if flip else 0.0 for side, full, flip in sides]
        # The region to keep, left, top, right, bottom: first in the full picture, then in the decoded one.
        region = self._region(full_size)
        edges = [min(edge / scale + blank[axis % 2], picture.size[axis % 2]) for axis, edge in enumerate(region)]
        left, top, right, bottom = edges
        # Crop and resize in one step, antialiased.
        shape = _fitted(full_size, self.size) if self.mode == "pad" else (self.size, self.size)
        resized = np.array(picture.resize(shape, _RESAMPLING[self.interpolation], box=(left, top, right, bottom)))
        return self._padded(resized) if self.mode == "pad" else resized

    def _region(self, full_size: Size) -> tuple[float, float, float, float]:
        """Return the region of the full picture that the square shows: left, top, right, bottom."""
        if self.mode == "crop":
            return _crop_box(full_size, self.size, self.crop_fraction)
        return 0, 0, *full_size

    def _padded(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        pixels = np.zeros((self.size, self.size, 3), dtype=np.uint8)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        pixels[top : top + height, left : left + width] = image
        return pixels

    def laid_back(self, plane: np.ndarray, whole: Size, shape: Size) -> np.ndarray:
        """Return values of the square, float32 [size, size], laid over the picture that it was made from.

        Args:
            plane: A value for each pixel of the square.
            whole: Width and height of the picture.
            shape: Width and height of the result, float32 [height, width], which is NaN outside the square.
        """
        if self.mode == "pad":
            width, height = _fitted(whole, self.size)
            top, left = (self.size - height) // 2, (self.size - width) // 2
            plane = plane[top : top + height, left : left + width]
        edges = (round(edge * shape[axis % 2] / whole[axis % 2]) for axis, edge in enumerate(self._region(whole)))
        left, top, right, bottom = edges
        size = max(1, right - left), max(1, bottom - top)
        left, top = min(left, shape[0] - size[0]), min(top, shape[1] - size[1])
        laid = np.full(shape[::-1], np.nan, dtype=np.float32)
        resized = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32)).resize(size, Image.Resampling.BILINEAR)
        laid[top : top + size[1], left : left + size[0]] = np.asarray(resized)
        return laid

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as written to a bundle."""
        return {**asdict(self), "background": list(self.background)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Return the settings that `as_dict` gave; raise ConfigError for an unknown key or a missing size."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown or "size" not in values:
            fact = f"preprocess has no key {', '.join(unknown)}" if unknown else "preprocess has no size"
            raise ConfigError(fact, f"its keys are {', '.join(field.name for field in fields(cls))}")
        return cls(**values)


def _fitted(shape: Size, longest: int) -> Size:
    """Return width and height with the longer side resized to `longest`."""
    scale = longest / max(shape)
    width, height = (min(longest, max(1, round(side * scale))) for side in shape)
    return width, height


def _covering(shape: Size, shorter: int) -> Size:
    """Return width and height with the shorter side resized to `shorter`."""
    scale = shorter / min(shape)
    width, height = (max(shorter, round(side * scale)) for side in shape)
    return width, height


def _crop_box(shape: Size, size: int, fraction: float) -> tuple[float, float, float, float]:
    """Return the region that a crop keeps: left, top, right, bottom.

    The crop resizes the shorter side to round(size / fraction) and takes the centre.

    Resizing only this region gives the same pixels and never builds the full resized picture: one of 1 x 50 000 000
    pixels cannot fill the memory.
    """
    resized = _covering(shape, round(size / fraction))
    starts = [(side - size) // 2 for side in resized]
    left, top = (start * side / whole for start, side, whole in zip(starts, shape, resized, strict=True))
    right, bottom = (
        min((start + size) * side / whole, side) for start, side, whole in zip(starts, shape, resized, strict=True)
    )
    return left, top, right, bottom
