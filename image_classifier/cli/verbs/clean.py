"""The verb `clean`: what can be made again from the images is removed. A folder must carry the tag of a cache, or it is left alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import file_lock, write_text
from image_classifier.cli import hydra_app
from image_classifier.errors import ConfigError, DataError, storage_errors

_TAG = "CACHEDIR.TAG"
_PIXELS = re.compile(r"[0-9a-f]{16}")
_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"  # https://bford.info/cachedir/: back-up programs leave such folders out

_TEXT = f"{_SIGNATURE}\n# Decoded pixels and facts of image files: `python commands.py clean` removes them.\n"


@dataclass(frozen=True)
class CleanSettings:
    """The keys of conf/clean.yaml."""

    cache_dir: str = "data/cache"
    dry_run: bool = False
    trusted_packages: list[str] = field(default_factory=list)


def tag_cache(directory: Path) -> None:
    """Mark a folder as a cache, once."""
    tag = directory / _TAG
    if not tag.is_file():
        write_text(tag, _TEXT)


def clean(config: Any) -> None:
    """Remove decoded pixels and what is known of files; says how much room that makes. All else in the folder stays, as do images and models."""
    asked = hydra_app.typed(CleanSettings, config, "")
    directory = Path(asked.cache_dir)
    if not directory.exists():
        print(f"nothing to remove: there is no {directory}")
        return
    if not _is_cache(directory):
        raise ConfigError(
            f"cache_dir={directory} is no cache of this program", f"it has no {_TAG}; nothing was removed"
        )
    stores = list(_stores(directory))
    size = sum(
        file.stat().st_size for store in stores for file in store.rglob("*") if file.is_file() and not file.is_symlink()
    )
    if asked.dry_run:
        print(f"would remove {size / 1e6:,.1f} MB from {directory}")
        return
    with storage_errors(directory), ExitStack() as stack:
        for lock in (path for store in stores for path in sorted(store.rglob("lock"))):
            try:
                stack.enter_context(file_lock(lock, wait=False))
            except BlockingIOError:
                raise DataError(
                    f"a run is writing to {str(lock.parent)!r}", "wait until it is done; nothing was removed"
                ) from None
        for store in stores:
            shutil.rmtree(store)
        if [path.name for path in directory.iterdir()] == [_TAG]:  # else something of somebody's lies here
            shutil.rmtree(directory)
    print(f"removed {size / 1e6:,.1f} MB from {directory}")


def _is_cache(directory: Path) -> bool:
    tag = directory / _TAG
    return tag.is_file() and tag.read_text(encoding="utf-8", errors="replace") == _TEXT


def _stores(directory: Path) -> Iterator[Path]:
    """The folders that this program makes in a cache: pixels under 16 hex digits, facts, twins and embeddings."""
    for path in sorted(directory.iterdir()):
        if (
            path.is_dir()
            and not path.is_symlink()
            and (path.name in ("facts", "twins", "embeddings") or _PIXELS.fullmatch(path.name))
        ):
            yield path
