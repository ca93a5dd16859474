"""Images that fix.csv excludes are assigned with the others, then kept in a file next to the manifest.

So each returns to its split once its row in fix.csv is gone.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np

from image_classifier.dataset.audit.fix import Correction
from image_classifier.errors import storage_errors
from image_classifier.manifest import Manifest


def excluded_records_path(manifest_path: Path) -> Path:
    """Return the path of the records that a manifest lacks."""
    return manifest_path.with_name(f"{manifest_path.stem}.left_out.csv")


def with_excluded(previous: Manifest | None, path: Path) -> Manifest | None:
    """Return the earlier manifest with its excluded records; DataError if one of the files is damaged."""
    if previous is None or not excluded_records_path(path).exists():
        return previous
    return Manifest.of(previous.root, chain(previous, Manifest.read(excluded_records_path(path), previous.root)))


def split_excluded(manifest: Manifest, correction: Correction) -> tuple[Manifest, Manifest | None]:
    """Return the manifest without the images that fix.csv excludes, and a manifest of these, or None."""
    gone = (
        np.array([name in correction.excluded for name in manifest.paths], dtype=bool)
        if correction.excluded
        else np.zeros(0, dtype=bool)
    )
    return (
        (manifest.take(np.flatnonzero(~gone)), manifest.take(np.flatnonzero(gone))) if gone.any() else (manifest, None)
    )


def remove_excluded(path: Path) -> None:
    """Remove the file of a manifest that lacks nothing any more; StorageError if the disk refuses."""
    with storage_errors(path):
        excluded_records_path(path).unlink(missing_ok=True)
