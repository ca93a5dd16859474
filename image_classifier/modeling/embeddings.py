"""Embeddings of many images by a backbone: computed in batches, kept by content on the disk, read back part by part."""

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

_BATCH, _BATCH_BYTES = 256, 8 * 2**20  # at most so many images at a time, and not more pixels than this
_PART = 16_384  # images between two files: what a kill can lose
_HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

# Positions int64 [n] of images -> their pixels uint8 [n, S, S, 3].
Gather = Callable[[np.ndarray], np.ndarray]


def fingerprint(classifier: Classifier, backbone: Mapping[str, Any], precision: str) -> str:
    """What decides an embedding besides the pixels, as 64 hex digits: the network's description and weights, its normalisation, the number format."""
    digest = hashlib.sha256(json.dumps([backbone, precision], sort_keys=True, default=str).encode())
    for name, tensor in (
        *classifier.backbone.state_dict().items(),
        ("scale", classifier.scale),
        ("shift", classifier.shift),
    ):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class EmbeddingStore:
    """Embeddings float32 [D] of images by the sha256 of their files, in a folder of numbered files that are never changed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def missing(self, digests: np.ndarray) -> np.ndarray:
        """Positions of the images, by sha256 uint8 [N, 32], that are not in the store: the first of each content, int64."""
        known = {digest for path in self._files() for digest in self._digests(path)}
        first: dict[bytes, int] = {}
        for row, digest in enumerate(map(bytes, digests)):
            if digest not in known:
                first.setdefault(digest, row)
        return np.fromiter(first.values(), dtype=np.int64, count=len(first))

    def add(self, digests: np.ndarray, embeddings: np.ndarray) -> None:
        """Keep embeddings [n, D] of images by sha256 uint8 [n, 32]; StorageError where the disk refuses."""
        number = max((int(path.stem) for path in self._files()), default=-1) + 1
        with atomic_file(self.directory / f"{number:06d}.npz") as file:
            np.savez(file, digests=digests, embeddings=embeddings.astype(np.float32))

    def parts(self, digests: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows int64 [m] of the images asked for, each in one part only, and their embeddings float32 [m, D]."""
        rows: dict[bytes, list[int]] = {}
        for row, digest in enumerate(map(bytes, digests)):
            rows.setdefault(digest, []).append(row)
        for path in self._files():
            places = [(row, place) for place, digest in enumerate(self._digests(path)) for row in rows.pop(digest, ())]
            if places:
                chosen, taken = np.array(places, dtype=np.int64).T
                yield chosen, self._read(path, "embeddings")[taken]

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("*.npz"))

    def _digests(self, path: Path) -> Iterator[bytes]:
        yield from map(bytes, self._read(path, "digests"))

    def _read(self, path: Path, name: str) -> np.ndarray:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                array: np.ndarray = content[name]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise StorageError(f"{str(path)!r} cannot be read ({error})", "remove it: it is made again") from error
        return array


def known_embeddings(
    classifier: Classifier,
    digests: np.ndarray,
    gather: Gather,
    directory: Path,
    precision: str = "32-true",
    channels_last: bool = False,
) -> EmbeddingStore:
    """The store in `directory` with the embeddings of all images (sha256 uint8 [N, 32]) in it, computing only those it lacks.

    Raises:
        TrainingError: The backbone answers with numbers that are not finite.
        StorageError: The disk refuses.
    """
    store = EmbeddingStore(directory)
    with file_lock(directory / "lock"):
        todo = store.missing(digests)
        absent = {bytes(digest) for digest in digests[todo]}
        log.info(
            "embeddings: %d of %d images are in %s",
            sum(bytes(digest) not in absent for digest in digests),
            len(digests),
            directory,
        )
        for start in range(0, len(todo), _PART):
            rows = todo[start : start + _PART]
            store.add(digests[rows], np.concatenate(list(embed(classifier, rows, gather, precision, channels_last))))
            log.info("embeddings: %d of %d images computed", start + len(rows), len(todo))
    return store


def embed(
    classifier: Classifier, rows: np.ndarray, gather: Gather, precision: str = "32-true", channels_last: bool = False
) -> Iterator[np.ndarray]:
    """Embeddings float32 [n, D] of the images at `rows`, batch by batch, with the network as it is in use: no dropout, no augmentation."""
    device = classifier.scale.device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    half = _HALVES.get(precision)
    with in_evaluation(classifier), torch.inference_mode(), torch.autocast(device.type, half, enabled=half is not None):
        for pixels in _ahead(rows, gather):
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(memory_format=layout)
            embeddings = classifier.embed(batch.to(device, non_blocking=True)).float()
            if not torch.isfinite(embeddings).all():
                raise TrainingError(
                    "the backbone answers with numbers that are not finite",
                    "choose other weights, or precision=32-true",
                )
            yield embeddings.cpu().numpy()


def _ahead(rows: np.ndarray, gather: Gather) -> Iterator[np.ndarray]:
    """Pixels uint8 [n, S, S, 3], the next batch being read while the caller works on this one."""
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
    return max(1, min(_BATCH, _BATCH_BYTES // max(1, image_bytes)))
