"""What fix.csv leaves out is dealt with the rest and then put down beside the manifest, so that it comes back to the part it was in."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np

from image_classifier.dataset.audit.fix import Correction
from image_classifier.errors import storage_errors
from image_classifier.manifest import Manifest


def beside(manifest_path: Path) -> Path:
    """Where the records lie that a manifest lacks."""
    return manifest_path.with_name(f"{manifest_path.stem}.left_out.csv")


def remembered(previous: Manifest | None, path: Path) -> Manifest | None:
    """The earlier manifest with the records that were left out of it; DataError where one of the files is damaged."""
    if previous is None or not beside(path).exists():
        return previous
    return Manifest.of(previous.root, chain(previous, Manifest.read(beside(path), previous.root)))


def divided(manifest: Manifest, correction: Correction) -> tuple[Manifest, Manifest | None]:
    """The manifest without the images that fix.csv leaves out, and a manifest of these; None where there are none."""
    gone = (
        np.array([name in correction.excluded for name in manifest.paths], dtype=bool)
        if correction.excluded
        else np.zeros(0, dtype=bool)
    )
    return (
        (manifest.take(np.flatnonzero(~gone)), manifest.take(np.flatnonzero(gone))) if gone.any() else (manifest, None)
    )


def forget(path: Path) -> None:
    """Remove what lies beside a manifest that lacks nothing any more; StorageError where the disk refuses."""
    with storage_errors(path):
        beside(path).unlink(missing_ok=True)
