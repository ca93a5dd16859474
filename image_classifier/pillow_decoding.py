"""What Pillow leaves to be done: one opened image file, what it says of itself, and its pixels, whole and in 8-bit RGB, or an exception."""

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

MOST_PIXELS = 178_956_970  # above it Pillow itself refuses
_PIECE = 2**18  # pixels converted at a time: a conversion's temporaries are a piece's, never the picture's
# EXIF orientation -> the upright array seen as the picture is stored: what is written there comes to lie upright.
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
# What keeps a small file from costing minutes; no camera or editor comes near.
_MOST_FRAMES = 1000  # TIFF pages counted
_MOST_READS = 500_000  # of a file's parts by Pillow's parsers, half a second or so
_MOST_SCANS = 100  # of a progressive JPEG, each a pass over all pixels
_MOST_RUN_LENGTH_PIXELS = 4_000_000  # of a BMP, decoded in Python
_SCAN, _END = b"\xff\xda", b"\xff\xd9"  # JPEG markers
_SCAN_END = re.compile(
    rb"\xff[^\x00\xd0-\xd7\xff]"
)  # the first marker behind a JPEG's entropy-coded data, restarts left out
_MID_GREYS = (128, (128, 128, 128), (127, 127, 127, 127))

logging.getLogger("PIL.TiffImagePlugin").setLevel(
    logging.CRITICAL
)  # what is wrong with a file is said once, by the exception


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image of which only the header is read."""

    image: ImageFile.ImageFile
    content: bytes
    rawmode: str  # how the samples lie in the file, in Pillow's words: "L;2", "RGB;16B", "I;12" ...
    orientation: int  # EXIF, 1..8

    @property
    def format(self) -> str:
        """Pillow's name of the format; a multi-picture JPEG (MPO) is a JPEG."""
        return "JPEG" if self.image.format == "MPO" else str(self.image.format)

    @property
    def size(self) -> Size:
        """Upright width and height in pixels."""
        width, height = self.image.size  # Pillow turns a TIFF's by itself
        return (height, width) if self.orientation >= 5 and self.format != "TIFF" else (width, height)

    @property
    def mirrored(self) -> tuple[bool, bool]:
        """Whether left and right, top and bottom are stored the other way round."""
        return self.orientation in (2, 3, 6, 7), self.orientation in (3, 4, 7, 8)

    @property
    def transparent(self) -> bool:
        return self.image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in self.image.info

    @property
    def bits(self) -> int:
        """Of one sample as stored: 1, 8, 16 or 32."""
        mode = self.image.mode
        if mode in ("1", "I", "F") and "16" not in self.rawmode:
            return 1 if mode == "1" else 32
        return 16 if mode.startswith("I") or (";16" in self.rawmode and self.format in ("PNG", "TIFF")) else 8

    @property
    def frames(self) -> int:
        """Pictures in the file; those behind a damaged one are not counted, nor are a TIFF's beyond the thousandth."""
        if self.format not in ("GIF", "TIFF"):
            return min(int(getattr(self.image, "n_frames", 1)), 2**31 - 1)
        count = 1
        with (
            suppress(Exception),
            Image.open(_stream(self.content), formats=(self.format,)) as again,
        ):  # counting loses the place
            if self.format == "GIF":
                return int(again.n_frames)  # type: ignore[attr-defined]
            while count < _MOST_FRAMES:  # Pillow's own count of TIFF pages takes quadratic time
                again.seek(count)
                count += 1
        return count

    def pixels(self, background: Colour, at_least: Size | None) -> np.ndarray:
        """The whole first picture, upright: uint8 RGB [H, W, 3]; an exception where a part of it is missing."""
        self._load(at_least)
        return _painted(self.image, _painter(self, background), self._turn)

    def picture(self, background: Colour, at_least: Size | None) -> Image.Image:
        """The same as Pillow's own image, for a caller that goes on with Pillow: the commonest kind is not copied."""
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
        if self.format == "PNG" and self.content.rfind(b"IEND") < 0:  # Pillow overlooks a cut between two chunks
            raise ValueError("image file is truncated")


@contextmanager
def opened(content: bytes, formats: tuple[str, ...], check_size: Callable[[Size], None]) -> Iterator[OpenedImage]:
    """The image in `content`; `check_size` raises where a width and height are too much. Any exception can come of it."""
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
    """Refuse what takes far more time or memory than its pixels do."""
    if image.format == "TIFF":  # libtiff takes memory for a whole tile, however small the picture
        check_size((image.tag_v2.get(_TILE_WIDTH, 1), image.tag_v2.get(_TILE_LENGTH, 1)))  # type: ignore[attr-defined]
    elif image.format == "BMP":
        if image.info.get("compression") in (1, 2) and image.width * image.height > _MOST_RUN_LENGTH_PIXELS:
            raise ValueError(f"run-length coded, more than {_MOST_RUN_LENGTH_PIXELS // 10**6} megapixels")
    elif isinstance(image, JpegImagePlugin.JpegImageFile) and content.count(_SCAN) > _MOST_SCANS:
        start = _first_scan(content)  # not in a thumbnail, nor in what follows the picture
        if content.count(_SCAN, start, content.find(_END, start)) > _MOST_SCANS:
            raise ValueError(f"more than {_MOST_SCANS} scans")


