"""Unpacking a .zip or a .tar, however compressed, once: nothing outside its folder, nothing half-done."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path, PurePosixPath

from image_classifier.atomic_io import sibling_directory
from image_classifier.errors import SourceError, StorageError, storage_errors
from image_classifier.sources.download import check

log = logging.getLogger(__name__)

SUFFIXES = (".tar.bz2", ".tar.gz", ".tar.xz", ".tar", ".tbz2", ".tgz", ".txz", ".zip")
_DAMAGED = (
    tarfile.ReadError,
    tarfile.HeaderError,
    zipfile.BadZipFile,
    zlib.error,
    LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
)
_PROBE_BYTES = 2**20


def is_archive(name: str) -> bool:
    """Whether a file of this name is taken for an archive."""
    return name.lower().endswith(SUFFIXES)


def stem(name: str) -> str:
    """The name of an archive without its suffix."""
    return name[: -len(next(suffix for suffix in SUFFIXES if name.lower().endswith(suffix)))]


def unpack_once(archive: Path, unpack_dir: Path, sha256: str = "") -> Path:
    """The folder `unpack_dir/<stem>-<8 hex of the archive>`, unpacked if it is not there yet, then compared with `sha256` first.

    Raises:
        SourceError: The archive is damaged, encrypted, of another sha256, or reaches outside its folder.
        StorageError: No space or no permission.
    """
    name = archive.name
    target = unpack_dir / f"{stem(name)}-{sha256[:8].lower() or _identity(archive)}"
    if target.is_dir():
        return target
    check(archive, f"sha256:{sha256}" if sha256 else "", "it is another file than data.sha256 is of")
    log.info("unpacking %s to %s", archive, target)
    with new_tree(target) as part:
        try:
            _unpack_zip(archive, part) if name.lower().endswith(".zip") else _unpack_tar(archive, part)
        except tarfile.FilterError as error:
            raise _unsafe(archive, str(error)) from error
        except (*_DAMAGED, ValueError) as error:
            raise _damaged(archive, error) from error
        except OSError as error:  # gzip's BadGzipFile is one without a number; a full disk has one and goes on as it is
            if error.errno is None:
                raise _damaged(archive, error) from error
            raise
    return target


def _identity(archive: Path) -> str:
    """8 hex of the size and both ends: a new version of the archive gets a new folder, and 10 GB are not read to find out."""
    try:
        with archive.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = hashlib.sha256(str(size).encode() + file.read(_PROBE_BYTES))
            file.seek(max(0, size - _PROBE_BYTES))
            digest.update(file.read(_PROBE_BYTES))
    except OSError as error:
        raise SourceError(
            f"cannot read the archive {str(archive)!r} ({error.strerror})", "check its permissions"
        ) from error
    return digest.hexdigest()[:8]


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive, "r:*") as tar:
        members = tar.getmembers()
        _check_space(archive, folder, sum(member.size for member in members))
        tar.extractall(folder, members, filter="data")


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as bundle:
        members = bundle.infolist()
        _check_space(archive, folder, sum(member.file_size for member in members))
        for member in members:
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in path.parts[:1]:
                raise _unsafe(archive, f"{member.filename!r} is outside its folder")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise _unsafe(archive, f"{member.filename!r} is a link")
            bundle.extract(member, folder)


def _check_space(archive: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        fact = f"{str(archive)!r} unpacks to {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
        raise StorageError(fact, "free some space, or unpack it elsewhere and pass data.dir=FOLDER")


def _damaged(archive: Path, error: Exception) -> SourceError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return SourceError(
        f"cannot unpack {str(archive)!r} ({reason})", "the archive is damaged or encrypted: get it again"
    )


def _unsafe(archive: Path, reason: str) -> SourceError:
    return SourceError(f"refused to unpack {str(archive)!r} ({reason})", "unpack it yourself and pass data.dir=FOLDER")


@contextmanager
def new_tree(path: Path) -> Iterator[Path]:
    """A folder of many small files that appears at `path` whole or not at all; StorageError where the disk refuses.

    One sync for all of it: `files.whole_directory` flushes file by file, 25 s for CIFAR-10's 50 000.
    """
    with storage_errors(path), sibling_directory(path) as part:
        yield part
        if hasattr(os, "sync"):
            os.sync()
        _take_place(part, path)


def _take_place(part: Path, path: Path) -> None:
    try:
        os.rename(part, path)
    except OSError:
        if not path.is_dir():
            raise  # else another run was faster, and made the same
