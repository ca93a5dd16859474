"""What --images can name, as a stream of Items: files, folders, globs, archives, tables, addresses on the web or in S3, standard input."""

from __future__ import annotations

import csv
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from image_classifier.errors import ConfigError, DataError, SourceError, storage_errors
from image_classifier.images import DEFAULT_LIMITS, IMAGE_SUFFIXES, DecodeLimits, is_image_name
from image_classifier.sources.archive import ArchiveLimits, is_archive, is_archive_name, members
from image_classifier.sources.image_source import ImageSource
from image_classifier.sources.object_store import Storage, is_stored
from image_classifier.sources.stdin import HEAD, is_picture, lines, read_head
from image_classifier.sources.table import is_table
from image_classifier.sources.web import UrlLimits, WebClient, file_name, is_url

STDIN = "-"
_COLUMNS = ("path", "image")
_SPOOL = 2**24  # bytes of an archive that comes as a stream which stay in memory


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
    web: WebClient = field(default_factory=lambda: WebClient(UrlLimits()))
    storage: Storage = field(default_factory=Storage.here)

    def check(self) -> None:
        """DataError for a folder or a pattern without an image and a table without paths, before anything is loaded; no address is asked."""
        for item in self.items:
            path = Path(item)
            _check_package(item)
            if item == STDIN or is_address(item):
                continue
            if os.path.isfile(item) and is_table(path):
                next(_table(path), None)
            elif os.path.isdir(item) or (glob.has_magic(item) and not os.path.exists(item)):
                found: Iterable[object] = _walk(item) if os.path.isdir(item) else _matches(item)
                if next(iter(found), None) is None:
                    raise DataError(f"{item!r} holds no image", f"images end in {', '.join(sorted(IMAGE_SUFFIXES))}")

    def __iter__(self) -> Iterator[ImageSource]:
        """Every image, in the order given; DataError where there is none at all."""
        empty = True
        for item in self.items:
            for found in self._expanded(item):
                empty = False
                yield found
        if empty:
            raise DataError(
                "there is no image to answer for",
                "give files, folders, globs, archives, tables, URLs, s3:// or - for standard input",
            )

    def _expanded(self, item: str) -> Iterator[ImageSource]:
        path = Path(item)
        if item == STDIN:
            return self._of_stdin()
        if is_url(item):
            return self._of_url(item)
        if is_stored(item):
            return self.storage.items(item, self.limits.max_bytes)
        if os.path.isdir(item):
            return _walk(item)
        if os.path.exists(item) or not glob.has_magic(item):
            return self._of_file(path)
        return map(ImageSource.file, map(Path, _matches(item)))

    def _of_file(self, path: Path) -> Iterator[ImageSource]:
        if os.path.isfile(path) and is_archive_name(path.name):
            return self._of_archive(path)
        if os.path.isfile(path) and is_table(path):
            return (
                self._named(name) if name else ImageSource.missing(str(path), "a row of the table has no path")
                for name in _table(path)
            )
        return iter([ImageSource.file(path)])

    def _named(self, name: str) -> ImageSource:
        """One image of a list: a file, or an address."""
        if is_stored(name):
            return self.storage.item(name, self.limits.max_bytes)
        return (
            ImageSource(name, partial(self.web.image, name, self.limits.max_bytes))
            if is_url(name)
            else ImageSource.file(Path(name))
        )

    def _of_archive(self, path: Path) -> Iterator[ImageSource]:
        try:
            file = path.open("rb")
        except OSError as error:
            yield ImageSource.missing(str(path), f"cannot be opened ({error.strerror})")
            return
        with file:
            yield from members(file, str(path), self.archive, self.limits.max_bytes)

    def _of_url(self, url: str) -> Iterator[ImageSource]:
        """An image that is fetched when it is its turn, or an archive; where the address does not tell, what lies there does."""
        if is_image_name(file_name(url)):
            yield self._named(url)
            return
        with _spool() as file:
            try:
                for block in self.web.blocks(url, self.web.limits.max_bytes):
                    file.write(block)
            except SourceError as error:
                yield ImageSource.missing(url, error.fact)
                return
            file.seek(0)
            head = file.read(HEAD)
            file.seek(0)
            if is_archive(head):
                yield from members(file, url, self.archive, self.limits.max_bytes)
            else:
                yield ImageSource(url, file.read(self.limits.max_bytes + 1))

    def _of_stdin(self) -> Iterator[ImageSource]:
        """One image or archive, where its bytes are what comes; else a list of paths and addresses."""
        stdin = self.stdin()
        head = read_head(stdin)
        if is_picture(head):
            yield ImageSource(STDIN, head + stdin.read(self.limits.max_bytes + 1 - len(head)))
        elif is_archive(head):
            with _spool() as file:
                file.write(head)
                shutil.copyfileobj(stdin, file)
                file.seek(0)
                yield from members(file, STDIN, self.archive, self.limits.max_bytes)
        else:
            yield from map(self._named, lines(head, stdin))


