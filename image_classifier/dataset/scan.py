"""One look at each file of a tree: content hash, what its header says, and a thumbnail; files that did not change are not opened again."""

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
_LEAST = (64, 64)  # a JPEG may be decoded at a part of its size, as long as this is left to make the thumbnail from
_BLOCK_FILES, _BLOCK_BYTES = (
    256,
    4 * 2**20,
)  # of one task: enough to be worth sending, and done in a good part of a second
_COMMIT_FILES, _COMMIT_SECONDS = 16_384, 60.0  # what a kill can cost of a long scan
_TICK_NS = 2 * 10**9  # the coarsest clock of a file system in use (FAT)
_STAMPS = ("size", "mtime_ns", "ctime_ns")
_LOOK_AGAIN = -2  # as a size: no file has it


@dataclass(frozen=True)
class FileMetadata:
    """What one look at each image of a tree told, a row each, in the tree's order.

    `digests` is the sha256 of the file's bytes, uint8 [N, 32]; `widths` and `heights` are in pixels after EXIF orientation, int32 [N];
    `formats` and `modes` uint8 [N] count in `format_names` and `mode_names` (Pillow's); `orientation` int8 [N] is EXIF's 1..8;
    `frames` int32 [N]; `bits` a sample int8 [N]; `transparent` bool [N]; `thumbnails` uint8 RGB [N, 16, 16, 3], mapped from the disk.
    `errors` says why a row could not be decoded: all else in it is zero but the digest, and that too where the file could not be read.
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
        """Which rows, bool [N], could be decoded."""
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
    """The facts of all images of a tree, of which only new and changed files are opened.

    A file counts as unchanged while its path, size, mtime and ctime stay. One that changed less than a tick of the clock before it was
    read, or that could not be read, is read again the next time.

    Args:
        tree: What `tree.find` found.
        store_dir: Where facts are kept between scans, in a folder for each root and settings. Two scans at once wait for one another.
        limits: What a file may ask of the machine; one that asks for more has an error.
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
    """What decides the facts besides the files themselves; another Pillow may decode differently."""
    parts = (
        os.path.realpath(root),
        astuple(limits),
        tuple(background),
        _LEAST,
        THUMBNAIL,
        _FORMAT,
        PIL.__version__.partition(".")[0],
    )
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:8]


class _Scan:
    """One scan: what earlier ones know, what is to be read, and the two brought together."""

    def __init__(self, tree: FileTree, store: ScanCache, look: _FileResult) -> None:
        self.images, self.store, self.look = tree.images, store, look
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
            kept = [
                row for path, row in self.others.items() if os.path.lexists(self.look.root / path)
            ]  # of another part of the same tree
            self.blocks = [self.store.replace(self.blocks, np.concatenate([self.rows, np.array(kept, dtype=np.int64)]))]
            start = 0
        return _facts(self.blocks[0], slice(start, start + len(self.images)))

    def _known(self) -> tuple[np.ndarray, dict[str, int]]:
        """For each image its row in the blocks, -1 where there is none of this file; and the rows of other paths."""
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
        """Read what is to be read into further blocks: in the store as long as it goes on, in memory what comes last."""
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

        As in git's index: a file whose clock stood at the moment of the scan may change once more within the same tick, unseen.
        """
        for name, column in zip(_STAMPS, stamps.T, strict=True):
            table[name] = column
        racing = (np.abs(stamps[:, 1:] - self.started_ns) <= _TICK_NS).any(axis=1) | (stamps[:, 2] > self.started_ns)
        limit = self.look.limits.max_bytes
        unread = (
            ~table["digest"].any(axis=1) & (stamps[:, 0] > 0) & (stamps[:, 0] <= limit)
        )  # no permission, a disk's error
        table["size"][racing | unread] = _LOOK_AGAIN


@dataclass(frozen=True)
class _FileResult:
    """How a file is looked at; small enough to be sent to another process."""

    root: Path
    limits: DecodeLimits
    background: tuple[int, int, int]

    def read_block(self, paths: list[str]) -> Block:
        """The facts of some files, their stamps still open."""
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
            header, pixels = inspect(content, self.limits, self.background, at_least=_LEAST)
        except UnreadableImage as error:
            if not isinstance(error.__cause__, MemoryError):  # that is none of the file's making: it stays unread
                row["digest"] = _digest(content)
            raise
        row["digest"] = _digest(content)
        for name in ("width", "height", "frames", "format", "mode", "orientation", "bits", "transparent"):
            row[name] = getattr(header, name)
        thumbnail[:] = np.asarray(Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC))


def _digest(content: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(content).digest(), dtype=np.uint8)


def _tasks(images: Sequence[ImageFile], rows: np.ndarray) -> list[list[str]]:
    """The paths of some images, in lists that are worth a task each."""
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


def _facts(block: Block, rows: slice) -> FileMetadata:
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
    """Short names [N] as uint8 [N] and the names that these count in."""
    values, codes = np.unique(
        np.ascontiguousarray(names).view("<u8"), return_inverse=True
    )  # numbers are sorted faster than texts
    return codes.astype(np.uint8), tuple(name.decode("ascii") for name in values.view("S8").tolist())
