"""Files and folders written whole or not at all: a sibling first, flushed to the disk, then renamed."""

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
    """Write a UTF-8 text file whole or not at all; StorageError where the disk refuses."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; StorageError where the disk refuses."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place when the block ends well; StorageError where the disk refuses, or what lies there is no file."""
    with storage_errors(path):
        if not is_replaceable(path):
            raise StorageError(f"{str(path)!r} is no file: a file does not take its place", "choose another one")
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
    """Whether a file may take this place: that of a file, a link to one, or nothing; never that of a folder, a pipe or a device."""
    if path.is_symlink() and os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return False  # the system's own, such as /dev/stdout
    return path.is_file() or not path.exists()


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that appears at `path` when the block ends well; an old one is replaced only with `overwrite`.

    Raises:
        StorageError: The disk refuses, or `path` exists and is not to be replaced.
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
            _take_place(part, path)
            _flush_directory(path.parent)


@contextmanager
def sibling_directory(path: Path) -> Iterator[Path]:
    """An empty hidden folder beside `path`, gone when the block ends unless it was renamed; those of dead processes are swept first."""
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
    """A second name for the file, or a copy where the file system has none; the folder of `target` is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def file_lock(path: Path, wait: bool = True, remove: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, so that one process at a time runs the block (not on Windows, which has no flock); then `remove` it.

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
    """The lock file, held until it is closed."""
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
        file.close()  # whoever held it removed it: others hold another file of this name, or will


def _flock(file: IO[str], path: Path, wait: bool) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        log.info("waiting for another run, which holds %s", path)
        fcntl.flock(file, fcntl.LOCK_EX)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _take_place(part: Path, path: Path) -> None:
    if not path.exists():
        os.rename(part, path)
        return
    if _exchanged(part, path):  # the old one goes with the sibling
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
    """Whether two paths have changed places in one step, which a kill cannot divide; not every system and file system can."""
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
