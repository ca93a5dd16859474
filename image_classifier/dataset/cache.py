"""The pixel cache: each image decoded and preprocessed once, kept by content in one append-only file that is mapped into memory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import PIL
from rich.progress import track

from image_classifier.dataset.scan import unreadable
from image_classifier.errors import ConfigError, DataError, StorageError, UnreadableImage, storage_errors
from image_classifier.files import locked, write_text
from image_classifier.images import Preprocess, decode, load_bytes
from image_classifier.records import Manifest, Record

log = logging.getLogger(__name__)

_FORMAT = 1
_BLOCK = 64  # at most so many images a task: one task an image would cost more than a small image,
_BLOCK_BYTES = 2 * 2**20  # and not more pixels than this, for large ones are many and wait in memory to be written
_COMMIT = 16_384  # images between two writes of the index: what a crash can lose
_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class CacheSettings:
    """Where decoded pixels are kept, and how many threads decode (None: one a core)."""

    dir: str = "data/cache"
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"data.cache.workers must be at least 1, not {self.workers}", "null uses every core")


@dataclass(frozen=True)
class PixelCache:
    """Pixels of a manifest's records.

    `pixels` is read-only uint8 [M, S, S, 3], shared by all manifests with the same preprocessing; `rows` int64 [N] says
    which of them belongs to each record.
    """

    pixels: np.ndarray
    rows: np.ndarray

    @property
    def size(self) -> int:
        """Side of the square, pixels."""
        return int(self.pixels.shape[1])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """A copy of the pixels of some records, uint8 [n, S, S, 3]; `indices` int64 [n] count the manifest's records."""
        pixels: np.ndarray = np.asarray(self.pixels)[self.rows[indices]]
        return pixels

    def mean_std(self, indices: np.ndarray) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel in 0..1 over some records; whole-number sums, so no order matters."""
        if len(indices) == 0:
            raise DataError("there are no training images to take the mean and std of", "lower data.split.val and data.split.test")
        totals, squares = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
        step = max(1, _CHUNK_BYTES // (self.size * self.size * 3))
        for start in range(0, len(indices), step):
            flat = self.gather(indices[start : start + step]).reshape(-1, 3)
            for channel in range(3):
                counts = np.bincount(flat[:, channel], minlength=256)
                totals[channel] += counts @ _LEVELS
                squares[channel] += counts @ (_LEVELS * _LEVELS)
        return _moments(totals, squares, len(indices) * self.size * self.size)


_LEVELS = np.arange(256, dtype=np.int64)


def _moments(totals: np.ndarray, squares: np.ndarray, count: int) -> tuple[list[float], list[float]]:
    """Mean and std per channel from exact sums; a constant channel gets one grey level instead of a division by zero."""
    means, stds = [], []
    for total, square in zip(totals.tolist(), squares.tolist(), strict=True):
        variance = (square * count - total * total) / (count * count)  # whole numbers until the division
        means.append(total / count / 255)
        stds.append(max(variance**0.5, 1.0) / 255)
    return means, stds


def open_cache(manifest: Manifest, preprocess: Preprocess, settings: CacheSettings, progress: bool = False) -> PixelCache:
    """The pixels of all records, decoding only those that no earlier run has left.

    Raises:
        DataError: An image cannot be read, or changed since the manifest was written.
        StorageError: No space or no permission; what was there before is as it was.
    """
    store = _Store(Path(settings.dir) / _key(preprocess), preprocess.size)
    rows = store.read_index()
    missing = {record.sha256: record for record in manifest if record.sha256 not in rows}
    if missing:
        with storage_errors(store.dir), locked(store.dir / "lock"):
            rows = store.repaired_index()  # another run may have added some while this one waited
            todo = [record for sha256, record in missing.items() if sha256 not in rows]
            _fill(store, rows, todo, manifest, preprocess, settings, progress)
    return PixelCache(store.pixels(), np.array([rows[record.sha256] for record in manifest], dtype=np.int64))


def _key(preprocess: Preprocess) -> str:
    """What decides the pixels besides the file's bytes; another Pillow may decode differently."""
    parts = {**preprocess.as_dict(), "format": _FORMAT, "pillow": PIL.__version__.partition(".")[0]}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class _Store:
    """The two files of a cache: `pixels.u8` grows at its end, `index.txt` (one sha256 a row) says how much of it counts."""

    def __init__(self, directory: Path, size: int) -> None:
        self.dir, self.size, self.row_bytes = directory, size, size * size * 3
        self.pixels_path, self.index_path = directory / "pixels.u8", directory / "index.txt"

    def read_index(self) -> dict[str, int]:
        """sha256 -> row of all images in the cache; only as far as both files agree."""
        try:
            names = self.index_path.read_bytes().decode("ascii", "replace").split()
            whole_rows = self.pixels_path.stat().st_size // self.row_bytes
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StorageError(f"cannot read the pixel cache {str(self.dir)!r} ({error.strerror})", "choose another data.cache.dir=PATH") from error
        if not all(map(_SHA256.fullmatch, names)):
            log.warning("the index of the pixel cache %s is damaged: it is built anew", self.dir)
            return {}
        return {name: row for row, name in enumerate(names[:whole_rows])}

    def repaired_index(self) -> dict[str, int]:
        """As `read_index`, and the pixel file cut to it: what a crash left behind the index is dropped."""
        rows = self.read_index()
        if self.pixels_path.exists():
            os.truncate(self.pixels_path, len(rows) * self.row_bytes)
        return rows

    def check_space(self, count: int) -> None:
        """StorageError where `count` more images cannot fit."""
        needed, free = count * (self.row_bytes + 65), shutil.disk_usage(self.dir).free
        if needed > free:
            fact = f"the pixel cache needs {needed / 1e6:,.1f} MB in {str(self.dir)!r} and {free / 1e6:,.1f} MB are free"
            raise StorageError(fact, "free some space or choose another disk with data.cache.dir=PATH")

    def commit(self, file: IO[bytes], rows: dict[str, int]) -> None:
        """Make the rows count: first the pixels reach the disk, then the index names them."""
        file.flush()
        os.fsync(file.fileno())
        write_text(self.index_path, "".join(f"{name}\n" for name in rows))

    def pixels(self) -> np.ndarray:
        """All rows, mapped read-only: uint8 [M, S, S, 3]."""
        count = self.pixels_path.stat().st_size // self.row_bytes if self.pixels_path.exists() else 0
        if count == 0:  # an empty file cannot be mapped
            return np.zeros((0, self.size, self.size, 3), dtype=np.uint8)
        return np.memmap(self.pixels_path, dtype=np.uint8, mode="r", shape=(count, self.size, self.size, 3))


