"""Unpacking an archive once: nothing outside its folder, and complete or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from image_classifier.atomic_io import sibling_directory
from image_classifier.errors import SourceError, StorageError, storage_errors
from image_classifier.sources.archive import DAMAGED, ArchiveLimits, Member, UnpackLimits, damage, read_members, stem
from image_classifier.sources.download import check

log = logging.getLogger(__name__)

_PROBE_BYTES = 2**20


def unpack_once(archive: Path, unpack_dir: Path, sha256: str = "", limits: ArchiveLimits | None = None) -> Path:
    """Return the folder `unpack_dir/<stem>-<8 hex of the archive>`, which is unpacked if it is not there.

    Args:
        archive: A file with one of `suffixes.ARCHIVE_SUFFIXES`.
        unpack_dir: Where the folder goes.
        sha256: Compared with the archive before it is unpacked, unless it is "".
        limits: What the archive may hold; None for those of `data.unpack`.

    Raises:
        SourceError: The archive is damaged, encrypted, exceeds its limits, has another sha256, or reaches outside its
            folder.
        StorageError: No space or no permission.
    """
    target = unpack_dir / f"{stem(archive.name)}-{sha256[:8].lower() or _identity(archive)}"
    if target.is_dir():
        return target
    check(archive, f"sha256:{sha256}" if sha256 else "", "it is not the file of data.sha256")
    log.info("unpacking %s to %s", archive, target)
    with new_tree(target) as folder:
        try:
            _unpack(archive, folder, limits or UnpackLimits())
        except SourceError:
            raise
        except tarfile.FilterError as error:
            raise _unsafe(archive, str(error)) from error
        except (*DAMAGED, MemoryError) as error:
            raise _damaged(archive, error) from error
        except OSError as error:
            # Damage of a .gz or .zst is one without a number; that of a full disk has one.
            if error.errno is None:
                raise _damaged(archive, error) from error
            raise
    return target


def _unpack(archive: Path, folder: Path, limits: ArchiveLimits) -> None:
    # Read all headers first: limits and free space are checked before anything is written.
    needed = sum(member.size for member in _members(archive, limits))
    _check_space(archive, folder, needed)
    for member in _members(archive, limits):
        _check_member(archive, member)
        member.extract(folder)


def _members(archive: Path, limits: ArchiveLimits) -> Iterator[Member]:
    """Yield the members; SourceError with the archive's name if a limit is exceeded."""
    try:
        with archive.open("rb") as file:
            yield from read_members(file, archive.name, limits)
    except SourceError as error:
        hint = error.hint.replace("see ", "if you trust it, raise ")
        raise SourceError(f"cannot unpack {str(archive)!r} ({error.fact})", hint) from error


def _check_member(archive: Path, member: Member) -> None:
    """Refuse a zip's links and what lies outside its folder; tarfile's filter does the same for a tar."""
    if not member.independent:
        return
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[:1]:
        raise _unsafe(archive, f"{member.name!r} is outside its folder")
    if member.kind == "link":
        raise _unsafe(archive, f"{member.name!r} is a link")


def _identity(archive: Path) -> str:
    """Return 8 hex digits of the size and both ends, so that a new version of the archive gets a new folder.

    The bytes between are not read: an archive may have 100 GB.
    """
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


def _check_space(archive: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        fact = f"{str(archive)!r} unpacks to {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
        raise StorageError(fact, "free some space, or unpack it elsewhere and pass data.dir=FOLDER")


def _damaged(archive: Path, error: BaseException) -> SourceError:
    return SourceError(f"cannot unpack {str(archive)!r}: {damage(error)}", "it is damaged or encrypted: get it again")


def _unsafe(archive: Path, reason: str) -> SourceError:
    return SourceError(f"refused to unpack {str(archive)!r} ({reason})", "unpack it yourself and pass data.dir=FOLDER")


@contextmanager
def new_tree(path: Path) -> Iterator[Path]:
    """Yield a folder for many small files that appears at `path` complete or not at all.

    One sync for all of it: `atomic_io.atomic_directory` flushes file by file, which takes 25 s for CIFAR-10's 50 000.

    Raises:
        StorageError: No space or no permission.
    """
    with storage_errors(path), sibling_directory(path) as folder:
        yield folder
        if hasattr(os, "sync"):
            os.sync()
        _rename(folder, path)


def _rename(folder: Path, path: Path) -> None:
    try:
        os.rename(folder, path)
    except OSError:
        if not path.is_dir():
            raise  # else another run was faster, and made the same
