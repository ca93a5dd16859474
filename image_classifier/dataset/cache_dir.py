"""The cache folder (`data.cache.dir`): its tag, and removal of everything that can be computed again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from image_classifier.atomic_io import file_lock, write_text
from image_classifier.errors import ConfigError, DataError, storage_errors

_TAG = "CACHEDIR.TAG"
_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"  # https://bford.info/cachedir/
_TEXT = f"{_SIGNATURE}\n# Decoded pixels and metadata of image files: the verb `clean` removes them.\n"
# The second is what version 0.1.0 wrote.
_TEXTS = (_TEXT, f"{_SIGNATURE}\n# Decoded pixels and facts of image files: `python commands.py clean` removes them.\n")
_NAMES = ("facts", "twins", "embeddings")
_PIXELS = re.compile(r"[0-9a-f]{16}")


def tag_cache(directory: Path) -> None:
    """Mark a folder as a cache, unless it is marked already."""
    tag = directory / _TAG
    if not tag.is_file():
        write_text(tag, _TEXT)


def cache_bytes(directory: Path) -> int:
    """Return how many bytes `remove_cache` would free.

    Raises:
        ConfigError: The folder lacks the tag.
    """
    stores = _stores(directory)
    files = (file for store in stores for file in store.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files)


def remove_cache(directory: Path) -> None:
    """Remove decoded pixels, file metadata, near-duplicates and embeddings; everything else in the folder stays.

    Raises:
        ConfigError: The folder lacks the tag.
        DataError: A run is writing to it; nothing was removed.
        StorageError: No permission.
    """
    stores = _stores(directory)
    with storage_errors(directory), ExitStack() as stack:
        # Hold every lock before anything is removed.
        for lock in (path for store in stores for path in sorted(store.rglob("lock"))):
            try:
                stack.enter_context(file_lock(lock, wait=False))
            except BlockingIOError:
                raise DataError(
                    f"a run is writing to {str(lock.parent)!r}", "wait until it has finished; nothing was removed"
                ) from None
        for store in stores:
            shutil.rmtree(store)
        # Anything besides the tag was put there by somebody else.
        if [path.name for path in directory.iterdir()] == [_TAG]:
            shutil.rmtree(directory)


def _stores(directory: Path) -> list[Path]:
    """Return the folders that this program makes in a cache; ConfigError if the folder is not marked as one."""
    tag = directory / _TAG
    if not tag.is_file() or tag.read_text(encoding="utf-8", errors="replace") not in _TEXTS:
        raise ConfigError(
            f"cache_dir={directory} is not a cache of this program", f"it has no {_TAG}; nothing was removed"
        )
    return list(_store_folders(directory))


def _store_folders(directory: Path) -> Iterator[Path]:
    """Yield the pixel stores (16 hex digits) and the stores of metadata, near-duplicates and embeddings."""
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.is_symlink() and (path.name in _NAMES or _PIXELS.fullmatch(path.name)):
            yield path
