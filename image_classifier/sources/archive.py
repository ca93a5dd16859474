"""The images in an archive, one after the other: nothing is written, nothing is unpacked that is not asked for, and a bomb is refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import IO, Any, cast

from image_classifier.errors import ConfigError, SourceError
from image_classifier.images import is_image_name
from image_classifier.sources.image_source import ImageSource
from image_classifier.text import printable

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)
_ZIP, _ZSTD, _GZIP, _BZ2, _XZ = b"PK", b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"BZh", b"\xfd7zXZ"
_HEADERS = 2**20  # bytes that may lie between two members of a tar: long names
_FREE = 2**28  # bytes that any archive may unpack to, however small it is
_DIRECTORY_ENTRY = 128  # bytes of a zip's table of contents for each member allowed


@dataclass(frozen=True)
class ArchiveLimits:
    """What one archive may hold; a single image has the limit of all images.

    Args:
        max_members: Files and folders in it.
        max_bytes: All of them unpacked.
        max_ratio: How many times its own size it may unpack to, above 256 MiB.

    Raises:
        ConfigError: A value that cannot be.
    """

    max_members: int = 1_000_000
    max_bytes: int = 2**37
    max_ratio: float = 100.0

    def __post_init__(self) -> None:
        if min(self.max_members, self.max_bytes, self.max_ratio) < 1:
            raise ConfigError("archive.max_members, archive.max_bytes and archive.max_ratio must be at least 1")


def is_archive_name(name: str) -> bool:
    """Whether a file of this name is taken for an archive."""
    return name.lower().endswith(SUFFIXES)


def is_archive(head: bytes) -> bool:
    """Whether content that begins with these bytes (262 will do) is an archive."""
    bz2_block = head.startswith(_BZ2) and head[4:10] == b"1AY&SY"  # the three letters alone may be those of a name
    return bz2_block or head.startswith((b"PK\x03\x04", b"PK\x05\x06", _ZSTD, _GZIP, _XZ)) or head[257:262] == b"ustar"


def members(file: IO[bytes], name: str, limits: ArchiveLimits, max_image_bytes: int) -> Iterator[ImageSource]:
    """The images of an archive, named `name/member`, in its order; where it is damaged or beyond its limits a last Item says so."""
    count = 0
    try:
        for item in _members(file, name, limits, max_image_bytes):
            count += 1
            yield item
    except SourceError as error:
        yield ImageSource.missing(name, error.fact)
        return
    except MemoryError:  # an xz may ask for gigabytes
        yield ImageSource.missing(name, "unpacking it takes more memory than there is")
        return
    except _DAMAGED as error:
        yield ImageSource.missing(name, f"the archive is damaged ({_reason(error)})")
        return
    if not count:
        yield ImageSource.missing(name, "the archive holds no image")


def _reason(error: BaseException) -> str:
    return printable(" ".join(str(error).split()))[:100] or type(error).__name__


def _members(file: IO[bytes], name: str, limits: ArchiveLimits, max_image_bytes: int) -> Iterator[ImageSource]:
    budget = _Budget(limits, os.fstat(file.fileno()).st_size)
    head = file.read(6)
    file.seek(0)
    if head.startswith(_ZIP):
        return _of_zip(file, name, budget, max_image_bytes)
    return _of_tar(_unpacked(file, head), name, budget, max_image_bytes)


@dataclass
class _Budget:
    """How much of what an archive may hold is used up."""

    limits: ArchiveLimits
    size: int
    members: int = 0
    unpacked: int = 0

    def take(self, size: int) -> None:
        """Count a member; SourceError where that is too much."""
        self.members += 1
        self.unpacked += size
        if self.members > self.limits.max_members:
            raise SourceError(
                f"the archive holds more than {self.limits.max_members:,} members, which archive.max_members allows"
            )
        if self.unpacked > self.limits.max_bytes:
            raise SourceError(
                f"the archive unpacks to more than {self.limits.max_bytes:,} bytes, which archive.max_bytes allows"
            )
        if self.unpacked > max(_FREE, self.limits.max_ratio * self.size):
            raise SourceError(
                f"the archive unpacks to more than {self.limits.max_ratio:g} times its size, which archive.max_ratio allows"
            )


def _wanted(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return (
        bool(parts)
        and is_image_name(parts[-1])
        and not any(part.startswith(".") and part not in (".", "..") for part in parts)
    )


def _of_zip(file: IO[bytes], name: str, budget: _Budget, max_image_bytes: int) -> Iterator[ImageSource]:
    _check_directory(file, budget.limits)
    with zipfile.ZipFile(file) as bundle:
        for member in bundle.infolist():
            budget.take(member.file_size)
            if not _wanted(member.filename) or member.is_dir():
                continue
            full = f"{name}/{member.filename}"
            if member.file_size > max_image_bytes:
                yield ImageSource.missing(full, f"larger than {max_image_bytes / 2**20:.0f} MiB")
                continue
            if member.flag_bits & 1:
                yield ImageSource.missing(full, "encrypted")
                continue
            try:
                with bundle.open(member) as opened:
                    yield ImageSource(full, opened.read(max_image_bytes + 1))
            except (*_DAMAGED, MemoryError) as error:  # of one member: cut, of another sum; the next one may be whole
                yield ImageSource.missing(full, f"cannot be unpacked ({_reason(error)})")


def _check_directory(file: IO[bytes], limits: ArchiveLimits) -> None:
    """Refuse a zip whose table of contents, which is read as a whole, would fill the memory."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 70_000))
    tail = file.read()
    at, at64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    directory = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    if directory == 0xFFFFFFFF and at64 >= 0:
        directory = int.from_bytes(tail[at64 + 40 : at64 + 48], "little")
    if directory > _DIRECTORY_ENTRY * limits.max_members:
        raise SourceError(
            f"the archive's table of contents is too large for the {limits.max_members:,} members that archive.max_members allows"
        )
    file.seek(0)


def _of_tar(unpacked: IO[bytes], name: str, budget: _Budget, max_image_bytes: int) -> Iterator[ImageSource]:
    metered = _MeteredStream(unpacked)
    with tarfile.open(fileobj=cast(Any, metered), mode="r|") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it remembers each, and so grows
            budget.take(member.size)
            metered.left = member.size + _HEADERS
            if not member.isreg() or not _wanted(member.name):
                continue
            if member.size > max_image_bytes:
                yield ImageSource.missing(f"{name}/{member.name}", f"larger than {max_image_bytes / 2**20:.0f} MiB")
                continue
            opened = tar.extractfile(member)
            yield ImageSource(f"{name}/{member.name}", b"" if opened is None else opened.read())


class _MeteredStream:
    """Ends a tar that goes on for longer than its headers say: a name of gigabytes, say."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.left = file, _HEADERS

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise SourceError("the archive holds headers of an absurd size")
        return block


def _unpacked(file: IO[bytes], head: bytes) -> IO[bytes]:
    """The tar in a compressed file, read as it goes."""
    if head.startswith(_ZSTD):
        if find_spec("pyarrow") is None:
            raise SourceError("unpacking it needs a package that is not installed: pip install pyarrow")
        import pyarrow  # type: ignore[import-untyped]  # here, as it takes a fifth of a second

        return cast(IO[bytes], pyarrow.CompressedInputStream(file, "zstd"))
    if head.startswith(_GZIP):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if head.startswith(_BZ2):
        return cast(IO[bytes], bz2.BZ2File(file))
    return cast(IO[bytes], lzma.LZMAFile(file)) if head.startswith(_XZ) else file
