"""What comes on standard input, told by its first bytes: an image, an archive, or a list of which each line counts as soon as it is there."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import IO

from image_classifier.errors import DataError
from image_classifier.sources.archive import is_archive

HEAD = 512  # bytes that tell what something is
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_NEVER_TEXT = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b"})


def read_head(stdin: IO[bytes]) -> bytes:
    """The first bytes: no more than it takes to tell, as whoever writes a list may wait for an answer."""
    head = b""
    while len(head) < HEAD and not (b"\n" in head and is_text(head)):
        block = _some(stdin, HEAD - len(head))
        if not block:
            break
        head += block
    return head


def is_picture(head: bytes) -> bool:
    """Whether content that begins so is taken for an image."""
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    return head.startswith(_PICTURES) or bitmap or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def is_text(head: bytes) -> bool:
    """Whether content that begins so may be a list; file names are of any encoding, but of no such bytes."""
    return not (is_picture(head) or is_archive(head) or head.translate(None, _NEVER_TEXT) != head)


def lines(head: bytes, rest: IO[bytes]) -> Iterator[str]:
    """The lines that are not empty of a list whose first bytes were read; DataError where it is none."""
    for line in io.BufferedReader(_Rejoined(head, rest)):
        if b"\0" in line or not is_text(head):
            raise DataError(
                "standard input is no image, no archive and no list",
                "pipe one of them; a list has one path or address a line",
            )
        if name := os.fsdecode(line.rstrip(b"\r\n")):
            yield name


class _Rejoined(io.RawIOBase):
    """A stream with what was read of it put back."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self.head, self.rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        block, self.head = self.head[: len(buffer)] or _some(self.rest, len(buffer)), self.head[len(buffer) :]
        buffer[: len(block)] = block
        return len(block)


def _some(stdin: IO[bytes], most: int) -> bytes:
    """What is there, as soon as there is something."""
    read: bytes = getattr(stdin, "read1", stdin.read)(most)
    return read