_SHA256 = re.compile(r"[0-9a-f]{64}")


def _fill(
    store: _Store, rows: dict[str, int], todo: list[Record], manifest: Manifest, preprocess: Preprocess, settings: CacheSettings, progress: bool
) -> None:
    """Append the images of `todo` and enter them in `rows`; on any failure the file ends where the index does."""
    store.check_space(len(todo))
    failures: list[UnreadableImage] = []
    changed: list[str] = []
    committed = len(rows)
    try:
        with store.pixels_path.open("ab") as file:
            for record, result in _decoded(todo, manifest, preprocess, settings, progress):
                if isinstance(result, UnreadableImage):
                    failures.append(result)
                elif result is None:
                    changed.append(record.path)
                else:
                    file.write(result.data)
                    rows[record.sha256] = len(rows)
                if len(rows) - committed >= _COMMIT:
                    store.commit(file, rows)
                    committed = len(rows)
            store.commit(file, rows)
            committed = len(rows)
    except BaseException:
        if store.pixels_path.exists():
            os.truncate(store.pixels_path, committed * store.row_bytes)
        raise
    if failures:
        raise unreadable(manifest.root, failures)
    if changed:
        fact = f"{len(changed)} images under {str(manifest.root)!r} changed since the manifest was written, {changed[0]!r} first"
        raise DataError(fact, "run the same command again to scan them anew")


def _decoded(
    todo: list[Record], manifest: Manifest, preprocess: Preprocess, settings: CacheSettings, progress: bool
) -> Iterable[tuple[Record, np.ndarray | UnreadableImage | None]]:
    """Each record with its pixels, why it has none, or None where its bytes changed; in the order of `todo`.

    Threads are enough: Pillow decodes and resizes outside the interpreter's lock, and nothing needs to be safe to fork or pickle.
    """
    workers = settings.workers or os.cpu_count() or 1
    length = max(1, min(_BLOCK, _BLOCK_BYTES // (3 * preprocess.size**2)))
    blocks = [todo[start : start + length] for start in range(0, len(todo), length)]
    steps = track(range(0, len(blocks), 4 * workers), "decoding images", disable=not progress, transient=True)
    with ThreadPoolExecutor(workers) as pool:
        for start in steps:  # a few blocks at a time, or finished pixels would pile up
            for block in pool.map(partial(_decode_block, manifest, preprocess), blocks[start : start + 4 * workers]):
                yield from block


def _decode_block(manifest: Manifest, preprocess: Preprocess, block: list[Record]) -> list[tuple[Record, np.ndarray | UnreadableImage | None]]:
    return [(record, _pixels(manifest.file(record), record.sha256, preprocess)) for record in block]


def _pixels(path: Path, sha256: str, preprocess: Preprocess) -> np.ndarray | UnreadableImage | None:
    try:
        content = load_bytes(path)
        if hashlib.sha256(content).hexdigest() != sha256:
            return None
        return preprocess(decode(content))
    except UnreadableImage as error:
        return UnreadableImage(path, error.reason)
