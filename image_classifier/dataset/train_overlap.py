"""Which images of a folder to test on are training images, or show the same as one."""

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
    """Which of the tested images, bool [N], are images of the train part of `known`, byte for byte."""
    trained = {digest.tobytes() for digest in known.digests[known.indices("train")]}
    return np.array([digest.tobytes() in trained for digest in tested.digests], dtype=bool)


def near_duplicates_of_train(
    tested: Manifest, known: Manifest, limits: DecodeLimits, store_dir: Path, progress: bool = False
) -> np.ndarray:
    """Which of the tested images, bool [N], have a twin (`duplicates.find_twins`) in the train part of `known`; none where its files are gone.

    Files that a scan has seen before are not opened again.

    Raises:
        StorageError: What was found of the files cannot be kept.
    """
    training = _tree(known.part("train"))
    if not training.images:
        log.info(
            "the training images are no longer in %s: copies of them were looked for by their bytes only", known.root
        )
        return np.zeros(len(tested), dtype=bool)
    train, mine = (
        scan_files(tree, store_dir / "facts", limits, (255, 255, 255), None, progress)
        for tree in (training, _tree(tested))
    )
    rows, others = np.flatnonzero(mine.readable), np.flatnonzero(train.readable)
    twins = find_near_duplicates(
        np.concatenate([train.thumbnails[others], mine.thumbnails[rows]]), DuplicateSettings(), progress
    )
    cluster = clusters(
        len(others) + len(rows), twins.first, twins.second
    )  # not every pair of a crowd is listed, but all are connected
    alike = np.zeros(len(tested), dtype=bool)
    alike[rows] = np.isin(cluster[len(others) :], cluster[: len(others)])
    return alike


def _tree(manifest: Manifest) -> FileTree:
    """Those of the images that are still there."""
    found = (_image(manifest.root, record.path, record.label) for record in manifest)
    return FileTree(manifest.root, tuple(image for image in found if image))


def _image(root: Path, path: str, label: str) -> ImageFile | None:
    try:
        status = (root / path).stat()
    except OSError:
        return None
    return ImageFile(path, label, "", status.st_size, status.st_mtime_ns, "", status.st_ctime_ns)
