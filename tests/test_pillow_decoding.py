"""What Pillow leaves to be done, format by format."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from image_classifier.errors import UnreadableImage
from image_classifier.images import DecodeLimits, decode, inspect, read_header

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, format_, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, bits: int, colour: int, row: bytes, transparent: bytes | None = None, *before: bytes) -> bytes:
    """One row of samples as they are given."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(before)
        + key
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def tiff(
    bits: int, data: bytes, width: int = 2, photometric: int = 1, sample_format: int = 1, *more: tuple[int, int]
) -> bytes:
    """One uncompressed row of grey samples as they are given."""
    tags = [
        (256, width),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (278, 1),
        (279, len(data)),
        *more,
        (339, sample_format),
    ]
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(4, 2, 0, bytes([0b00011011]), b"\0\1"), [0, 9, 170, 255]),
        (png(2, 4, 0, bytes([0x1F]), b"\0\x0f"), [17, 9]),
        (png(8, 1, 0, bytes([0b01010101]), b"\0\1"), [0, 9] * 4),
        (png(2, 16, 0, b"\x12\x34\xff\xff", b"\x12\x34"), [9, 255]),
        (png(2, 16, 2, b"\x12\x34" * 3 + b"\xff\xff" * 3, b"\x12\x34" * 3), [9, 255]),
        (png(2, 16, 4, b"\xff\xff\xff\xff\x12\x34\0\0"), [255, 9]),
    ],
    ids=["2 bits", "4 bits", "1 bit", "16 bits", "16 bits RGB", "16 bits with alpha"],
)
def test_a_transparent_colour_is_found_at_every_depth(content, expected):
    assert decode(content, background=(9, 9, 9))[0, :, 0].tolist() == expected
    assert read_header(content).transparent


@pytest.mark.parametrize(
    ("content", "expected", "bits"),
    [
        (tiff(12, b"\xff\xf8\x00"), [255, 128], 16),
        (tiff(16, b"\xff\xff\0\0"), [255, 0], 16),
        (tiff(16, b"\xff\xff\0\0", 2, 0), [0, 255], 16),  # white is zero
        (tiff(16, struct.pack("<hh", 32767, 0), 2, 1, 2), [255, 0], 16),
        (tiff(16, struct.pack("<hh", -100, 100), 2, 1, 2), [0, 255], 16),
        (tiff(32, struct.pack("<II", 2**32 - 1, 0)), [255, 0], 32),
        (tiff(32, struct.pack("<ii", 255, 128), 2, 1, 2), [255, 128], 32),
        (tiff(32, struct.pack("<ff", 1.0, 0.0), 2, 1, 3), [255, 0], 32),
        (tiff(32, struct.pack("<ff", -1e30, 1e30), 2, 1, 3), [0, 255], 32),
    ],
)
def test_deep_greys_span_black_to_white(content, expected, bits):
    header, pixels = inspect(content)
    assert pixels[0, :, 0].tolist() == expected
    assert header.bits == bits


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 2}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_cut_and_closed_by_an_end_marker_is_refused(mode, options, cut):
    content = encoded(RGB.convert(mode), "JPEG", **options)
    start = content.rfind(b"\xff\xda") + 20
    content = content[: start + int((len(content) - start) * cut)] + b"\xff\xd9"
    for at_least in (None, (8, 8)):
        with pytest.raises(UnreadableImage, match="ends early"):
            decode(content, at_least=at_least)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
@pytest.mark.parametrize("colour", [("RGB", (128, 128, 128)), ("L", 128), ("CMYK", (127, 127, 127, 127))], ids=str)
def test_a_picture_that_is_truly_grey_is_read(colour, options):
    content = encoded(Image.new(colour[0], (70, 50), colour[1]), "JPEG", **options)
    for at_least in (None, (8, 8)):
        assert abs(decode(content, at_least=at_least).astype(int) - 128).max() <= 64