@contextmanager
def _spool() -> Iterator[IO[bytes]]:
    """Room for an archive that comes as a stream; StorageError where the disk has none."""
    with storage_errors(tempfile.gettempdir()), tempfile.SpooledTemporaryFile(_SPOOL) as file:
        yield file


def _check_package(item: str) -> None:
    name = file_name(item) if is_url(item) else item
    if name.lower().endswith((".parquet", ".tar.zst", ".tzst")) and find_spec("pyarrow") is None:
        raise ConfigError(f"{item!r} needs a package that is not installed", "pip install pyarrow")


def is_address(item: str) -> bool:
    """Whether this is no path of this machine, but an address on the web or in S3-like storage."""
    return is_url(item) or is_stored(item)


def _walk(folder: str) -> Iterator[ImageSource]:
    """The images below a folder, by name, without hidden ones; one folder's names are held at a time."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries if not entry.name.startswith(".")
            )
    except OSError as error:
        yield ImageSource.missing(folder, f"the folder cannot be listed ({error.strerror})")
        return
    for name, is_folder in found:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path)
        elif is_image_name(name) and os.path.isfile(path):
            yield ImageSource.file(Path(path))


def _matches(pattern: str) -> Iterable[str]:
    return sorted(name for name in glob.iglob(pattern, recursive=True) if os.path.isfile(name))


def _table(path: Path) -> Iterator[str]:
    """The column `path` (or `image`) of a table, each value seen from the table's folder, addresses as they are, "" where there is none.

    Raises:
        DataError: The table cannot be read or has no such column.
    """
    values = _of_parquet(path) if path.suffix.lower() == ".parquet" else _of_text(path)
    for value in values:
        yield value if is_address(value) or not value.strip() else str(path.parent / value)


def _column(path: Path, names: Sequence[str]) -> str:
    known = {name.strip().lower(): name for name in reversed(names)}
    found = next((known[name] for name in _COLUMNS if name in known), None)
    if found is None:
        raise DataError(
            f"the table {str(path)!r} has no column path and no column image",
            f"its columns are {', '.join(names)[:100]}",
        )
    return found


def _of_text(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as binary:
            wide = binary.read(2) in (b"\xff\xfe", b"\xfe\xff")
        with path.open(
            encoding="utf-16" if wide else "utf-8-sig", errors="replace" if wide else "surrogateescape", newline=""
        ) as file:
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
        raise DataError(
            f"cannot read the table {str(path)!r} ({reason})", "check it, its path and its permissions"
        ) from error


def _of_parquet(path: Path) -> Iterator[str]:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]  # here, as it takes half a second

    try:
        with parquet.ParquetFile(path) as file:
            column = _column(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=4096, columns=[column]):
                yield from ("" if value is None else str(value) for value in batch.column(0).to_pylist())
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise DataError(
            f"cannot read the table {str(path)!r} ({' '.join(str(error).split())[:100]})",
            "check it, its path and its permissions",
        ) from error
