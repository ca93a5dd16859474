"""Metadata of files between scans: numbered folders of columns, each complete or absent; later ones win."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.atomic_io import atomic_directory

log = logging.getLogger(__name__)

THUMBNAIL = 16
THUMBNAIL_SHAPE = (THUMBNAIL, THUMBNAIL, 3)
ROW = np.dtype(
    [
        ("size", "<i8"),  # the file's size, mtime_ns and ctime_ns when it was read
        ("mtime_ns", "<i8"),
        ("ctime_ns", "<i8"),
        ("digest", "u1", 32),
        ("width", "<i4"),
        ("height", "<i4"),
        ("frames", "<i4"),
        ("format", "S8"),
        ("mode", "S8"),
        ("orientation", "i1"),
        ("bits", "i1"),
        ("transparent", "?"),
    ]
)
_NUMBER = re.compile(r"\d{8}")
_CHUNK = 16_384


@dataclass(frozen=True)
class Block:
    """Metadata of some files: `table` ROW [N], `thumbnails` uint8 [N, 16, 16, 3], `errors` row -> reason."""

    paths: list[str]
    table: np.ndarray
    thumbnails: np.ndarray
    errors: dict[int, str]


class ScanCache:
    """The blocks in one folder; the writer holds a lock. After a kill a block may be missing, none is incomplete."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory

    def load(self) -> list[Block]:
        """Return the blocks, oldest first; a damaged one is skipped and its files are read again."""
        return [block for folder in self._folders() if (block := _read(folder)) is not None]

    def append(self, block: Block) -> Block:
        """Store one more block; return it as it is on the disk."""
        return self._written([block], np.arange(len(block.paths)))

    def replace(self, blocks: Sequence[Block], rows: np.ndarray) -> Block:
        """Store some rows of `blocks` (numbered through all) and nothing else; return them as they are on disk."""
        block = self._written(blocks, rows)
        newest = self._folders()[-1].name
        for path in self.dir.iterdir():
            if path.is_dir() and path.name != newest:  # older blocks, and those of killed processes
                shutil.rmtree(path, ignore_errors=True)
        return block

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.dir.iterdir() if _NUMBER.fullmatch(path.name))

    def _written(self, blocks: Sequence[Block], rows: np.ndarray) -> Block:
        numbers = [int(folder.name) for folder in self._folders()]
        folder = self.dir / f"{max(numbers, default=0) + 1:08d}"
        with atomic_directory(folder) as part:
            _write(part, blocks, rows)
        written = _read(folder)
        if written is None:
            raise RuntimeError(f"{folder} cannot be read back")
        return written


def _write(folder: Path, blocks: Sequence[Block], rows: np.ndarray) -> None:
    paths = [path for block in blocks for path in block.paths]
    picked = (paths[row] for row in rows.tolist())
    (folder / "paths.bin").write_bytes("\0".join(picked).encode("utf-8", "surrogatepass"))
    table = io.BytesIO()  # numpy, writing to the file itself, would not report why it fails
    np.save(table, np.concatenate([block.table for block in blocks])[rows])
    (folder / "table.npy").write_bytes(table.getbuffer())
    (folder / "errors.json").write_text(json.dumps(_errors(blocks, rows)), encoding="ascii")
    # Written, not mapped: a full disk is then an error and no SIGBUS.
    with (folder / "thumbnails.npy").open("wb") as file:
        header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *THUMBNAIL_SHAPE)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in _thumbnails(blocks, rows):
            file.write(chunk.data)


def _errors(blocks: Sequence[Block], rows: np.ndarray) -> dict[int, str]:
    positions = (
        {row: position for position, row in enumerate(rows.tolist())} if any(block.errors for block in blocks) else {}
    )
    errors: dict[int, str] = {}
    start = 0
    for block in blocks:
        errors |= {positions[start + row]: reason for row, reason in block.errors.items() if start + row in positions}
        start += len(block.paths)
    return errors


def _thumbnails(blocks: Sequence[Block], rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the thumbnails of `rows`, a few at a time."""
    starts = np.cumsum([0, *(len(block.paths) for block in blocks)])
    for begin in range(0, len(rows), _CHUNK):
        some = rows[begin : begin + _CHUNK]
        chunk = np.empty((len(some), *THUMBNAIL_SHAPE), dtype=np.uint8)
        block_of = np.searchsorted(starts, some, side="right") - 1
        for number in np.unique(block_of).tolist():
            here = block_of == number
            chunk[here] = blocks[number].thumbnails[some[here] - starts[number]]
        yield chunk


def _read(folder: Path) -> Block | None:
    try:
        paths = (folder / "paths.bin").read_bytes().decode("utf-8", "surrogatepass").split("\0")
        table = np.load(folder / "table.npy", mmap_mode="r")
        thumbnails = np.load(folder / "thumbnails.npy", mmap_mode="r")
        errors = {int(row): str(reason) for row, reason in json.loads((folder / "errors.json").read_bytes()).items()}
    except (FileNotFoundError, ValueError, EOFError, AttributeError) as error:
        log.warning("%s is damaged and built again (%s)", folder, error)
        return None
    complete = (
        table.dtype == ROW and table.shape == (len(paths),) and thumbnails.shape == (len(paths), *THUMBNAIL_SHAPE)
    )
    if not complete or any(not 0 <= row < len(paths) for row in errors):
        log.warning("%s is damaged and built again", folder)
        return None
    return Block(paths, table, thumbnails, errors)
