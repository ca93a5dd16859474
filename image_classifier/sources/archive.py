"""Archives (.zip, and .tar however compressed), read within limits.

`read_members` is the only reader. `images_in` takes images from it for inference and writes nothing;
`unpack.unpack_once` writes its members to a folder for training.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, cast

from image_classifier.errors import ConfigError, SourceError
from image_classifier.extras import install
from image_classifier.images import is_image_name
from image_classifier.sources.folders import is_visible_path
from image_classifier.sources.image_source import ImageSource
from image_classifier.sources.suffixes import ARCHIVE_SUFFIXES
from image_classifier.text import printable

DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)
_ZIP, _ZSTD, _GZIP, _BZ2, _XZ = b"PK", b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"BZh", b"\xfd7zXZ"
_HEADER_BYTES = 2**20  # bytes that may lie between two members of a tar: long names
_FREE_BYTES = 2**28  # bytes that any archive may unpack to, however small it is
_DIRECTORY_ENTRY = 128  # bytes of a zip's table of contents for each member allowed


@dataclass(frozen=True)
class ArchiveLimits:
    """Limits of one archive that inference reads; a single image has the limit of all images.

    Args:
        max_members: Files and folders in it.
        max_bytes: Size of all of them, unpacked.
        max_ratio: Unpacked size as a multiple of the archive's, where that is above 256 MiB.

    Raises:
        ConfigError: A limit below 1.
    """

    key: ClassVar[str] = "archive"
    max_members: int = 1_000_000
    max_bytes: int = 2**37
    max_ratio: float = 100.0

    def __post_init__(self) -> None:
        if min(self.max_members, self.max_bytes, self.max_ratio) < 1:
            names = " and ".join(f"{self.key}.{name}" for name in ("max_members", "max_bytes", "max_ratio"))
            raise ConfigError(f"{names} must be at least 1")


@dataclass(frozen=True)
class UnpackLimits(ArchiveLimits):
    """Limits of an archive that is unpacked for training, wide enough for the largest public data sets."""

    key: ClassVar[str] = "data.unpack"
    max_members: int = 20_000_000
    max_bytes: int = 2**41
    max_ratio: float = 1000.0


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an archive; it can be read until the next one is asked for.

    Args:
        name: Path inside the archive, as it is written there.
        size: Unpacked, bytes.
        kind: "file", "folder", "link" or "other".
        encrypted: Whether it cannot be read without a password.
        independent: Whether the members after it can be read where this one is damaged.
        read: Return its first bytes, at most so many.
        extract: Write it below a folder; tarfile.FilterError if it reaches outside.
    """

    name: str
    size: int
    kind: str
    encrypted: bool
    independent: bool
    read: Callable[[int], bytes]
    extract: Callable[[Path], object]


def is_archive_name(name: str) -> bool:
    """Return whether a file of this name is taken for an archive.

    >>> is_archive_name("photos.TAR.ZST"), is_archive_name("photos.png")
    (True, False)
    """
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def stem(name: str) -> str:
    """Return the name of an archive without its suffix.

    >>> stem("photos.tar.gz")
    'photos'
    """
    return name[: -len(next(suffix for suffix in ARCHIVE_SUFFIXES if name.lower().endswith(suffix)))]


def is_archive(head: bytes) -> bool:
    """Return whether content that begins with these bytes (262 are enough) is an archive.

    >>> is_archive(bytes([80, 75, 3, 4])), is_archive(b"GIF89a")
    (True, False)
    """
    bz2_block = head.startswith(_BZ2) and head[4:10] == b"1AY&SY"  # "BZh" alone may begin a name
    return bz2_block or head.startswith((b"PK\x03\x04", b"PK\x05\x06", _ZSTD, _GZIP, _XZ)) or head[257:262] == b"ustar"


def images_in(file: IO[bytes], name: str, limits: ArchiveLimits, max_image_bytes: int) -> Iterator[ImageSource]:
    """Yield the images of an archive in its order, named `name/member`.

    An archive that is damaged, exceeds its limits or holds no image ends with an unreadable image that says why.
    """
    count = 0
    try:
        for member in read_members(file, name, limits):
            if member.kind == "file" and _is_image(member.name):
                count += 1
                yield _image(member, f"{name}/{member.name}", max_image_bytes)
    except SourceError as error:
        yield ImageSource.missing(name, str(error))
        return
    except (*DAMAGED, OSError, MemoryError) as error:
        yield ImageSource.missing(name, damage(error))
        return
    if not count:
        yield ImageSource.missing(name, "the archive holds no image")


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return bool(parts) and is_image_name(parts[-1]) and is_visible_path(name)


def _image(member: Member, name: str, max_bytes: int) -> ImageSource:
    if member.size > max_bytes:
        return ImageSource.missing(name, f"larger than {max_bytes / 2**20:.0f} MiB")
    if member.encrypted:
        return ImageSource.missing(name, "encrypted")
    try:
        return ImageSource(name, member.read(max_bytes + 1))
    except (*DAMAGED, OSError, MemoryError) as error:
        if not member.independent:
            raise
        return ImageSource.missing(name, f"cannot be unpacked ({reason(error)})")


