"""What --images can name, as a stream of Items: files, folders, globs, archives, tables, addresses on the web, standard input."""

from __future__ import annotations

import csv
import glob
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from image_classifier.dataset.table import is_table
from image_classifier.errors import DataError, SourceError
from image_classifier.images import DEFAULT_LIMITS, IMAGE_SUFFIXES, DecodeLimits, is_image_name
from image_classifier.inference.archives import ArchiveLimits, is_archive, is_archive_name, members
from image_classifier.inference.item import Item
from image_classifier.inference.urls import UrlLimits, Web, file_name, is_url

STDIN = "-"
_COLUMNS = ("path", "image")
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_HEAD = 512  # bytes that tell what something is
_SPOOL = 2**24  # bytes of a fetched archive that stay in memory


@dataclass(frozen=True)
class Inputs:
    """Where images come from, and what may be asked of this machine on the way.

    Args:
        stdin: Gives standard input when it is asked for.
    """

    items: Sequence[str]
    stdin: Callable[[], IO[bytes]]
    limits: DecodeLimits = DEFAULT_LIMITS
    archive: ArchiveLimits = field(default_factory=ArchiveLimits)
    web: Web = field(default_factory=lambda: Web(UrlLimits()))

    def check(self) -> None:
        """DataError for a folder or a pattern without an image and a table without paths, before anything is loaded; no address is asked."""
        for item in self.items:
            path = Path(item)
            if item == STDIN or is_url(item):
                continue
            if path.is_file() and is_table(path):
                next(_table(path), None)
            elif path.is_dir() or (glob.has_magic(item) and not path.exists()):
                found: Iterable[object] = _walk(item) if path.is_dir() else _matches(item)
                if next(iter(found), None) is None:
                    raise DataError(f"{item!r} holds no image", f"images end in {', '.join(sorted(IMAGE_SUFFIXES))}")

    def __iter__(self) -> Iterator[Item]:
        """Every image, in the order given; DataError where there is none at all."""
        empty = True
        for item in self.items:
            for found in self._expanded(item):
                empty = False
                yield found
        if empty:
            raise DataError("there is no image to answer for", "give files, folders, globs, archives, tables, URLs, or - for standard input")

    def _expanded(self, item: str) -> Iterator[Item]:
        path = Path(item)
        if item == STDIN:
            return self._of_stdin()
        if is_url(item):
            return self._of_url(item)
        if path.is_dir():
            return _walk(item)
        if path.exists() or not glob.has_magic(item):
            return self._of_file(path)
        return map(Item.file, map(Path, _matches(item)))

    def _of_file(self, path: Path) -> Iterator[Item]:
        if path.is_file() and is_archive_name(path.name):
            return self._of_archive(path)
        if path.is_file() and is_table(path):
            return (self._named(name) if name else Item.missing(str(path), "a row of the table has no path") for name in _table(path))
        return iter([Item.file(path)])

    def _named(self, name: str) -> Item:
        """One image of a list: a file, or an address."""
        return Item(name, partial(self.web.image, name, self.limits.max_bytes)) if is_url(name) else Item.file(Path(name))

    def _of_archive(self, path: Path) -> Iterator[Item]:
        try:
            file = path.open("rb")
        except OSError as error:
            yield Item.missing(str(path), f"cannot be opened ({error.strerror})")
            return
        with file:
            yield from members(file, str(path), self.archive, self.limits.max_bytes)

    def _of_url(self, url: str) -> Iterator[Item]:
        """An image that is fetched when it is its turn, or an archive; where the address does not tell, what lies there does."""
        if is_image_name(file_name(url)):
            yield self._named(url)
            return
        with tempfile.SpooledTemporaryFile(_SPOOL) as file:
            try:
                self.web.save(url, file)
            except SourceError as error:
                yield Item.missing(url, error.fact)
                return
            file.seek(0)
            head = file.read(_HEAD)
            file.seek(0)
            if is_archive(head):
                yield from members(file, url, self.archive, self.limits.max_bytes)
            else:
                yield Item(url, file.read(self.limits.max_bytes + 1))

    def _of_stdin(self) -> Iterator[Item]:
        """One image, where its bytes are what comes; else a list of paths and addresses."""
        stdin = self.stdin()
        head = stdin.read(_HEAD)
        if _is_picture(head):
            yield Item(STDIN, head + stdin.read(self.limits.max_bytes + 1 - len(head)))
            return
        lines = io.BufferedReader(_Rejoined(head, stdin))
        for line in lines:
            if name := os.fsdecode(line.rstrip(b"\r\n")):
                yield self._named(name)


def _is_picture(head: bytes) -> bool:
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    return head.startswith(_PICTURES) or bitmap or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


class _Rejoined(io.RawIOBase):
    """A stream with what was read of it put back."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self.head, self.rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        read = getattr(self.rest, "read1", self.rest.read)  # as soon as there is something
        block, self.head = self.head[: len(buffer)] or read(len(buffer)), self.head[len(buffer) :]
        buffer[: len(block)] = block
        return len(block)


def _walk(folder: str) -> Iterator[Item]:
    """The images below a folder, by name, without hidden ones; one folder's names are held at a time."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        yield Item.missing(folder, f"the folder cannot be listed ({error.strerror})")
        return
    for name, is_folder in found:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path)
        elif is_image_name(name) and os.path.isfile(path):
            yield Item.file(Path(path))


def _matches(pattern: str) -> Iterable[str]:
    return sorted(name for name in glob.iglob(pattern, recursive=True) if os.path.isfile(name))


def _table(path: Path) -> Iterator[str]:
    """The column `path` (or `image`) of a table, each value seen from the table's folder, addresses as they are, "" where there is none.

    Raises:
        DataError: The table cannot be read or has no such column.
    """
    values = _of_parquet(path) if path.suffix.lower() == ".parquet" else _of_text(path)
    for value in values:
        yield value if is_url(value) or not value.strip() else str(path.parent / value)


def _column(path: Path, names: Sequence[str]) -> str:
    known = {name.strip().lower(): name for name in reversed(names)}
    found = next((known[name] for name in _COLUMNS if name in known), None)
    if found is None:
        raise DataError(f"the table {str(path)!r} has no column path and no column image", f"its columns are {', '.join(names)[:100]}")
    return found


def _of_text(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as binary:
            wide = binary.read(2) in (b"\xff\xfe", b"\xfe\xff")
        with path.open(encoding="utf-16" if wide else "utf-8-sig", errors="replace" if wide else "surrogateescape", newline="") as file:
            header = file.readline()
            file.seek(0)
            semicolons = ";" in header and "," not in header
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if semicolons else ","
            rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            names = next(rows, [])
            place = names.index(_column(path, names))
            yield from (row[place] if place < len(row) else "" for row in rows if row)
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read the table {str(path)!r} ({reason})", "check it, its path and its permissions") from error


def _of_parquet(path: Path) -> Iterator[str]:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]  # here, as it takes half a second

    try:
        with parquet.ParquetFile(path) as file:
            column = _column(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=4096, columns=[column]):
                yield from ("" if value is None else str(value) for value in batch.column(0).to_pylist())
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise DataError(
            f"cannot read the table {str(path)!r} ({' '.join(str(error).split())[:100]})", "check it, its path and its permissions"
        ) from error
