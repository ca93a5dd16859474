"""Near-duplicates kept between runs: they are searched again only when an image or a setting changes."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np

from image_classifier.atomic_io import write_bytes
from image_classifier.dataset.duplicates import DuplicateSettings, NearDuplicates, find_near_duplicates
from image_classifier.dataset.scan import FileMetadata

log = logging.getLogger(__name__)

_FORMAT = 1
_KEPT = 16  # newest results that stay
_BLOCK = 65_536
_COLUMNS = ("first", "second", "correlation", "mirrored")


def known_near_duplicates(
    metadata: FileMetadata, settings: DuplicateSettings, store_dir: Path, progress: bool = False
) -> NearDuplicates:
    """Return the near-duplicates among the readable images, as rows of `metadata`.

    They are read from `store_dir` if these very images were searched before.

    Raises:
        StorageError: The result cannot be written.
    """
    rows = np.flatnonzero(metadata.readable)
    path = store_dir / f"{_key(metadata, rows, settings)}.npz"
    pairs = _read(path)
    if pairs is None:
        thumbnails = metadata.thumbnails if len(rows) == len(metadata) else metadata.thumbnails[rows]
        among_readable = find_near_duplicates(thumbnails, settings, progress)
        pairs = replace(among_readable, first=rows[among_readable.first], second=rows[among_readable.second])
        content = io.BytesIO()
        np.savez(content, **{name: getattr(pairs, name) for name in _COLUMNS})
        write_bytes(path, content.getvalue())
        for old in sorted(store_dir.glob("*.npz"), key=os.path.getmtime, reverse=True)[_KEPT:]:
            old.unlink(missing_ok=True)
    return pairs


def _key(metadata: FileMetadata, rows: np.ndarray, settings: DuplicateSettings) -> str:
    """Return a hash of what decides the result: thumbnails of the readable images, in order, and the settings."""
    digest = hashlib.sha256(repr((_FORMAT, astuple(settings), len(metadata))).encode())
    digest.update(rows.tobytes())
    for start in range(0, len(rows), _BLOCK):
        digest.update(np.ascontiguousarray(metadata.thumbnails[rows[start : start + _BLOCK]]).data)
    return digest.hexdigest()[:32]


def _read(path: Path) -> NearDuplicates | None:
    """Return the result in a file; None if there is none, or if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return NearDuplicates(*(content[name] for name in _COLUMNS))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s cannot be read (%s): near-duplicates are searched again", path, error)
        return None
