"""Thousands of damaged files: each gives a picture within the limits or one error; no crash, no hang, bounded memory.

Run as a program (`python -m tests.test_decoder_mutations SEED COUNT [FOLDER]`) it decodes that many in a process
of limited memory, so that a crash or a blow-up is seen from outside.
"""

from __future__ import annotations

import faulthandler
import io
import json
import random
import resource
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_classifier.errors import UnreadableImage
from image_classifier.images import DecodeLimits, Preprocess, inspect, read_header

LIMITS = DecodeLimits(max_bytes=2**20, max_pixels=2_000_000)
BYTES_A_PIXEL = 20  # what DecodeLimits promises
SLACK = 96 * 2**20  # a PNG's texts (64 MiB at most), allocator, files
SECONDS_A_FILE = 5  # a damaged run-length BMP of 2 megapixels takes one; an ordinary file a millisecond
INTERESTING = (0, 1, 2, 7, 8, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def picture(size: tuple[int, int] = (41, 30)) -> Image.Image:
    """Smooth colours and some noise, as a photograph has."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7 + y / 11), np.cos(x / 5), np.sin(y / 4 - x / 9)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 6, waves.shape)
    return Image.fromarray(np.clip(127 + 110 * waves + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, format_, **options)  # Pillow leaves an encoder's options on what it saved
    return buffer.getvalue()


def run_length_bmp(width: int = 16, height: int = 8) -> bytes:
    """Pillow writes none: 8-bit runs, a palette of 4 colours."""
    rows = b"".join(bytes([width - 2, y % 4, 0, 3, 1, 2, 3, 0, 0, 0])[: 2 + 8] for y in range(height)) + b"\0\1"
    palette = bytes([0, 0, 0, 0, 0, 0, 255, 0, 0, 255, 0, 0, 255, 0, 0, 0])
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 4, 4)
    return b"BM" + struct.pack("<IHHI", 70 + len(rows), 0, 0, 70) + header + palette + rows


def whole_files() -> dict[str, bytes]:
    """One small file of every kind that Pillow writes."""
    rgb = picture()
    grey, palette, alpha = rgb.convert("L"), rgb.quantize(16), rgb.copy()
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    real = Image.fromarray(np.asarray(grey).astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames: dict[str, object] = {"save_all": True, "append_images": [grey.convert("RGB")]}
    files = {
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg-444-exif": encoded(rgb, "JPEG", subsampling=0, exif=exif),
        "jpeg-progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg-grey": encoded(grey, "JPEG"),
        "jpeg-cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "jpeg-restarts": encoded(rgb, "JPEG", restart_marker_blocks=3),
        "mpo": encoded(rgb, "MPO", save_all=True, append_images=[rgb]),
        "png": encoded(rgb, "PNG", exif=exif),
        "png-alpha": encoded(alpha, "PNG"),
        "png-palette": encoded(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "png-16": encoded(deep, "PNG", transparency=257),
        "png-1": encoded(rgb.convert("1"), "PNG"),
        "apng": encoded(rgb, "PNG", **frames),
        "webp": encoded(rgb, "WEBP", exif=exif),
        "webp-lossless": encoded(alpha, "WEBP", lossless=True),
        "webp-animated": encoded(rgb, "WEBP", **frames),
        "gif": encoded(palette, "GIF", transparency=3),
        "gif-animated": encoded(palette, "GIF", **frames),
        "bmp": encoded(rgb, "BMP"),
        "bmp-palette": encoded(palette, "BMP"),
        "bmp-runs": run_length_bmp(),
        "tiff-float": encoded(real, "TIFF", compression="tiff_lzw"),
        "tiff-16": encoded(deep, "TIFF"),
        "tiff-fax": encoded(rgb.convert("1"), "TIFF", compression="group4"),
        "tiff-pages": encoded(rgb, "TIFF", **frames),
    }
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"tiff-{compression}"] = encoded(rgb, "TIFF", compression=compression, exif=exif)
    return files


def mutated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to three injuries: flipped bits, wrong numbers, cuts, holes, repeats, a piece of another file."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = int(len(data) * rng.random() ** rng.choice((1, 3)))  # headers more often
        length = rng.randint(1, max(1, len(data) // 16))
        kind = rng.choice((0, 0, 0, 0, 1, 2, 3, 4, 5, 6))
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(INTERESTING))
        elif kind == 2:
            data[place : place + 2] = struct.pack(rng.choice("<>") + "H", rng.choice(INTERESTING) & 0xFFFF)
        elif kind == 3:
            del data[rng.choice((place, -length)) :]
        elif kind == 4:
            del data[place : place + length]
        elif kind == 5:
            data[place:place] = data[place : place + length]
        else:
            start = rng.randrange(len(other))
            data[place : place + length] = other[start : start + length]
    return bytes(data)


def attempt(content: bytes, at_least: tuple[int, int] | None) -> bool:
    """Whether it decodes; fails where the answer is anything but a picture within the limits or one line."""
    refusal: UnreadableImage | None = None
    try:
        header, pixels = inspect(content, LIMITS, at_least=at_least)
    except UnreadableImage as error:
        refusal = error
    if refusal is not None:
        assert "\n" not in str(refusal)
        assert not isinstance(refusal.__cause__, MemoryError)
        return False
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert header.width * header.height <= LIMITS.max_pixels
    if at_least is None:
        assert pixels.shape[:2] == (header.height, header.width)
    assert read_header(content, LIMITS) == header
    assert Preprocess(8, "pad", scaled_decoding=True).read(content, LIMITS).shape == (8, 8, 3)
    return True


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(whole_files().items())),
    st.sampled_from(sorted(whole_files().values())),
    st.integers(0, 2**32),
)
def test_a_damaged_file_is_a_picture_or_the_one_error(file, other, seed):
    attempt(mutated(file[1], other, random.Random(seed)), (8, 8) if seed % 2 else None)


@pytest.mark.parametrize("name", sorted(whole_files()))
def test_a_file_cut_anywhere_is_refused_or_loses_no_pixel(name):
    content = whole_files()[name]
    whole = inspect(content)[1]
    for end in {*range(1, len(content), max(1, len(content) // 60)), *range(len(content) - 30, len(content))}:
        try:
            _, pixels = inspect(content[:end])
        except UnreadableImage:
            continue
        np.testing.assert_array_equal(pixels, whole, err_msg=f"cut at {end} of {len(content)}")


def run_in_limited_memory(seed: int, count: int, folder: Path | None) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "tests.test_decoder_mutations",
        str(seed),
        str(count),
        *([str(folder)] if folder else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout)


def check(result: dict[str, float], count: int) -> None:
    assert result["decoded"] + result["refused"] == count
    assert min(result["decoded"], result["refused"]) > count / 20
    assert result["slowest_s"] < SECONDS_A_FILE, result
    assert result["grown_bytes"] < BYTES_A_PIXEL * LIMITS.max_pixels + SLACK, result


@pytest.mark.slow
def test_damaged_files_neither_crash_nor_hang_nor_fill_the_memory():
    check(run_in_limited_memory(seed=1, count=600, folder=None), 600)


@pytest.mark.slow
def test_thousands_of_damaged_real_files_neither_crash_nor_hang_nor_fill_the_memory(shared_data, tmp_path):
    archive = shared_data / "dirty-images.tar.gz"
    if not archive.exists():
        pytest.skip("dirty-images.tar.gz is not here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    check(run_in_limited_memory(seed=2, count=8000, folder=tmp_path), 8000)


def main(seed: int, count: int, folder: Path | None) -> None:
    """Decode `count` damaged files and print what happened as JSON."""
    faulthandler.enable()
    files = whole_files()
    if folder is not None:
        small = (path for path in sorted(folder.rglob("*")) if path.is_file() and 0 < path.stat().st_size < 64_000)
        files |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in small}
    names = sorted(files)
    for name in names:  # loads every plugin before the memory is limited
        try:
            inspect(files[name], LIMITS)
        except UnreadableImage:
            continue
    allowed = BYTES_A_PIXEL * LIMITS.max_pixels + SLACK
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + allowed, in_use + allowed))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded, slowest, slowest_name = 0, 0.0, ""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(names)
        start = time.process_time()
        try:
            decoded += attempt(mutated(files[name], files[rng.choice(names)], rng), (16, 16) if number % 2 else None)
        except BaseException:
            print(f"number {number} of seed {seed}, made of {name}", file=sys.stderr)
            raise
        if time.process_time() - start > slowest:
            slowest, slowest_name = time.process_time() - start, f"{name}, number {number}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    answer = {
        "decoded": decoded,
        "refused": count - decoded,
        "slowest_s": slowest,
        "slowest": slowest_name,
        "grown_bytes": grown,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
