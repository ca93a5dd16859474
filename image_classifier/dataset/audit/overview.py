"""Description of a data set: classes, splits, sizes, formats, modes and a fingerprint."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np

from image_classifier.dataset.discovery import FileTree
from image_classifier.dataset.scan import FileMetadata
from image_classifier.manifest import SPLITS


def describe(tree: FileTree, metadata: FileMetadata, kept: np.ndarray) -> dict[str, Any]:
    """Describe the images of the `kept` rows, bool [N]; sizes, formats and modes of those that can be read."""
    readable = kept.copy()
    readable[list(metadata.errors)] = False
    rows = np.flatnonzero(readable)
    classes: dict[str, Counter[str]] = {label: Counter() for label in sorted({image.label for image in tree.images})}
    for row in np.flatnonzero(kept).tolist():
        classes[tree.images[row].label][tree.images[row].split] += 1
    totals: Counter[str] = sum(classes.values(), Counter())
    return {
        "root": str(tree.root),
        "images": int(kept.sum()),
        "unreadable": int(kept.sum()) - len(rows),
        "left_out": len(kept) - int(kept.sum()),
        "classes": {label: {"images": counts.total()} | _split_counts(counts) for label, counts in classes.items()},
        "splits": _split_counts(totals),
        "formats": _common(metadata.formats[rows], metadata.format_names),
        "modes": _common(metadata.modes[rows], metadata.mode_names),
        "sizes": _sizes(metadata.widths[rows], metadata.heights[rows]),
        "fingerprint": _fingerprint(tree, metadata, kept),
    }


def _split_counts(counts: Counter[str]) -> dict[str, int]:
    """Return the number of images by split; "undealt" for images without a split."""
    return {split or "undealt": counts[split] for split in (*SPLITS, "") if counts[split]}


def _common(codes: np.ndarray, names: tuple[str, ...]) -> dict[str, int]:
    """Return the number of images by name, most frequent first."""
    counts = np.bincount(codes, minlength=len(names)).tolist()
    order = sorted(range(len(names)), key=lambda code: -counts[code])
    return {names[code]: counts[code] for code in order if counts[code]}


def _sizes(widths: np.ndarray, heights: np.ndarray) -> dict[str, Any]:
    """Return smallest, median and largest sides, common sizes, and a histogram of the shorter side; in pixels."""
    if not len(widths):
        return {}
    sides = {
        name: {"min": int(side.min()), "median": float(np.median(side)), "max": int(side.max())}
        for name, side in (("width", widths), ("height", heights))
    }
    both, counts = np.unique(np.stack([widths, heights], axis=1), axis=0, return_counts=True)
    common = np.argsort(-counts, kind="stable")[:5].tolist()
    # Powers of two, by frexp: a logarithm is not exact.
    powers = np.frexp(np.minimum(widths, heights))[1] - 1
    lowest = int(powers.min())
    histogram = np.bincount(powers - lowest).tolist()
    return {
        **sides,
        "distinct": len(both),
        "common": [
            {"width": int(both[row, 0]), "height": int(both[row, 1]), "images": int(counts[row])} for row in common
        ],
        "shorter_side": [
            {"from": 2**power, "below": 2 ** (power + 1), "images": count}
            for power, count in enumerate(histogram, start=lowest)
        ],
    }


def _fingerprint(tree: FileTree, metadata: FileMetadata, kept: np.ndarray) -> str:
    """Return the sha256 of paths, labels, given splits and contents: equal if and only if these are."""
    digest = hashlib.sha256()
    for row in np.flatnonzero(kept).tolist():
        image = tree.images[row]
        text = "\0".join((image.path, image.label, image.split)).encode("utf-8", "surrogateescape")
        digest.update(text + b"\0" + metadata.digests[row].tobytes())
    return digest.hexdigest()