def damage(error: BaseException) -> str:
    """Return what an exception of `read_members` says about the archive."""
    if isinstance(error, MemoryError):  # an xz may ask for gigabytes
        return "unpacking it takes more memory than there is"
    return f"the archive is damaged ({reason(error)})"


def reason(error: BaseException) -> str:
    """Return the message of an exception in one short line."""
    return printable(" ".join(str(error).split()))[:100] or type(error).__name__


def read_members(file: IO[bytes], name: str, limits: ArchiveLimits) -> Iterator[Member]:
    """Yield the members of an archive in its order.

    Args:
        file: The archive, opened and seekable.
        name: Its name: a .zip may begin with other bytes than those of a zip.
        limits: What it may hold.

    Raises:
        SourceError: It exceeds its limits, or a package is missing.
        MemoryError: Its compression needs more memory than there is.
        Exception: One of DAMAGED or an OSError: it is damaged or cannot be read.
    """
    file.seek(0)
    budget = _Budget(limits, os.fstat(file.fileno()).st_size)
    head = file.read(6)
    file.seek(0)
    if head.startswith(_ZIP) or name.lower().endswith(".zip"):
        return _zip_members(file, budget)
    return _tar_members(_decompressed(file, head), budget)


@dataclass
class _Budget:
    """How much of an archive's limits is used up."""

    limits: ArchiveLimits
    size: int
    members: int = 0
    unpacked: int = 0

    def take(self, size: int) -> None:
        """Count a member of so many bytes; SourceError if that exceeds a limit."""
        self.members += 1
        self.unpacked += size
        limits, key = self.limits, self.limits.key
        if self.members > limits.max_members:
            raise SourceError(f"the archive holds more than {limits.max_members:,} members", f"see {key}.max_members")
        if self.unpacked > limits.max_bytes:
            fact = f"the archive unpacks to more than {limits.max_bytes:,} bytes"
            raise SourceError(fact, f"see {key}.max_bytes")
        if self.unpacked > max(_FREE_BYTES, limits.max_ratio * self.size):
            fact = f"the archive unpacks to more than {limits.max_ratio:g} times its size"
            raise SourceError(fact, f"see {key}.max_ratio")


def _zip_members(file: IO[bytes], budget: _Budget) -> Iterator[Member]:
    _check_directory(file, budget.limits)
    with zipfile.ZipFile(file) as bundle:
        for info in bundle.infolist():
            budget.take(info.file_size)
            mode = info.external_attr >> 16
            kind = "folder" if info.is_dir() else "link" if stat.S_ISLNK(mode) else "file"
            read = partial(_read_zip_member, bundle, info)
            extract = partial(bundle.extract, info)
            yield Member(info.filename, info.file_size, kind, bool(info.flag_bits & 1), True, read, extract)


def _read_zip_member(bundle: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    with bundle.open(info) as opened:
        return opened.read(limit)


def _check_directory(file: IO[bytes], limits: ArchiveLimits) -> None:
    """Refuse a zip whose table of contents would fill the memory.

    zipfile reads it at once. Its size stands in the end records, APPNOTE.TXT 4.3.14 and 4.3.16.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 70_000))
    tail = file.read()
    end, end64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    directory = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if directory == 0xFFFFFFFF and end64 >= 0:
        directory = int.from_bytes(tail[end64 + 40 : end64 + 48], "little")
    if directory > _DIRECTORY_ENTRY * limits.max_members:
        raise SourceError(
            f"the archive's table of contents is too large for {limits.max_members:,} members",
            f"see {limits.key}.max_members",
        )
    file.seek(0)


def _tar_members(plain: IO[bytes], budget: _Budget) -> Iterator[Member]:
    metered = _MeteredStream(plain)
    with tarfile.open(fileobj=cast(Any, metered), mode="r|") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers each one and would grow
            budget.take(info.size)
            metered.left = info.size + _HEADER_BYTES
            kind = "file" if info.isreg() else "folder" if info.isdir() else "other"
            kind = "link" if info.issym() or info.islnk() else kind
            read = partial(_read_tar_member, tar, info)
            extract = partial(tar.extract, info, filter="data")
            yield Member(info.name, info.size, kind, False, False, read, extract)


def _read_tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo, limit: int) -> bytes:
    opened = tar.extractfile(info)
    return b"" if opened is None else opened.read(limit)


class _MeteredStream:
    """A tar that ends once it is longer than its headers say; a name may claim gigabytes, for example."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.left = _HEADER_BYTES

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise SourceError("the archive has headers of an absurd size")
        return block


def _decompressed(file: IO[bytes], head: bytes) -> IO[bytes]:
    """Return the tar inside a compressed file, which is decompressed as it is read."""
    if head.startswith(_ZSTD):
        if find_spec("pyarrow") is None:
            raise SourceError("unpacking it needs a package that is not installed", install("arrow"))
        import pyarrow  # type: ignore[import-untyped]  # imported here: it takes a fifth of a second

        return cast(IO[bytes], pyarrow.CompressedInputStream(file, "zstd"))
    if head.startswith(_GZIP):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if head.startswith(_BZ2):
        return cast(IO[bytes], bz2.BZ2File(file))
    return cast(IO[bytes], lzma.LZMAFile(file)) if head.startswith(_XZ) else file