class _MeteredFile(io.BytesIO):
    """Ends the parsing of millions of tiny parts, which Pillow reads one by one in Python."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MOST_READS:
            raise ValueError("too many parts")
        return super().read(size)


def _stream(content: bytes) -> io.BytesIO:
    return _MeteredFile(content) if len(content) > _MOST_READS else io.BytesIO(content)


def _first_scan(content: bytes) -> int:
    """Where a JPEG's first entropy-coded data begin."""
    header = io.BytesIO(content)
    JpegImagePlugin.JpegImageFile(header)
    return header.tell()


def _webp_canvas(content: bytes) -> Size:
    """A WebP's size from its first bytes (RFC 9649), else (1, 1): Pillow allocates the canvas as it opens the file."""
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
    """EXIF orientation 1..8; 1 where there is none or it cannot be parsed."""
    if image.format == "PNG" and not _EXIF_KEYS & image.info.keys() and any(mark in content for mark in _EXIF_MARKS):
        image.load()  # the chunk lies behind the pixels
    try:
        if image.format == "TIFF":
            value = image.tag_v2.get(ExifTags.Base.Orientation)  # type: ignore[attr-defined]
        elif _EXIF_KEYS & image.info.keys():
            value = Image.Image.getexif(image).get(
                ExifTags.Base.Orientation
            )  # a PNG's own would decode it, and hide what that raises
        else:
            return 1
    except Exception:  # damaged metadata around good pixels: the picture is as its pixels lie
        return 1
    return value if isinstance(value, int) and value in _AS_STORED else 1


def _shrink(image: ImageFile.ImageFile, at_least: Size | None) -> None:
    """Have libjpeg decode to 1/2, 1/4 or 1/8; nothing for other formats."""
    if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        image.draft(None, (max(1, at_least[0]), max(1, at_least[1])))  # no mode: the colours stay as they are


def _ends_early(opened: OpenedImage, at_least: Size | None) -> bool:
    """Whether a JPEG's data ended before its last block though an end marker follows: libjpeg paints the rest mid-grey, silently.

    Only a picture whose last pixel is mid-grey can be such a one. To tell, put more data before the marker: it changes no
    whole picture.
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
    """A loaded image, piece by piece, turned upright."""
    width, height = image.size
    if orientation == 1 and width * height <= _PIECE:
        return paint(image)
    upright = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), dtype=np.uint8)
    stored = _AS_STORED[orientation](upright)
    for left, top, right, bottom in _boxes(image.size):
        stored[top:bottom, left:right] = paint(image.crop((left, top, right, bottom)))
    return upright


def _boxes(size: Size) -> Iterator[tuple[int, int, int, int]]:
    """Pieces of at most `_PIECE` pixels: left, top, right, bottom."""
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
    _mend_transparent_colour(opened)

    def on_background(piece: Image.Image) -> np.ndarray:
        rgba = (piece.convert("LA") if piece.mode == "La" else piece).convert("RGBA")
        return np.array(Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB"))

    return on_background


def _mend_transparent_colour(opened: OpenedImage) -> None:
    """A PNG's transparent colour as 8-bit samples; Pillow leaves it as it stands in the file, and so finds no pixel of it."""
    info = opened.image.info
    key = info.get("transparency")
    if opened.rawmode in ("L;2", "L;4") and isinstance(key, int):
        info["transparency"] = key * (85 if opened.rawmode == "L;2" else 17)
    elif opened.rawmode == "RGB;16B" and isinstance(key, tuple):
        info["transparency"] = tuple(sample >> 8 for sample in key)


def _deep_painter(opened: OpenedImage, background: Colour) -> Painter:
    """Samples of more than 8 bits scaled by their depth and never clipped (`convert` clips: a white picture)."""
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
    """Float64 [h, w]."""
    samples = np.asarray(piece)
    if rawmode == "I;32N":  # unsigned, which Pillow holds as signed
        samples = samples.view(np.uint32)
    return samples.astype(np.float64)


def _range(opened: OpenedImage) -> tuple[float, float]:
    """The samples that stand for black and white.

    Those of the type where it fixes them; else the smallest customary full scale that holds all; else the darkest and lightest sample.
    """
    image, rawmode = opened.image, opened.rawmode
    if image.mode.startswith("I;16"):
        return 0.0, 4095.0 if rawmode == "I;12" else 65535.0
    extremes = [
        (piece.min(), piece.max()) for piece in (_samples(image.crop(box), rawmode) for box in _boxes(image.size))
    ]
    low, high = (float(edge) for edge in (np.min(extremes), np.max(extremes)))
    if not np.isfinite((low, high)).all():
        raise ValueError("holds samples that are not numbers")
    customary = (1.0, 255.0, 65535.0) if image.mode == "F" else (32767.0,) if "16" in rawmode else (255.0, 65535.0)
    full = next((value for value in customary if high <= value), None)
    return (0.0, full) if low >= 0 and full is not None else (low, max(high, low + 1.0))


class _QuietWarnings:
    """Pillow strict and its warnings off for as long as any thread decodes.

    `warnings.catch_warnings` alone is unsafe here: two threads that overlap restore each other's filters. Another library may have
    told Pillow to make do with half a picture: that is undone meanwhile, and restored.
    """

    def __init__(self) -> None:
        self._lock, self._depth, self._saved, self._lenient = threading.Lock(), 0, warnings.catch_warnings(), False

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")
                self._lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._saved.__exit__(None, None, None)
                ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES or self._lenient


quiet = _QuietWarnings()
