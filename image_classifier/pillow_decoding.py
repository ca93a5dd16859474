"""Strict decoding with Pillow: the header of an image file, and its complete pixels in 8-bit RGB or an exception."""

from __future__ import annotations

import io
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageFile, JpegImagePlugin

Size = tuple[int, int]  # width, height
Colour = tuple[int, int, int]
Painter = Callable[[Image.Image], np.ndarray]  # a piece of a loaded image -> uint8 RGB [h, w, 3]

MAX_PIXELS = 178_956_970  # Pillow refuses more
_PIECE = 2**18  # pixels converted at a time, so that temporary arrays are never as large as the picture
# EXIF orientation -> a view of the upright array in the order in which the file stores its pixels.
_AS_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
_EXIF_KEYS = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})
_EXIF_MARKS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags
# Limits that keep a small file from costing minutes; no camera or editor comes near them.
_MAX_FRAMES = 1000  # TIFF pages counted
_MAX_READS = 500_000  # reads by Pillow's parsers of one file, half a second or so
_MAX_SCANS = 100  # of a progressive JPEG, each a pass over all pixels
_MAX_RUN_LENGTH_PIXELS = 4_000_000  # of a BMP, decoded in Python
_SCAN, _END = b"\xff\xda", b"\xff\xd9"  # JPEG markers
# The first marker after a JPEG's entropy-coded data, without restart markers (ITU T.81, B.1.1).
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_MID_GREYS = (128, (128, 128, 128), (127, 127, 127, 127))

# The exception alone reports what is wrong with a file.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image whose header is read and whose pixels are not."""

    image: ImageFile.ImageFile
    content: bytes
    rawmode: str  # how the samples lie in the file, in Pillow's words: "L;2", "RGB;16B", "I;12" ...
    orientation: int  # EXIF, 1..8

    @property
    def format(self) -> str:
        """Pillow's name of the format; a multi-picture JPEG (MPO) counts as a JPEG."""
        return "JPEG" if self.image.format == "MPO" else str(self.image.format)

    @property
    def size(self) -> Size:
        """Upright width and height in pixels."""
        width, height = self.image.size  # Pillow turns a TIFF's by itself
        return (height, width) if self.orientation >= 5 and self.format != "TIFF" else (width, height)

    @property
    def mirrored(self) -> tuple[bool, bool]:
        """Whether the file stores the picture mirrored: left to right, top to bottom."""
        return self.orientation in (2, 3, 6, 7), self.orientation in (3, 4, 7, 8)

    @property
    def transparent(self) -> bool:
        return self.image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in self.image.info

    @property
    def bits(self) -> int:
        """Bits of one sample as stored: 1, 8, 16 or 32."""
        mode = self.image.mode
        if mode in ("1", "I", "F") and "16" not in self.rawmode:
            return 1 if mode == "1" else 32
        return 16 if mode.startswith("I") or (";16" in self.rawmode and self.format in ("PNG", "TIFF")) else 8

    @property
    def frames(self) -> int:
        """Number of pictures in the file, without those after a damaged one, and at most 1000 of a TIFF."""
        if self.format not in ("GIF", "TIFF"):
            return min(int(getattr(self.image, "n_frames", 1)), 2**31 - 1)
        count = 1
        # Counting moves the file to another frame, so a second one is opened.
        with suppress(Exception), Image.open(_stream(self.content), formats=(self.format,)) as again:
            if self.format == "GIF":
                return int(again.n_frames)  # type: ignore[attr-defined]
            while count < _MAX_FRAMES:  # Pillow's own count of TIFF pages takes quadratic time
                again.seek(count)
                count += 1
        return count

    def pixels(self, background: Colour, at_least: Size | None) -> np.ndarray:
        """Return the complete first picture, upright: uint8 RGB [H, W, 3]; raise where a piece of it is missing."""
        self._load(at_least)
        return _painted(self.image, _painter(self, background), self._turn)

    def picture(self, background: Colour, at_least: Size | None) -> Image.Image:
        """Return the same as an image of Pillow; the most common kind is not copied."""
        self._load(at_least)
        if self.image.mode == "RGB" and self._turn == 1 and not self.transparent:
            return self.image
        return Image.fromarray(_painted(self.image, _painter(self, background), self._turn))

    @property
    def _turn(self) -> int:
        return 1 if self.format == "TIFF" else self.orientation  # Pillow turns those itself

    def _load(self, at_least: Size | None) -> None:
        if at_least is not None and self.orientation >= 5:
            at_least = at_least[1], at_least[0]
        _shrink(self.image, at_least)
        self.image.load()
        if self.format == "JPEG" and _ends_early(self, at_least):
            raise ValueError("image data ends early")
        if self.format == "PNG" and self.content.rfind(b"IEND") < 0:  # Pillow accepts a file cut off between two chunks
            raise ValueError("image file is truncated")


