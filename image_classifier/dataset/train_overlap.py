"""Test images that are training images, or near-duplicates of one."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from image_classifier.dataset.discovery import FileTree, ImageFile
from image_classifier.dataset.duplicates import DuplicateSettings, clusters, find_near_duplicates
from image_classifier.dataset.scan import scan_files
from image_classifier.images import DecodeLimits
from image_classifier.manifest import Manifest

log = logging.getLogger(__name__)


def exact_duplicates_of_train(tested: Manifest, known: Manifest) -> np.ndarray:
    """Return which test images are images of the train split of `known`, byte for byte, bool [N]."""
    trained = {digest.tobytes() for digest in known.digests[known.indices("train")]}
    return np.array([digest.tobytes() in trained for digest in tested.digests], dtype=bool)


def near_duplicates_of_train(
    tested: Manifest, known: Manifest, limits: DecodeLimits, store_dir: Path, progress: bool = False
) -> np.ndarray:
    """Return which test images have a near-duplicate in the train split of `known`, bool [N].

    None has one if the training files are gone. Files that were scanned before are not opened again.

    Raises:
        StorageError: The metadata cannot be written.
    """
    training = _tree(known.part("train"))
    if not training.images:
        log.info("the training images are no longer in %s: only exact copies of them were searched", known.root)
        return np.zeros(len(tested), dtype=bool)
    train, mine = (
        scan_files(tree, store_dir / "facts", limits, (255, 255, 255), None, progress)
        for tree in (training, _tree(tested))
    )
    rows, others = np.flatnonzero(mine.readable), np.flatnonzero(train.readable)
    pairs = find_near_duplicates(
        np.concatenate([train.thumbnails[others], mine.thumbnails[rows]]), DuplicateSettings(), progress
    )
    # Clusters, not pairs: not every pair of a crowd is listed, but all of them are connected.
    cluster = clusters(len(others) + len(rows), pairs.first, pairs.second)
    alike = np.zeros(len(tested), dtype=bool)
    alike[rows] = np.isin(cluster[len(others) :], cluster[: len(others)])
    return alike


def _tree(manifest: Manifest) -> FileTree:
    """Return those of the images that still exist."""
    images = (_image(manifest.root, record.path, record.label) for record in manifest)
    return FileTree(manifest.root, tuple(image for image in images if image))


def _image(root: Path, path: str, label: str) -> ImageFile | None:
    try:
        status = (root / path).stat()
    except OSError:
        return None
    return ImageFile(path, label, "", status.st_size, status.st_mtime_ns, "", status.st_ctime_ns)
