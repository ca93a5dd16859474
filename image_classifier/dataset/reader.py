"""Images of a manifest as pixels: read, compared with their hash, decoded and preprocessed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_classifier.errors import DataError, UnreadableImage
from image_classifier.images import DEFAULT_LIMITS, DecodeLimits, Preprocess, load_bytes
from image_classifier.manifest import Manifest


class ChangedImage(DataError):
    """A file that changed since the manifest was written."""


@dataclass(frozen=True)
class ImageReader:
    """Reads files under `root` to pixels; small enough to be sent to another process."""

    root: Path
    preprocess: Preprocess
    limits: DecodeLimits = DEFAULT_LIMITS

    def read(self, path: str, digest: bytes) -> np.ndarray:
        """Return the pixels, uint8 [S, S, 3], of a file whose sha256 is `digest`.

        Raises:
            UnreadableImage: It cannot be decoded.
            ChangedImage: It has another sha256.
        """
        content = load_bytes(self.root / path, self.limits)
        if hashlib.sha256(content).digest() != digest:
            raise ChangedImage(
                f"{str(self.root / path)!r} changed since the manifest was written",
                "run the same command again to scan it again",
            )
        try:
            return self.preprocess.read(content, self.limits)
        except UnreadableImage as error:
            raise UnreadableImage(self.root / path, error.reason) from error

    def read_block(self, block: Sequence[tuple[str, bytes]]) -> list[tuple[bytes, np.ndarray | DataError]]:
        """Return the digest of each (path, digest) with its pixels, or with the error."""
        results: list[tuple[bytes, np.ndarray | DataError]] = []
        for path, digest in block:
            try:
                results.append((digest, self.read(path, digest)))
            except DataError as error:
                results.append((digest, error))
        return results


@dataclass(frozen=True)
class Blocks(Sequence[list[tuple[str, bytes]]]):
    """The (path, digest) of some rows of a manifest, in lists of `size` that are made when needed."""

    manifest: Manifest
    rows: np.ndarray
    size: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __getitem__(self, index: int) -> list[tuple[str, bytes]]:  # type: ignore[override]  # no slices: nobody needs them
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = self.rows[index * self.size : (index + 1) * self.size].tolist()
        return [(self.manifest.paths[row], self.manifest.digests[row].tobytes()) for row in rows]
