"""Standard input: an image, an archive or a list, recognised by its first bytes.

Each line of a list is used as soon as it has arrived.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import IO

from image_classifier.errors import DataError
from image_classifier.sources.archive import is_archive

HEAD = 512  # bytes that show what something is
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_NEVER_TEXT = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b"})


def read_head(stdin: IO[bytes]) -> bytes:
    """Return the first bytes, as few as needed: the writer of a list may wait for an answer before it goes on."""
    head = b""
    while len(head) < HEAD and not (b"\n" in head and is_text(head)):
        block = _some(stdin, HEAD - len(head))
        if not block:
            break
        head += block
    return head


def is_picture(head: bytes) -> bool:
    """Return whether content that begins with these bytes is taken for an image.

    >>> is_picture(b"GIF89a"), is_picture(b"GIFs/1.png")
    (True, False)
    """
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    return head.startswith(_PICTURES) or bitmap or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def is_text(head: bytes) -> bool:
    """Return whether content that begins with these bytes may be a list; file names may have any encoding."""
    return not (is_picture(head) or is_archive(head) or head.translate(None, _NEVER_TEXT) != head)


def lines(head: bytes, rest: IO[bytes]) -> Iterator[str]:
    """Yield the non-empty lines of a list whose first bytes were read; DataError if it is not a list."""
    for line in io.BufferedReader(_Rejoined(head, rest)):
        if b"\0" in line or not is_text(head):
            raise DataError(
                "standard input is not an image, an archive or a list",
                "pipe one of them; a list has one path or address per line",
            )
        if name := os.fsdecode(line.rstrip(b"\r\n")):
            yield name


class _Rejoined(io.RawIOBase):
    """A stream that begins with bytes that were read from it before."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self.head, self.rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        block, self.head = self.head[: len(buffer)] or _some(self.rest, len(buffer)), self.head[len(buffer) :]
        buffer[: len(block)] = block
        return len(block)


def _some(stdin: IO[bytes], limit: int) -> bytes:
    """Return what has arrived, as soon as there is something."""
    read: bytes = getattr(stdin, "read1", stdin.read)(limit)
    return read
