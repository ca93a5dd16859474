"""What fix.csv leaves out is dealt with the rest and then put down beside the manifest, so that it comes back to the part it was in."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np

from image_classifier.dataset.audit.fix import Correction
from image_classifier.errors import storage_errors
from image_classifier.manifest import Manifest


def excluded_records_path(manifest_path: Path) -> Path:
    """Where the records lie that a manifest lacks."""
    return manifest_path.with_name(f"{manifest_path.stem}.left_out.csv")


def with_excluded(previous: Manifest | None, path: Path) -> Manifest | None:
    """The earlier manifest with the records that were left out of it; DataError where one of the files is damaged."""
    if previous is None or not excluded_records_path(path).exists():
        return previous
    return Manifest.of(previous.root, chain(previous, Manifest.read(excluded_records_path(path), previous.root)))


def split_excluded(manifest: Manifest, correction: Correction) -> tuple[Manifest, Manifest | None]:
    """The manifest without the images that fix.csv leaves out, and a manifest of these; None where there are none."""
    gone = (
        np.array([name in correction.excluded for name in manifest.paths], dtype=bool)
        if correction.excluded
        else np.zeros(0, dtype=bool)
    )
    return (
        (manifest.take(np.flatnonzero(~gone)), manifest.take(np.flatnonzero(gone))) if gone.any() else (manifest, None)
    )


def remove_excluded(path: Path) -> None:
    """Remove what lies beside a manifest that lacks nothing any more; StorageError where the disk refuses."""
    with storage_errors(path):
        excluded_records_path(path).unlink(missing_ok=True)