def test_pillow_told_to_be_lenient_is_strict_here_and_lenient_after(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for format_ in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        content = encoded(RGB, format_)
        with pytest.raises(UnreadableImage):
            decode(content[: len(content) * 2 // 3])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_an_end_marker_that_is_missing_is_a_cut():
    jpeg, whole = encoded(RGB, "JPEG"), encoded(RGB, "PNG")
    for content in (jpeg[:-2], whole[:-12]):
        with pytest.raises(UnreadableImage, match="truncated"):
            decode(content)


@pytest.mark.parametrize(
    ("format_", "options", "frames"),
    [("GIF", {}, 3), ("PNG", {}, 3), ("WEBP", {}, 3), ("TIFF", {}, 3), ("MPO", {}, 3), ("JPEG", {}, 1), ("BMP", {}, 1)],
)
def test_the_header_counts_the_pictures(format_, options, frames):
    others = [RGB.rotate(angle) for angle in (90, 180)]
    content = encoded(RGB, format_, **({"save_all": True, "append_images": others} if frames > 1 else {}))
    header = read_header(content)
    assert header.frames == frames
    assert header.format == ("JPEG" if format_ == "MPO" else format_)
    assert inspect(content)[0] == header


def test_an_orientation_behind_the_pixels_of_a_png_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(RGB, "PNG")
    late = content[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + content[-12:]
    assert (read_header(late).orientation, decode(late).shape) == (6, (56, 40, 3))


def test_a_picture_in_pieces_is_the_picture():
    """Wider, taller and larger than one piece, upright and turned, against Pillow's own conversion."""
    for size in ((700, 600), (300_000, 1), (1, 300_000)):
        pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
        image = Image.fromarray(pixels)
        expected = np.asarray(Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB"))
        for orientation, turned in ((1, expected), (6, np.rot90(expected, -1))):
            exif = Image.Exif()
            exif[0x0112] = orientation
            np.testing.assert_array_equal(decode(encoded(image, "PNG", exif=exif, compress_level=1)), turned)


def webp_claiming(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def run_length_bmp(width: int, height: int) -> bytes:
    rows = b"\1\1\0\0" * height
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 2, 2)
    return b"BM" + struct.pack("<IHHI", 62 + len(rows), 0, 0, 62) + header + b"\0\0\0\0\0\0\xff\0" + rows


def many_scans() -> bytes:
    content = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    last = content.rfind(b"\xff\xda")
    return content[:-2] + content[last:-2] * 200 + content[-2:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (webp_claiming(12_000, 12_000), "allowed"),
        (tiff(8, b"\0\0", 2, 1, 1, (322, 20_000), (323, 20_000)), "allowed"),
        (run_length_bmp(3000, 3000), "run-length"),
        (many_scans(), "scans"),
        (b"\xff\xd8\xff\xfe\0\2" + b"\xff" * 600_000, "too many pieces"),
    ],
    ids=["canvas", "tile", "runs", "scans", "parts"],
)
def test_a_small_file_that_asks_for_much_is_refused_at_once(content, reason):
    for read in (decode, read_header):
        with pytest.raises(UnreadableImage, match=reason):
            read(content)


def test_a_motion_photo_s_film_holds_no_scans():
    assert decode(encoded(RGB, "JPEG") + b"\xff\xda\0\x0c" * 500).shape == (40, 56, 3)


MEASURE = """
import resource, sys
from pathlib import Path
from image_classifier.images import decode
small, large = (Path(name).read_bytes() for name in sys.argv[1:])
decode(small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
height, width, _ = decode(large).shape
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (width * height))
"""
LARGE = {
    "RGB.jpg": {},
    "RGB.turned.jpg": {},
    "CMYK.jpg": {"progressive": True},
    "RGBA.png": {"compress_level": 1},
    "P.png": {"compress_level": 1, "transparency": bytes(range(256))},
    "I;16.png": {"compress_level": 1},
    "F.tif": {"compression": "tiff_lzw"},
    "RGB.webp": {"method": 0, "quality": 30},
    "P.gif": {},
    "RGB.bmp": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_decoding_takes_no_more_memory_than_stated(name, tmp_path):
    mode = name.split(".")[0]
    for stem, side in (("small", 16), ("large", 3000)):
        grey = Image.linear_gradient("L").resize((side, side))
        deep = {"I;16": np.uint16, "F": np.float32}.get(mode)
        image = grey.convert(mode) if deep is None else Image.fromarray(np.asarray(grey).astype(deep) * deep(100))
        exif = Image.Exif()
        exif[0x0112] = 6 if "turned" in name else 1
        image.save(tmp_path / f"{stem}.{name}", exif=exif, **LARGE[name])
    files = [str(tmp_path / f"{stem}.{name}") for stem in ("small", "large")]
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, cwd=root, check=True)
    assert float(done.stdout) < 20, DecodeLimits.__doc__