@contextmanager
def opened(content: bytes, formats: tuple[str, ...], check_size: Callable[[Size], None]) -> Iterator[OpenedImage]:
    """Yield the image in `content`; `check_size` raises for too large a size. Any exception may pass."""
    with quiet:
        check_size(_webp_canvas(content))
        with Image.open(_stream(content), formats=formats) as image:
            check_size(image.size)
            _check_cost(image, content, check_size)
            args = image.tile[0].args if image.tile else ""
            yield OpenedImage(
                image, content, str(args[0] if isinstance(args, tuple) else args), _orientation(image, content)
            )


def _check_cost(image: ImageFile.ImageFile, content: bytes, check_size: Callable[[Size], None]) -> None:
    """Refuse a file that needs far more time or memory than its pixels do."""
    if image.format == "TIFF":  # libtiff allocates a full tile, however small the picture is
        check_size((image.tag_v2.get(_TILE_WIDTH, 1), image.tag_v2.get(_TILE_LENGTH, 1)))  # type: ignore[attr-defined]
    elif image.format == "BMP":
        if image.info.get("compression") in (1, 2) and image.width * image.height > _MAX_RUN_LENGTH_PIXELS:
            raise ValueError(f"run-length coded, more than {_MAX_RUN_LENGTH_PIXELS // 10**6} megapixels")
    elif isinstance(image, JpegImagePlugin.JpegImageFile) and content.count(_SCAN) > _MAX_SCANS:
        start = _first_scan(content)  # without those of a thumbnail, or after the picture
        if content.count(_SCAN, start, content.find(_END, start)) > _MAX_SCANS:
            raise ValueError(f"more than {_MAX_SCANS} scans")


class _MeteredFile(io.BytesIO):
    """A file that stops the parsing of millions of tiny pieces, which Pillow reads one by one in Python."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise ValueError("too many pieces")
        return super().read(size)


def _stream(content: bytes) -> io.BytesIO:
    return _MeteredFile(content) if len(content) > _MAX_READS else io.BytesIO(content)


def _first_scan(content: bytes) -> int:
    """Return the position of a JPEG's first entropy-coded data."""
    header = io.BytesIO(content)
    JpegImagePlugin.JpegImageFile(header)
    return header.tell()


def _webp_canvas(content: bytes) -> Size:
    """Return a WebP's size from its first bytes (RFC 9649, 2.5 to 2.7), else (1, 1).

    Pillow allocates the canvas when it opens the file, so the size must be checked before.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return 1, 1
    kind, number = content[12:16], int.from_bytes
    if kind == b"VP8X":
        return number(content[24:27], "little") + 1, number(content[27:30], "little") + 1
    if kind == b"VP8L":
        packed = number(content[21:25], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    return number(content[26:28], "little") & 0x3FFF, number(content[28:30], "little") & 0x3FFF


def _orientation(image: ImageFile.ImageFile, content: bytes) -> int:
    """Return the EXIF orientation, 1..8; 1 where there is none or it cannot be parsed."""
    if image.format == "PNG" and not _EXIF_KEYS & image.info.keys() and any(mark in content for mark in _EXIF_MARKS):
        image.load()  # the chunk comes after the pixels
    try:
        if image.format == "TIFF":
            value = image.tag_v2.get(ExifTags.Base.Orientation)  # type: ignore[attr-defined]
        elif _EXIF_KEYS & image.info.keys():
            # The PNG plugin's own getexif would decode the pixels and hide the errors of that.
            value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        else:
            return 1
    except Exception:  # damaged metadata around good pixels: the picture is shown as stored
        return 1
    return value if isinstance(value, int) and value in _AS_STORED else 1


def _shrink(image: ImageFile.ImageFile, at_least: Size | None) -> None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8; other formats are not changed."""
    if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        image.draft(None, (max(1, at_least[0]), max(1, at_least[1])))  # no mode: the colours do not change


def _ends_early(opened: OpenedImage, at_least: Size | None) -> bool:
    """Return whether a JPEG's data ended before its last block although an end marker follows.

    libjpeg fills the missing blocks with mid-grey and gives no error. So only a picture whose last pixel is mid-grey is
    checked: more data are put before the end marker, which change an incomplete picture and never a complete one.
    """
    image, content = opened.image, opened.content
    if image.getpixel((image.width - 1, image.height - 1)) not in _MID_GREYS:
        return False
    marker = _SCAN_END.search(content, _first_scan(content))
    end = marker.start() if marker else len(content)
    longer = JpegImagePlugin.JpegImageFile(io.BytesIO(content[:end] + bytes(range(32, 224)) + content[end:]))
    _shrink(longer, at_least)
    return ImageChops.difference(image, longer).getbbox() is not None


