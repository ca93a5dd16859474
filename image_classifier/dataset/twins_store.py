"""Twins kept between runs: the search is done again only when an image or a setting changes."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from dataclasses import astuple
from pathlib import Path

import numpy as np

from image_classifier.atomic_io import write_bytes
from image_classifier.dataset.duplicates import DuplicateSettings, NearDuplicates, find_near_duplicates
from image_classifier.dataset.scan import FileMetadata

log = logging.getLogger(__name__)

_FORMAT = 1
_KEPT = 16  # results, the newest ones
_BLOCK = 65_536
_COLUMNS = ("first", "second", "correlation", "mirrored")


def known_near_duplicates(
    facts: FileMetadata, settings: DuplicateSettings, store_dir: Path, progress: bool = False
) -> NearDuplicates:
    """The twins among the readable images, in rows of `facts`, read from `store_dir` where these very images were searched before.

    Raises:
        StorageError: The result cannot be written.
    """
    rows = np.flatnonzero(facts.readable)
    path = store_dir / f"{_key(facts, rows, settings)}.npz"
    twins = _read(path)
    if twins is None:
        found = find_near_duplicates(
            facts.thumbnails if len(rows) == len(facts) else facts.thumbnails[rows], settings, progress
        )
        twins = NearDuplicates(rows[found.first], rows[found.second], found.correlation, found.mirrored)
        content = io.BytesIO()
        np.savez(content, **{name: getattr(twins, name) for name in _COLUMNS})
        write_bytes(path, content.getvalue())
        for old in sorted(store_dir.glob("*.npz"), key=os.path.getmtime, reverse=True)[_KEPT:]:
            old.unlink(missing_ok=True)
    return twins


def _key(facts: FileMetadata, rows: np.ndarray, settings: DuplicateSettings) -> str:
    """What decides the result: the readable images' thumbnails, in order, and the settings."""
    digest = hashlib.sha256(repr((_FORMAT, astuple(settings), len(facts))).encode())
    digest.update(rows.tobytes())
    for start in range(0, len(rows), _BLOCK):
        digest.update(np.ascontiguousarray(facts.thumbnails[rows[start : start + _BLOCK]]).data)
    return digest.hexdigest()[:32]


def _read(path: Path) -> NearDuplicates | None:
    """What was kept; None where there is none, or none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return NearDuplicates(*(content[name] for name in _COLUMNS))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s cannot be read (%s): near-duplicates are searched anew", path, error)
        return None
