"""Scan of a tree: content hash, header and thumbnail of each file; unchanged files are not opened again."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from image_classifier.atomic_io import file_lock
from image_classifier.dataset.discovery import FileTree, ImageFile
from image_classifier.dataset.scan_cache import ROW, THUMBNAIL, THUMBNAIL_SHAPE, Block, ScanCache
from image_classifier.dataset.workers import map_blocks
from image_classifier.errors import UnreadableImage, storage_errors
from image_classifier.images import DecodeLimits, inspect, load_bytes

__all__ = ["THUMBNAIL", "FileMetadata", "scan_files"]

_FORMAT = 1
_MIN_SIZE = (64, 64)  # a JPEG may be decoded at a fraction of its size, as long as this is left for the thumbnail
# Of one task: enough to be worth sending, and done in a fraction of a second.
_BLOCK_FILES = 256
_BLOCK_BYTES = 4 * 2**20
# What a kill can cost of a long scan.
_COMMIT_FILES = 16_384
_COMMIT_SECONDS = 60.0
_TICK_NS = 2 * 10**9  # the coarsest clock of a file system in use (FAT)
_STAMPS = ("size", "mtime_ns", "ctime_ns")
_READ_AGAIN = -2  # as a size: no file has it


@dataclass(frozen=True)
class FileMetadata:
    """Metadata of each image of a tree, a row each, in the tree's order.

    Attributes:
        digests: sha256 of the file's bytes, uint8 [N, 32].
        widths, heights: Pixels after EXIF orientation, int32 [N].
        formats, modes: Index in `format_names` and `mode_names` (Pillow's), uint8 [N].
        orientation: EXIF's 1 to 8, int8 [N].
        frames: int32 [N].
        bits: Bits of a sample, int8 [N].
        transparent: bool [N].
        thumbnails: RGB, uint8 [N, 16, 16, 3], mapped from the disk.
        errors: Row -> why it could not be decoded. All else in that row is zero, except for the digest of a file that
            could be read.
    """

    digests: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    formats: np.ndarray
    format_names: tuple[str, ...]
    modes: np.ndarray
    mode_names: tuple[str, ...]
    orientation: np.ndarray
    frames: np.ndarray
    bits: np.ndarray
    transparent: np.ndarray
    thumbnails: np.ndarray
    errors: dict[int, str]

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def readable(self) -> np.ndarray:
        """The rows that could be decoded, bool [N]."""
        mask = np.ones(len(self), dtype=bool)
        mask[list(self.errors)] = False
        return mask


def scan_files(
    tree: FileTree,
    store_dir: Path,
    limits: DecodeLimits,
    background: tuple[int, int, int],
    workers: int | None = None,
    progress: bool = False,
) -> FileMetadata:
    """Return the metadata of all images of a tree; only new and changed files are opened.

    A file is unchanged while its path, size, mtime and ctime stay. One that changed less than a tick of the clock
    before it was read, or that could not be read, is read again the next time.

    Args:
        tree: The files, as of `discovery.discover`.
        store_dir: Where metadata is kept between scans, in a folder for each root and settings. Two scans at once wait
            for one another.
        limits: Of a file; one that exceeds them has an error.
        background: The colour under transparent pixels.
        workers: Threads or processes; None for one a core.
        progress: Whether to show a bar on standard error.

    Raises:
        StorageError: The store cannot be written.
        DataError: A worker was killed.
    """
    store = ScanCache(store_dir / _key(tree.root, limits, background))
    with storage_errors(store.dir), file_lock(store.dir / "lock"):
        scan = _Scan(tree, store, _FileResult(tree.root, limits, background))
        return scan.run(workers, "reading images" if progress else None)


def _key(root: Path, limits: DecodeLimits, background: tuple[int, int, int]) -> str:
    """Return a hash of what decides the metadata besides the files; another Pillow may decode differently."""
    parts = (
        os.path.realpath(root),
        astuple(limits),
        tuple(background),
        _MIN_SIZE,
        THUMBNAIL,
        _FORMAT,
        PIL.__version__.partition(".")[0],
    )
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:8]


class _Scan:
    """One scan: metadata of earlier ones, the files still to read, and both put together."""

    def __init__(self, tree: FileTree, store: ScanCache, look: _FileResult) -> None:
        self.images = tree.images
        self.store = store
        self.look = look
        self.started_ns = time.time_ns()
        self.blocks = store.load()
        self.stamps = np.stack(
            [np.array([getattr(image, name) for image in tree.images], dtype=np.int64) for name in _STAMPS], axis=1
        )
        self.rows, self.others = self._known()
        self.todo = np.flatnonzero(self.rows < 0)

    def run(self, workers: int | None, progress: str | None) -> FileMetadata:
        self._read(workers, progress)
        start = int(self.rows[0]) if len(self.rows) else 0
        in_place = len(self.blocks) == 1 and np.array_equal(self.rows, np.arange(start, start + len(self.rows)))
        if len(self.todo) or not in_place:
            # Files of another part of the same tree stay known.
            kept = [row for path, row in self.others.items() if os.path.lexists(self.look.root / path)]
            self.blocks = [self.store.replace(self.blocks, np.concatenate([self.rows, np.array(kept, dtype=np.int64)]))]
            start = 0
        return _metadata(self.blocks[0], slice(start, start + len(self.images)))

    def _known(self) -> tuple[np.ndarray, dict[str, int]]:
        """Return the row of each image in the blocks, -1 for none of this file; and the rows of other paths."""
        index: dict[str, int] = {}
        count = 0
        for block in self.blocks:
            index.update(zip(block.paths, range(count, count + len(block.paths)), strict=True))
            count += len(block.paths)
        rows = np.fromiter((index.pop(image.path, -1) for image in self.images), dtype=np.int64, count=len(self.images))
        if self.blocks:
            columns = [np.concatenate([block.table[name] for block in self.blocks]) for name in _STAMPS]
            same = (np.stack(columns, axis=1)[rows] == self.stamps).all(axis=1) & (self.stamps[:, 0] >= 0)
            rows[~same] = -1
        return rows, index

    def _read(self, workers: int | None, progress: str | None) -> None:
        """Read files into further blocks, which are stored as the scan goes on; the last one stays in memory."""
        count = sum(len(block.paths) for block in self.blocks)
        self.rows[self.todo] = np.arange(count, count + len(self.todo))
        pending: list[Block] = []
        files, committed = 0, time.monotonic()
        tasks = _tasks(self.images, self.todo)
        try:
            with closing(map_blocks(self.look.read_block, tasks, len(self.todo), workers, progress)) as blocks:
                for block in blocks:
                    self._stamp(block.table, self.stamps[self.todo[files : files + len(block.paths)]])
                    pending.append(block)
                    files += len(block.paths)
                    if (
                        sum(len(part.paths) for part in pending) >= _COMMIT_FILES
                        or time.monotonic() - committed > _COMMIT_SECONDS
                    ):
                        self.blocks.append(self.store.append(_joined(pending)))
                        pending, committed = [], time.monotonic()
        except KeyboardInterrupt:
            if pending:
                self.store.append(_joined(pending))
            raise
        if pending:
            self.blocks.append(_joined(pending))

    def _stamp(self, table: np.ndarray, stamps: np.ndarray) -> None:
        """Note how the files were when they were read, or that they must be looked at again.

        As in git's index: a file that changed at the moment of the scan may change again, unseen, in the same tick.
        """
        for name, column in zip(_STAMPS, stamps.T, strict=True):
            table[name] = column
        racing = (np.abs(stamps[:, 1:] - self.started_ns) <= _TICK_NS).any(axis=1) | (stamps[:, 2] > self.started_ns)
        limit = self.look.limits.max_bytes
        # No permission, or an error of the disk.
        unread = ~table["digest"].any(axis=1) & (stamps[:, 0] > 0) & (stamps[:, 0] <= limit)
        table["size"][racing | unread] = _READ_AGAIN


@dataclass(frozen=True)
class _FileResult:
    """Reads the metadata of files; small enough to be sent to another process."""

    root: Path
    limits: DecodeLimits
    background: tuple[int, int, int]

    def read_block(self, paths: list[str]) -> Block:
        """Return the metadata of some files, without their size and times."""
        block = Block(
            paths, np.zeros(len(paths), dtype=ROW), np.zeros((len(paths), *THUMBNAIL_SHAPE), dtype=np.uint8), {}
        )
        for row, path in enumerate(paths):
            try:
                self._read(self.root / path, block.table[row], block.thumbnails[row])
            except UnreadableImage as error:
                block.errors[row] = error.reason
        return block

    def _read(self, path: Path, row: np.void, thumbnail: np.ndarray) -> None:
        content = load_bytes(path, self.limits)
        try:
            header, pixels = inspect(content, self.limits, self.background, at_least=_MIN_SIZE)
        except UnreadableImage as error:
            if not isinstance(error.__cause__, MemoryError):  # not the file's fault: it is read again the next time
                row["digest"] = _digest(content)
            raise
        row["digest"] = _digest(content)
        for name in ("width", "height", "frames", "format", "mode", "orientation", "bits", "transparent"):
            row[name] = getattr(header, name)
        thumbnail[:] = np.asarray(Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC))


def _digest(content: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(content).digest(), dtype=np.uint8)


def _tasks(images: Sequence[ImageFile], rows: np.ndarray) -> list[list[str]]:
    """Return the paths of some images, in lists that are worth a task each."""
    tasks: list[list[str]] = []
    room = 0
    for row in rows.tolist():
        image = images[row]
        if room <= 0 or len(tasks[-1]) >= _BLOCK_FILES:
            tasks.append([])
            room = _BLOCK_BYTES
        tasks[-1].append(image.path)
        room -= max(image.size, 1)
    return tasks


def _joined(blocks: Sequence[Block]) -> Block:
    starts = np.cumsum([0, *(len(block.paths) for block in blocks)]).tolist()
    errors = {
        start + row: reason
        for start, block in zip(starts, blocks, strict=False)
        for row, reason in block.errors.items()
    }
    table, thumbnails = (
        np.concatenate(parts) for parts in zip(*((block.table, block.thumbnails) for block in blocks), strict=True)
    )
    return Block([path for block in blocks for path in block.paths], table, thumbnails, errors)


def _metadata(block: Block, rows: slice) -> FileMetadata:
    table = block.table[rows]
    formats, format_names = _codes(table["format"])
    modes, mode_names = _codes(table["mode"])
    return FileMetadata(
        digests=np.array(table["digest"]),
        widths=np.array(table["width"]),
        heights=np.array(table["height"]),
        formats=formats,
        format_names=format_names,
        modes=modes,
        mode_names=mode_names,
        orientation=np.array(table["orientation"]),
        frames=np.array(table["frames"]),
        bits=np.array(table["bits"]),
        transparent=np.array(table["transparent"]),
        thumbnails=block.thumbnails[rows],
        errors={
            row - rows.start: reason for row, reason in sorted(block.errors.items()) if rows.start <= row < rows.stop
        },
    )


def _codes(names: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return short names [N] as indices, uint8 [N], and the names they point to."""
    # As numbers, which are sorted faster than texts.
    values, codes = np.unique(np.ascontiguousarray(names).view("<u8"), return_inverse=True)
    return codes.astype(np.uint8), tuple(name.decode("ascii") for name in values.view("S8").tolist())