def _painted(image: Image.Image, paint: Painter, orientation: int) -> np.ndarray:
    """Return a loaded image as uint8 RGB [H, W, 3], converted piece by piece and turned upright."""
    width, height = image.size
    if orientation == 1 and width * height <= _PIECE:
        return paint(image)
    upright = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), dtype=np.uint8)
    stored = _AS_STORED[orientation](upright)
    for left, top, right, bottom in _boxes(image.size):
        stored[top:bottom, left:right] = paint(image.crop((left, top, right, bottom)))
    return upright


def _boxes(size: Size) -> Iterator[tuple[int, int, int, int]]:
    """Yield the boxes of pieces of at most `_PIECE` pixels: left, top, right, bottom."""
    width, height = size
    across = min(width, _PIECE)
    down = _PIECE // across
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def _painter(opened: OpenedImage, background: Colour) -> Painter:
    mode = opened.image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _deep_painter(opened, background)
    if not opened.transparent:
        return lambda piece: np.array(piece if piece.mode == "RGB" else piece.convert("RGB"))
    _scale_transparent_colour(opened)

    def on_background(piece: Image.Image) -> np.ndarray:
        rgba = (piece.convert("LA") if piece.mode == "La" else piece).convert("RGBA")
        return np.array(Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB"))

    return on_background


def _scale_transparent_colour(opened: OpenedImage) -> None:
    """Scale a PNG's transparent colour to 8-bit samples.

    Pillow keeps it as it is in the file, so no pixel would match it.
    """
    info = opened.image.info
    key = info.get("transparency")
    if opened.rawmode in ("L;2", "L;4") and isinstance(key, int):
        info["transparency"] = key * (85 if opened.rawmode == "L;2" else 17)
    elif opened.rawmode == "RGB;16B" and isinstance(key, tuple):
        info["transparency"] = tuple(sample >> 8 for sample in key)


def _deep_painter(opened: OpenedImage, background: Colour) -> Painter:
    """Return a painter that scales samples of more than 8 bits by their depth; `convert` would clip them to white."""
    image = opened.image
    black, white = _range(opened)
    if opened.format == "TIFF" and image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0:  # type: ignore[attr-defined]
        black, white = white, black  # "WhiteIsZero"; Pillow inverts shallow samples only
    key = image.info.get("transparency")

    def paint(piece: Image.Image) -> np.ndarray:
        samples = _samples(piece, opened.rawmode)
        grey = np.rint((samples - black) * (255.0 / (white - black))).astype(np.uint8)
        rgb = np.repeat(grey[:, :, None], 3, axis=2)
        if isinstance(key, int):
            rgb[samples == key] = background
        return rgb

    return paint


def _samples(piece: Image.Image, rawmode: str) -> np.ndarray:
    """Return the samples of a piece, float64 [h, w]."""
    samples = np.asarray(piece)
    if rawmode == "I;32N":  # unsigned, but Pillow keeps them as signed
        samples = samples.view(np.uint32)
    return samples.astype(np.float64)


def _range(opened: OpenedImage) -> tuple[float, float]:
    """Return the samples that mean black and white.

    The type of the samples fixes them, or else the smallest usual full scale that holds all samples, or else they are
    the darkest and the lightest sample.
    """
    image, rawmode = opened.image, opened.rawmode
    if image.mode.startswith("I;16"):
        return 0.0, 4095.0 if rawmode == "I;12" else 65535.0
    extremes = [
        (piece.min(), piece.max()) for piece in (_samples(image.crop(box), rawmode) for box in _boxes(image.size))
    ]
    low, high = (float(edge) for edge in (np.min(extremes), np.max(extremes)))
    if not np.isfinite((low, high)).all():
        raise ValueError("some samples are not numbers")
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (32767.0,) if "16" in rawmode else (255.0, 65535.0)
    full = next((value for value in usual if high <= value), None)
    return (0.0, full) if low >= 0 and full is not None else (low, max(high, low + 1.0))


class _QuietWarnings:
    """A context in which Pillow is strict and gives no warnings, as long as any thread decodes.

    `warnings.catch_warnings` alone is unsafe here: two threads that overlap restore each other's filters. Another
    library may have set Pillow to accept incomplete pictures: that is switched off meanwhile, and restored.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._saved = warnings.catch_warnings()
        self._lenient = False

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")
                self._lenient = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._saved.__exit__(None, None, None)
                ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES or self._lenient


quiet = _QuietWarnings()
