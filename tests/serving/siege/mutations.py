"""Images as attackers send them: mutated real ones, and files that are two formats at once. Send many to a server:

python -m tests.serving.siege.mutations BUNDLE [COUNT] [SEED]
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.serving.siege.attackers import Victim, exchange, form, head, victim

_CLIENTS = 8
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def seeds() -> list[bytes]:
    """Small pictures of all formats, modes and kinds."""
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (24, 32, 4), dtype=np.uint8)
    found = []
    for kind in _FORMATS:
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1"):
            buffer = io.BytesIO()
            try:
                image = Image.fromarray(pixels).convert(mode)
                options = (
                    {"save_all": True, "append_images": [image] * 3}
                    if kind in ("GIF", "WEBP", "TIFF") and mode == "P"
                    else {}
                )
                image.save(buffer, kind, **options)
            except (OSError, ValueError):
                continue
            found.append(buffer.getvalue())
    for options in (
        {"progressive": True},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
        {"quality": 1},
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., :3]).save(buffer, "JPEG", **options)
        found.append(buffer.getvalue())
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., :3]).save(buffer, "TIFF", compression=compression)
        found.append(buffer.getvalue())
    return found


def _flip(content: bytearray, chance: random.Random, other: bytes) -> None:
    for _ in range(chance.randint(1, 20)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def _cut(content: bytearray, chance: random.Random, other: bytes) -> None:
    del content[chance.randrange(len(content)) :]


def _splice(content: bytearray, chance: random.Random, other: bytes) -> None:
    place = chance.randrange(len(content))
    start = chance.randrange(len(other))
    content[place : place + chance.randrange(64)] = other[start : start + chance.randrange(256)]


def _extremes(content: bytearray, chance: random.Random, other: bytes) -> None:
    """Numbers of the head become the smallest and largest there are."""
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(min(len(content), 128))
        value = chance.choice(
            [
                b"\0\0\0\0",
                b"\xff\xff\xff\xff",
                b"\x7f\xff\xff\xff",
                b"\xff\xff\xff\x7f",
                b"\x80\0\0\0",
                b"\xff\xff",
                b"\0\0",
                b"\x01",
            ]
        )
        content[place : place + len(value)] = value


def _shuffle(content: bytearray, chance: random.Random, other: bytes) -> None:
    first, second = sorted(chance.randrange(len(content)) for _ in range(2))
    content[first:second] = content[first:second][::-1]


def _repeat(content: bytearray, chance: random.Random, other: bytes) -> None:
    place = chance.randrange(len(content))
    content[place:place] = content[place : place + chance.randint(1, 64)] * chance.randint(1, 50)


_MUTATIONS: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (
    _flip,
    _cut,
    _splice,
    _extremes,
    _shuffle,
    _repeat,
)


def mutated(count: int, seed: int = 0) -> Iterator[bytes]:
    chance, originals = random.Random(seed), seeds()
    for _ in range(count):
        content = bytearray(chance.choice(originals))
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            if content:
                chance.choice(_MUTATIONS)(content, chance, chance.choice(originals))
        yield bytes(content)


def png(width: int, height: int, bits: int = 1, rows: bytes | None = None) -> bytes:
    """A PNG that says it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    data = zlib.compress(bytes((width * bits + 15) // 8) * height, 9) if rows is None else rows
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def oddities(image: bytes) -> dict[str, bytes]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("bomb.bin", bytes(2**22))
    jpeg, gif = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    Image.new("P", (8, 8)).save(gif, "GIF")
    return {
        "bomb of 169 megapixels": png(13_000, 13_000),
        "bomb of lies": png(2**31 - 1, 2**31 - 1, rows=b""),
        "no pixels": png(0, 0, rows=zlib.compress(b"")),
        "many of one row": png(50_000_000, 1),
        "JPEG with a ZIP behind it": jpeg.getvalue() + archive.getvalue(),
        "ZIP with a PNG behind it": archive.getvalue() + image,
        "GIF and JavaScript": b"GIF89a/*" + gif.getvalue()[8:] + b"*/=1;alert(1)",
        "PNG with HTML behind it": image + b"<script>alert(1)</script>",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><image href="file:///etc/passwd"/></svg>',
        "XXE": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><svg>&b;</svg>',
        "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj\n"
        b"trailer<</Root 1 0 R>>",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "MVG": b"push graphic-context\nfill 'url(https://example.com/\"|ls \"-la)'\npop graphic-context",
        "pickle": b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94"
        b"\x8c\x04exit\x94\x85\x94R\x94.",
        "HTML": b"<html><script>alert(1)</script></html>",
        "nothing": b"",
        "zeros": bytes(100_000),
    }


def answered(found: Victim, images: list[bytes]) -> Counter[int]:
    """The statuses of these images, asked about eight at a time; each answer is one of ours."""

    async def scenario() -> Counter[int]:
        statuses: Counter[int] = Counter()
        waiting = iter(images)

        async def one() -> None:
            for image in waiting:
                body = form(image)
                status, content = await exchange(
                    found.port, head("POST", "/predict", body, more=b"Connection: close\r\n") + body
                )
                statuses[status] += 1
                assert status in (200, 413, 415, 422), (status, content, image)
                (prediction,) = json.loads(content)["predictions"]
                assert ("error" in prediction) == (status == 422)

        await asyncio.gather(*(one() for _ in range(_CLIENTS)))
        return statuses

    return asyncio.run(scenario())


def main(bundle: Path, count: int = 10_000, seed: int = 0) -> None:
    """What a server says to so many."""
    with tempfile.TemporaryDirectory() as folder, victim(Path(folder), bundle) as found:
        answered(found, list(mutated(500, seed + 1)))  # what is loaded once is loaded
        step = max(1, count // 10)
        images = list(mutated(count, seed))
        for start in range(0, count, step):
            statuses = answered(found, images[start : start + step])
            server, model = found.memory()
            print(
                f"{min(count, start + step)} images: {dict(statuses)}; server {server:.1f} MiB, model {model:.1f} MiB",
                flush=True,
            )
        print(f"restarts of the model's process: {found.gauge('restarts'):.0f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
