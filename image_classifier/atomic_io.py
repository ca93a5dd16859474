"""Atomic files and folders: written beside their path, flushed to the disk, then renamed."""

from __future__ import annotations

import ctypes
import glob
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from image_classifier.errors import StorageError, storage_errors

log = logging.getLogger(__name__)

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file completely or not at all; raise StorageError where the disk refuses."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; raise StorageError where the disk refuses."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that replaces `path` when the block ends without an error.

    Raises:
        StorageError: The disk refuses, or `path` is a folder, a pipe or a device.
    """
    with storage_errors(path):
        if not is_replaceable(path):
            raise StorageError(f"{str(path)!r} is not a regular file, so it is not replaced", "choose another path")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
            _flush_directory(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def is_replaceable(path: Path) -> bool:
    """Return whether a file may be written to this path: it is a file, a link to one, or free."""
    if path.is_symlink() and os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return False  # of the system, such as /dev/stdout
    return path.is_file() or not path.exists()


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder that is renamed to `path` when the block ends without an error.

    An existing folder is replaced only with `overwrite`.

    Raises:
        StorageError: The disk refuses, or `path` exists and `overwrite` is false.
    """
    with storage_errors(path):
        if path.exists() and not overwrite:
            raise StorageError(f"{str(path)!r} exists", "choose another name= or pass overwrite=true")
        old = path.with_name(f".{path.name[:50]}.old")
        if old.exists() and not path.exists():
            os.rename(old, path)  # a kill between the two renames
        with sibling_directory(path) as part:
            yield part
            for file in part.rglob("*"):
                _flush_directory(file) if file.is_dir() else _flush_file(file)
            _replace_directory(part, path)
            _flush_directory(path.parent)


@contextmanager
def sibling_directory(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder next to `path`, which is removed at the end of the block unless it was renamed.

    Such folders of dead processes are removed first.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = f".{path.name[:50]}.{socket.gethostname()}-"
        for left in path.parent.glob(f"{glob.escape(mine)}*.part"):
            owner = left.name.removeprefix(mine).partition(".")[0]
            if owner.isdecimal() and not _is_alive(int(owner)):
                shutil.rmtree(left, ignore_errors=True)
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{mine}{os.getpid()}.", suffix=".part"))
        try:
            part.chmod(0o777 & ~_umask())
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` as a hard link to the file, or as a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def file_lock(path: Path, wait: bool = True, remove: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, so that one process at a time runs the block; then `remove` it.

    Windows has no flock: there the block runs at once.

    Raises:
        BlockingIOError: Another process holds it, and `wait` is false.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held(path, wait):
            try:
                yield
            finally:
                if remove:
                    path.unlink(missing_ok=True)


def _held(path: Path, wait: bool) -> IO[str]:
    """Return the lock file, which is held until it is closed."""
    while True:
        file = path.open("w")
        try:
            _flock(file, path, wait)
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()  # its holder removed it: others now hold a new file of this name


def _flock(file: IO[str], path: Path, wait: bool) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        log.info("waiting for another run that holds the lock %s", path)
        fcntl.flock(file, fcntl.LOCK_EX)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _replace_directory(part: Path, path: Path) -> None:
    if not path.exists():
        os.rename(part, path)
        return
    if _exchanged(part, path):  # the old folder is now the sibling, which is removed at the end
        return
    old = path.with_name(f".{path.name[:50]}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    try:
        os.rename(part, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two paths in one atomic step, and return whether the system and the file system can do that.

    Linux: renameat2(2) with RENAME_EXCHANGE; macOS: renamex_np(2) with RENAME_SWAP.
    """
    if sys.platform == "win32":
        return False
    system, names = ctypes.CDLL(None), (os.fsencode(one), os.fsencode(other))
    if hasattr(system, "renameat2"):  # Linux
        return not system.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    if hasattr(system, "renamex_np"):  # macOS
        return not system.renamex_np(*names, _EXCHANGE)
    return False


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
