"""The pixel cache: each image decoded and preprocessed once, by content, in an append-only file mapped into memory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import PIL

from image_classifier.atomic_io import file_lock
from image_classifier.cpu import usable_cores
from image_classifier.dataset.discovery import unreadable
from image_classifier.dataset.reader import Blocks, ChangedImage, ImageReader
from image_classifier.dataset.workers import map_blocks
from image_classifier.errors import ConfigError, DataError, StorageError, UnreadableImage, storage_errors
from image_classifier.images import DEFAULT_LIMITS, DecodeLimits, Preprocess
from image_classifier.manifest import Manifest
from image_classifier.program import program
from image_classifier.sampling import evenly_spaced

log = logging.getLogger(__name__)

_FORMAT = 2
_BLOCK = 64  # images of a task, at most: a task for each image would cost more than a small image
_BLOCK_BYTES = 2 * 2**20  # pixels of a task, at most: they wait in memory to be written
_COMMIT = 16_384  # images between two writes of the index: what a crash can lose
_CHUNK_BYTES = 32 * 2**20
_DIGEST = 32  # bytes a sha256
_SAMPLE = 4096  # images for mean and std if the cache does not hold all


@dataclass(frozen=True)
class CacheSettings:
    """Folder of decoded pixels, number of workers that decode (None: one per core), and size limit in GB."""

    dir: str = "data/cache"
    workers: int | None = None
    max_gb: float | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"data.cache.workers must be at least 1, not {self.workers}", "null uses every core")
        if self.max_gb is not None and not self.max_gb >= 0:
            raise ConfigError(
                f"data.cache.max_gb must be at least 0, not {self.max_gb}", "null sets no limit, 0 decodes on the fly"
            )

    @property
    def num_workers(self) -> int:
        """Number of workers that decode."""
        return self.workers or usable_cores()


@dataclass(frozen=True)
class PixelCache:
    """Pixels of a manifest's records.

    `pixels` is read-only uint8 [M, S, S, 3], shared by all manifests with the same preprocessing. `rows` int64 [N] is
    the row of each record in it, -1 where the cache was full: such a record is decoded by `live` each time.
    """

    pixels: np.ndarray
    rows: np.ndarray
    live: LiveImages | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """Side of the square, pixels."""
        return int(self.pixels.shape[1])

    @property
    def is_whole(self) -> bool:
        """Whether every record is in the file, and none must be decoded."""
        return self.live is None

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Return the pixels of some records, a copy, uint8 [n, S, S, 3]; `indices`, int64 [n], are manifest rows.

        Raises:
            DataError: A record that is not in the file has changed or cannot be read.
        """
        rows = self.rows[indices]
        if self.live is None:
            cached: np.ndarray = np.asarray(self.pixels)[rows]
            return cached
        pixels = np.empty((len(rows), self.size, self.size, 3), dtype=np.uint8)
        kept = rows >= 0
        pixels[kept] = np.asarray(self.pixels)[rows[kept]]
        missing = np.flatnonzero(~kept)
        for position, image in zip(missing.tolist(), self.live.read(indices[missing]), strict=True):
            pixels[position] = image
        return pixels

    def mean_std(self, indices: np.ndarray) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of each channel over some records, 0 to 1.

        Sums are whole numbers, so order does not matter. If some records are not in the file, evenly spaced ones are
        used for all.
        """
        if len(indices) == 0:
            raise DataError("there are no training images for mean and std", "lower data.split.val and data.split.test")
        if self.live is not None and len(indices) > _SAMPLE:
            log.info("mean and std are from %d of the %d training images", _SAMPLE, len(indices))
            indices = np.sort(indices)[evenly_spaced(len(indices), _SAMPLE)]
        totals, squares = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
        step = max(1, _CHUNK_BYTES // (self.size * self.size * 3))
        for start in range(0, len(indices), step):
            flat = self.gather(indices[start : start + step]).reshape(-1, 3)
            for channel in range(3):
                counts = np.bincount(flat[:, channel], minlength=256)
                totals[channel] += counts @ _LEVELS
                squares[channel] += counts @ (_LEVELS * _LEVELS)
        return _moments(totals, squares, len(indices) * self.size * self.size)


@dataclass(frozen=True)
class LiveImages:
    """Decodes records each time they are needed, in threads: Pillow works outside the interpreter's lock."""

    manifest: Manifest
    reader: ImageReader
    pool: ThreadPoolExecutor

    def read(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the pixels, uint8 [S, S, 3], of each record, in order."""
        paths = [self.manifest.paths[row] for row in indices.tolist()]
        digests = [self.manifest.digests[row].tobytes() for row in indices.tolist()]
        yield from self.pool.map(self.reader.read, paths, digests)


_LEVELS = np.arange(256, dtype=np.int64)


def _moments(totals: np.ndarray, squares: np.ndarray, count: int) -> tuple[list[float], list[float]]:
    """Return mean and std per channel from exact sums; a constant channel gets a std of one grey level, not zero."""
    means, stds = [], []
    for total, square in zip(totals.tolist(), squares.tolist(), strict=True):
        variance = (square * count - total * total) / (count * count)  # whole numbers until the division
        means.append(total / count / 255)
        stds.append(max(variance**0.5, 1.0) / 255)
    return means, stds


def open_cache(
    manifest: Manifest,
    preprocess: Preprocess,
    settings: CacheSettings,
    limits: DecodeLimits = DEFAULT_LIMITS,
    progress: bool = False,
) -> PixelCache:
    """Return the pixels of all records; only those of no earlier run are decoded, up to `settings.max_gb`.

    Raises:
        DataError: An image cannot be read, or changed since the manifest was written.
        StorageError: No space or no permission; the cache is as it was before.
    """
    store = _Store(Path(settings.dir) / pixels_key(preprocess), preprocess.size)
    reader = ImageReader(manifest.root, preprocess, limits)
    rows = store.find(manifest.digests)
    if (rows < 0).any():
        with storage_errors(store.dir), file_lock(store.dir / "lock"):
            store.repair()
            rows = store.find(manifest.digests)  # another run may have added some while this one waited
            _fill(store, _first_of_each(manifest.digests, rows < 0), manifest, reader, settings, progress)
        rows = store.find(manifest.digests)
    live = None
    if (rows < 0).any():
        log.warning(_IS_FULL, settings.max_gb, int((rows < 0).sum()), len(rows), settings.num_workers, program())
        live = LiveImages(manifest, reader, ThreadPoolExecutor(settings.num_workers))
    return PixelCache(store.pixels(), rows, live)


_IS_FULL = (
    "the pixel cache is full (data.cache.max_gb=%s): %d of %d images are decoded again each time by %d threads; "
    "raise the limit, or make room with `%s clean`"
)


def pixels_key(preprocess: Preprocess) -> str:
    """Return a hash of what decides the pixels besides the file's bytes; another Pillow may decode differently."""
    parts = {**preprocess.as_dict(), "format": _FORMAT, "pillow": PIL.__version__.partition(".")[0]}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _prefixes(digests: np.ndarray) -> np.ndarray:
    """Return the first 8 bytes of each sha256 as one number, uint64 [N]: the look-up sorts by it."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).ravel()


def _first_of_each(digests: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the wanted rows, the first of each content only, in order."""
    rows = np.flatnonzero(wanted)
    return np.sort(rows[np.unique(_prefixes(digests[rows]), return_index=True)[1]])


class _Store:
    """The two files of a cache, which only grow: `pixels.u8`, and `index.u8` with the sha256 of each row.

    The index is written after the pixels.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self.dir = directory
        self.size = size
        self.row_bytes = size * size * 3
        self.pixels_path = directory / "pixels.u8"
        self.index_path = directory / "index.u8"

    def __len__(self) -> int:
        """Return the number of rows that are complete in both files."""
        try:
            return min(self.pixels_path.stat().st_size // self.row_bytes, self.index_path.stat().st_size // _DIGEST)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._unreadable(error) from error

    def find(self, digests: np.ndarray) -> np.ndarray:
        """Return the row of each sha256 (uint8 [N, 32]), int64 [N]; -1 if it is not in the cache."""
        known = self._index()
        if not len(known) or not len(digests):
            return np.full(len(digests), -1, dtype=np.int64)
        prefixes = _prefixes(known)
        order = np.argsort(prefixes, kind="stable")
        positions = np.searchsorted(prefixes, _prefixes(digests), sorter=order).clip(max=len(known) - 1)
        rows = order[positions]
        return np.where((known[rows] == digests).all(axis=1), rows, -1)

    def _index(self) -> np.ndarray:
        count = len(self)
        if not count:
            return np.zeros((0, _DIGEST), dtype=np.uint8)
        try:
            return np.fromfile(self.index_path, dtype=np.uint8, count=count * _DIGEST).reshape(count, _DIGEST)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot read the pixel cache {str(self.dir)!r} ({error.strerror})", "choose another data.cache.dir=PATH"
        )

    def repair(self) -> None:
        """Cut both files to the rows that are complete in both; the rest is of a crash."""
        count = len(self)
        for path, width in ((self.pixels_path, self.row_bytes), (self.index_path, _DIGEST)):
            if path.exists():
                os.truncate(path, count * width)

    def check_space(self, count: int) -> None:
        """Raise StorageError if `count` more images do not fit on the disk."""
        needed, free = count * (self.row_bytes + _DIGEST), shutil.disk_usage(self.dir).free
        if needed > free:
            fact = (
                f"the pixel cache needs {needed / 1e6:,.1f} MB in {str(self.dir)!r} and {free / 1e6:,.1f} MB are free"
            )
            raise StorageError(
                fact,
                "free some space, choose another disk with data.cache.dir=PATH, or limit it with data.cache.max_gb=N",
            )

    def pixels(self) -> np.ndarray:
        """Return all rows, mapped read-only, uint8 [M, S, S, 3]."""
        count = len(self)
        if count == 0:  # an empty file cannot be mapped
            return np.zeros((0, self.size, self.size, 3), dtype=np.uint8)
        return np.memmap(self.pixels_path, dtype=np.uint8, mode="r", shape=(count, self.size, self.size, 3))


def _fill(
    store: _Store, todo: np.ndarray, manifest: Manifest, reader: ImageReader, settings: CacheSettings, progress: bool
) -> None:
    """Append the images of the rows `todo` up to `max_gb`; after a failure both files end at the same row."""
    if settings.max_gb is not None:
        used = sum(path.stat().st_size for path in store.dir.parent.glob("*/pixels.u8"))  # by all image sizes together
        todo = todo[: max(0, round(settings.max_gb * 1e9) - used) // store.row_bytes]
    if not len(todo):
        return
    store.check_space(len(todo))
    failures: list[DataError] = []
    try:
        with store.pixels_path.open("ab") as pixels, store.index_path.open("ab") as index:
            waiting = bytearray()
            for digest, result in _decoded(todo, manifest, reader, settings, progress):
                if isinstance(result, DataError):
                    failures.append(result)
                    continue
                pixels.write(result.data)
                waiting += digest
                if len(waiting) >= _COMMIT * _DIGEST:
                    _commit(pixels, index, waiting)
            _commit(pixels, index, waiting)
    except BaseException:
        store.repair()
        raise
    _refuse(manifest.root, failures)


def _commit(pixels: IO[bytes], index: IO[bytes], waiting: bytearray) -> None:
    """Write the waiting rows: first the pixels reach the disk, then the index names them."""
    pixels.flush()
    os.fsync(pixels.fileno())
    index.write(waiting)
    index.flush()
    os.fsync(index.fileno())
    waiting.clear()


def _decoded(
    todo: np.ndarray, manifest: Manifest, reader: ImageReader, settings: CacheSettings, progress: bool
) -> Iterable[tuple[bytes, np.ndarray | DataError]]:
    """Yield the sha256 of each row of `todo` with its pixels or its error, in the order of `todo`."""
    length = max(1, min(_BLOCK, _BLOCK_BYTES // (3 * reader.preprocess.size**2)))
    work = Blocks(manifest, todo, length)
    for block in map_blocks(
        reader.read_block, work, len(todo), settings.workers, "decoding images" if progress else None
    ):
        yield from block


def _refuse(root: Path, failures: list[DataError]) -> None:
    """Raise one error for all images that could not be cached."""
    broken = [failure for failure in failures if isinstance(failure, UnreadableImage)]
    if broken:
        raise unreadable(root, broken)
    changed = [failure for failure in failures if isinstance(failure, ChangedImage)]
    if changed:
        raise DataError(
            f"{len(changed)} images under {str(root)!r} changed since the manifest was written", changed[0].fact
        )
