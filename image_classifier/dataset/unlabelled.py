"""Images without labels, which a teacher labels in training: found, read once, and kept apart from val and test."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.dataset.discovery import FileTree, ImageFile
from image_classifier.dataset.prepare import manifest_of
from image_classifier.dataset.scan import scan_files
from image_classifier.dataset.settings import DataSettings
from image_classifier.errors import ConfigError, DataError
from image_classifier.manifest import Manifest, Texts
from image_classifier.sources.folders import expanded
from image_classifier.sources.inputs import Inputs
from image_classifier.sources.table import is_table
from image_classifier.text import counted, listed

log = logging.getLogger(__name__)


def find_unlabelled(given: Any, data: DataSettings, manifest: Manifest, progress: bool = False) -> Manifest:
    """Return the images of folders or tables, without a class and in no split.

    Damaged files, and byte-identical copies of images in val or test, are left out and counted in the log.

    Args:
        given: A folder or a table with a column path, or a list of them.
        data: How images are read and where their metadata is cached.
        manifest: The labelled images.
        progress: Whether to show a bar on standard error.

    Raises:
        ConfigError: Something else is given.
        DataError: No image is left.
        StorageError: The metadata cannot be written.
    """
    items = [given] if isinstance(given, str) else given
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise ConfigError(f"model.unlabelled must be a path or a list of paths, not {given!r}")
    tree = _tree(items)
    cache = data.cache
    metadata = scan_files(tree, Path(cache.dir) / "facts", data.limits, data.background, cache.workers, progress)
    held_out = {manifest.digests[row].tobytes() for split in ("val", "test") for row in manifest.indices(split)}
    is_copy = np.array([digest.tobytes() in held_out for digest in metadata.digests], dtype=bool) & metadata.readable
    if metadata.errors:
        named = listed([f"{tree.images[row].path!r} ({reason})" for row, reason in metadata.errors.items()], limit=3)
        log.warning("model.unlabelled: %s skipped: %s", counted(len(metadata.errors), "unreadable image"), named)
    rows = np.flatnonzero(metadata.readable & ~is_copy)
    if not len(rows):
        raise DataError(f"model.unlabelled: no image of {listed(items)} can be used", "give other images, or null")
    log.info(
        "model.unlabelled: %s; %s left out as in val or test",
        counted(len(rows), "image"),
        counted(int(is_copy.sum()), "image"),
    )
    return manifest_of(tree, metadata, rows)


def joined(manifest: Manifest, unlabelled: Manifest) -> Manifest:
    """Return the manifest with the unlabelled images after its own, for the pixel cache only: they have no class."""
    return replace(
        manifest,
        paths=Texts.of([*manifest.paths, *absolute_paths(unlabelled)]),
        targets=np.concatenate([manifest.targets, np.full(len(unlabelled), -1)]),
        splits=np.concatenate([manifest.splits, unlabelled.splits]),
        groups=np.concatenate([manifest.groups, unlabelled.groups]),
        digests=np.concatenate([manifest.digests, unlabelled.digests]),
        widths=np.concatenate([manifest.widths, unlabelled.widths]),
        heights=np.concatenate([manifest.heights, unlabelled.heights]),
    )


def absolute_paths(manifest: Manifest) -> list[str]:
    """Return the paths of the images from the root of the file system."""
    return [os.path.abspath(manifest.root / path) for path in manifest.paths]


def _tree(items: Sequence[str]) -> FileTree:
    """Return the images of folders and tables, each once; ConfigError for anything else."""
    for item in items:
        path = Path(expanded(item))
        if not path.is_dir() and not (path.is_file() and is_table(path)):
            raise ConfigError(
                f"model.unlabelled: {item!r} is neither a folder nor a table",
                "give a folder of images, or a CSV, TSV or Parquet file with a column path",
            )
    inputs = Inputs(items, stdin=io.BytesIO)
    inputs.check()
    paths = sorted({os.path.abspath(image.name) for image in inputs})
    root = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
    return FileTree(root, tuple(_image(root, path) for path in paths))


def _image(root: Path, path: str) -> ImageFile:
    name = os.path.relpath(path, root)
    try:
        status = os.stat(path)
    except OSError:  # reading the file later reports it
        return ImageFile(name, "", "", -1, -1, "", -1)
    return ImageFile(name, "", "", status.st_size, status.st_mtime_ns, "", status.st_ctime_ns)
