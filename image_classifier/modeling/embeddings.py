"""Embeddings of many images by a backbone: computed in batches, stored by content, read back file by file."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from image_classifier.atomic_io import atomic_file, file_lock
from image_classifier.errors import StorageError, TrainingError
from image_classifier.modeling.classifier import Classifier, in_evaluation

log = logging.getLogger(__name__)

_MAX_BATCH = 256  # images
_MAX_BATCH_BYTES = 8 * 2**20  # pixels of a batch
_IMAGES_PER_FILE = 16_384  # computed again after a kill
_HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

# Rows int64 [n] of images -> their pixels uint8 [n, S, S, 3].
Gather = Callable[[np.ndarray], np.ndarray]
# Rows int64 [n] of images -> their embeddings float32 [m, D], batch by batch.
EmbedRows = Callable[[np.ndarray], Iterator[np.ndarray]]


def fingerprint(classifier: Classifier, backbone: Mapping[str, Any], precision: str) -> str:
    """Return 64 hex digits of all that an embedding depends on besides the pixels.

    That is the network's configuration and weights, its normalisation, and the precision.
    """
    digest = hashlib.sha256(json.dumps([backbone, precision], sort_keys=True, default=str).encode())
    normalisation = (("scale", classifier.scale), ("shift", classifier.shift))
    for name, tensor in (*classifier.backbone.state_dict().items(), *normalisation):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class EmbeddingStore:
    """Embeddings float32 [D] of images by the sha256 of their files, in numbered files that are never changed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def missing(self, digests: np.ndarray) -> np.ndarray:
        """Return the rows of images (sha256 uint8 [N, 32]) that are not stored, the first of equal ones, int64."""
        known = {digest for path in self._files() for digest in self._digests(path)}
        first: dict[bytes, int] = {}
        for row, digest in enumerate(map(bytes, digests)):
            if digest not in known:
                first.setdefault(digest, row)
        return np.fromiter(first.values(), dtype=np.int64, count=len(first))

    def add(self, digests: np.ndarray, embeddings: np.ndarray) -> None:
        """Store embeddings [n, D] of images by sha256 uint8 [n, 32].

        Raises:
            StorageError: The disk refuses.
        """
        number = max((int(path.stem) for path in self._files()), default=-1) + 1
        with atomic_file(self.directory / f"{number:06d}.npz") as file:
            np.savez(file, digests=digests, embeddings=embeddings.astype(np.float32))

    def parts(self, digests: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows int64 [m] of the given images with embeddings float32 [m, D], file by file, each row once."""
        rows: dict[bytes, list[int]] = {}
        for row, digest in enumerate(map(bytes, digests)):
            rows.setdefault(digest, []).append(row)
        for path in self._files():
            # Rows of the caller, and their rows in this file.
            pairs = [(row, at) for at, digest in enumerate(self._digests(path)) for row in rows.pop(digest, ())]
            if pairs:
                chosen, stored = np.array(pairs, dtype=np.int64).T
                yield chosen, self._read(path, "embeddings")[stored]

    def of(self, digests: np.ndarray) -> np.ndarray:
        """Return the embeddings float32 [N, D] of stored images, sha256 uint8 [N, 32]."""
        parts = list(self.parts(digests))
        rows, embeddings = (np.concatenate(column) for column in zip(*parts, strict=True))
        return np.asarray(embeddings[np.argsort(rows)])

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("*.npz"))

    def _digests(self, path: Path) -> Iterator[bytes]:
        yield from map(bytes, self._read(path, "digests"))

    def _read(self, path: Path, name: str) -> np.ndarray:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                array: np.ndarray = content[name]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise StorageError(f"cannot read {str(path)!r} ({error})", "remove it; it is computed again") from error
        return array


def known_embeddings(embed_rows: EmbedRows, digests: np.ndarray, directory: Path) -> EmbeddingStore:
    """Return the store in `directory` with the embeddings of all images; compute only those that are missing.

    Args:
        embed_rows: Computes the embeddings of rows, such as `embed` with all its other arguments.
        digests: sha256 of the images' files, uint8 [N, 32].
        directory: Of the store.

    Raises:
        TrainingError: An embedding is not finite.
        StorageError: The disk refuses.
    """
    store = EmbeddingStore(directory)
    with file_lock(directory / "lock"):
        todo = store.missing(digests)
        missing = {bytes(digest) for digest in digests[todo]}
        num_stored = sum(bytes(digest) not in missing for digest in digests)
        log.info("embeddings: %d of %d images are in %s", num_stored, len(digests), directory)
        for start in range(0, len(todo), _IMAGES_PER_FILE):
            rows = todo[start : start + _IMAGES_PER_FILE]
            store.add(digests[rows], np.concatenate(list(embed_rows(rows))))
            log.info("embeddings: %d of %d images computed", start + len(rows), len(todo))
    return store


def embed(
    classifier: Classifier, rows: np.ndarray, gather: Gather, precision: str = "32-true", channels_last: bool = False
) -> Iterator[np.ndarray]:
    """Yield embeddings float32 [n, D] of the images at `rows`, batch by batch, in evaluation mode.

    Raises:
        TrainingError: An embedding is not finite.
    """
    device = classifier.scale.device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    half = _HALVES.get(precision)
    with in_evaluation(classifier), torch.inference_mode(), torch.autocast(device.type, half, enabled=half is not None):
        for pixels in prefetched(rows, gather):
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(memory_format=layout)
            yield finite(classifier.embed(batch.to(device, non_blocking=True)).float().cpu().numpy())


def finite(embeddings: np.ndarray) -> np.ndarray:
    """Return embeddings; raise TrainingError where one is not finite."""
    if not np.isfinite(embeddings).all():
        raise TrainingError(
            "the backbone returns embeddings that are not finite", "use other weights, or precision=32-true"
        )
    return embeddings


def prefetched(rows: np.ndarray, gather: Gather) -> Iterator[np.ndarray]:
    """Yield pixels uint8 [n, S, S, 3]; the next batch is read while the caller works on this one."""
    size = _batch_size(gather(rows[:1]).nbytes)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(gather, batches[0])
        for following in (*batches[1:], None):
            pixels = upcoming.result()
            if following is not None:
                upcoming = pool.submit(gather, following)
            yield pixels


def _batch_size(image_bytes: int) -> int:
    return max(1, min(_MAX_BATCH, _MAX_BATCH_BYTES // max(1, image_bytes)))
