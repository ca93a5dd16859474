"""Tables of images: CSV, TSV and Parquet files.

For training they have the columns path and label, and perhaps split and a group; for inference path or image is enough.
`read_rows` is the only reader.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.errors import DataError
from image_classifier.sources.suffixes import TABLE_SUFFIXES
from image_classifier.text import counted

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_IMAGE_COLUMNS = ("path", "image")
_ABSENT = (FileNotFoundError, NotADirectoryError, ValueError)  # ValueError: a path with a zero character
_BATCH_ROWS = 4096

Rows = Iterator[tuple[str, list[str]]]
"""Where each row stands, `line 7` or `row 7`, and its values."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One image of a table.

    `path` is absolute, `split` "" where the table does not give it, `status` None where the file cannot be looked at.
    """

    path: str
    label: str
    split: str
    key: str
    status: os.stat_result | None


def is_table(path: Path) -> bool:
    """Return whether a path is taken for a table: by its suffix, unless it is a folder."""
    return path.suffix.lower() in TABLE_SUFFIXES and not path.is_dir()


def read_table(path: Path, group_column: str | None = None) -> list[TableRow]:
    """Return the rows of a table for training, in its order.

    Args:
        path: A .csv (commas or semicolons), .tsv or .parquet file; text in UTF-8, with or without a byte order mark, or
            UTF-16 with one. Its paths start from its own folder or from the root of the file system.
        group_column: The column that the rows' `key` comes from, if there is such a column.

    Raises:
        DataError: It cannot be read, lacks a column, or a row is wrong: no label, an unknown split, or a file that does
            not exist or was named before. The message names the first such row.
    """
    group = _column(group_column or "")

    def wanted(names: Sequence[str]) -> list[str]:
        missing = {"path", "label"} - set(map(_column, names))
        if missing:
            raise _no_column(path, sorted(missing, reverse=True), names, "it needs path and label")
        return [name for name in names if _column(name) in ("path", "label", "split", group)]

    rows = read_rows(path, wanted)
    _, columns = next(rows)
    reader = _TrainingReader(path, columns, group)
    images = [reader.row(location, values) for location, values in rows]
    if not images:
        raise DataError(f"the table {str(path)!r} holds no rows", "give it one row per image: path,label")
    reader.check_absent()
    return images


def read_paths(path: Path) -> Iterator[str]:
    """Yield the column `path` (or `image`) of a table for inference, in its order; "" where a row has none.

    Raises:
        DataError: The table cannot be read or has no such column.
    """

    def wanted(names: Sequence[str]) -> list[str]:
        known = {_column(name): name for name in reversed(names)}
        name = next((known[name] for name in _IMAGE_COLUMNS if name in known), None)
        if name is None:
            raise _no_column(path, _IMAGE_COLUMNS, names, "it needs one of them")
        return [name]

    rows = read_rows(path, wanted)
    _, columns = next(rows)
    index = columns.index(wanted(columns)[0])
    yield from (values[index] if index < len(values) else "" for _, values in rows)


def read_rows(path: Path, wanted: Callable[[Sequence[str]], Sequence[str]]) -> Rows:
    """Yield the column names of a table, then its rows, as they are read.

    Args:
        path: See `read_table`.
        wanted: Called with all column names; returns those to read, or raises DataError. Text files give all columns.

    Raises:
        DataError: The file cannot be read.
    """
    return _parquet_rows(path, wanted) if path.suffix.lower() == ".parquet" else _text_rows(path, wanted)


def _text_rows(path: Path, wanted: Callable[[Sequence[str]], Sequence[str]]) -> Rows:
    try:
        with path.open("rb") as binary:
            utf16 = binary.read(2) in (b"\xff\xfe", b"\xfe\xff")
        encoding, errors = ("utf-16", "replace") if utf16 else ("utf-8-sig", "surrogateescape")
        with path.open(encoding=encoding, errors=errors, newline="") as file:
            header = file.readline()
            file.seek(0)
            lines = csv.reader(file, delimiter=_delimiter(path, header), skipinitialspace=True, strict=True)
            rows = _numbered(path, lines)
            columns = next(rows, None)
            if columns is None:
                hint = "give it a first line path,label and one row per image"
                raise DataError(f"the table {str(path)!r} is empty", hint)
            wanted(columns[1])
            yield columns
            yield from rows
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def _delimiter(path: Path, header: str) -> str:
    """Return what separates values: spreadsheets write semicolons where the comma is the decimal point.

    >>> _delimiter(Path("a.csv"), "path;label"), _delimiter(Path("a.csv"), "path,label;x")
    (';', ',')
    """
    if path.suffix.lower() == ".tsv":
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _numbered(path: Path, lines: Any) -> Rows:
    """Yield the lines of a csv.reader that are not empty, each with its number."""
    while True:
        location = f"line {lines.line_num + 1}"
        try:
            values = next(lines, None)
        except csv.Error as error:
            raise DataError(f"{location} of {str(path)!r} is not CSV ({error})", "correct the table") from error
        if values is None:
            return
        if values:
            yield location, values


def _parquet_rows(path: Path, wanted: Callable[[Sequence[str]], Sequence[str]]) -> Rows:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]  # imported here: it takes half a second

    try:
        with parquet.ParquetFile(path) as file:
            columns = list(wanted(file.schema_arrow.names))  # not all: others may hold the pictures
            yield "header", columns
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for row in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                    number += 1
                    yield f"row {number}", ["" if value is None else str(value) for value in row]
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except ValueError as error:  # pyarrow's errors
        raise _unreadable(path, f"not a Parquet file: {' '.join(str(error).split())[:100]}") from error


def _unreadable(path: Path, reason: str) -> DataError:
    return DataError(f"cannot read the table {str(path)!r} ({reason})", "check the file, its path and its permissions")


def _no_column(path: Path, missing: Sequence[str], columns: Sequence[str], needs: str) -> DataError:
    fact = f"the table {str(path)!r} has no column {' and no column '.join(missing)}"
    return DataError(fact, f"its columns are {', '.join(columns)[:100]}; {needs}")


def _column(name: str) -> str:
    return name.strip().lower()


class _TrainingReader:
    """Turns the values of a row into a TableRow and remembers the paths so far."""

    def __init__(self, path: Path, columns: Sequence[str], group: str) -> None:
        names = [_column(column) for column in columns]
        self.table = path
        self.folder = os.path.abspath(path.parent)
        self.count = len(names)
        self.path = names.index("path")
        self.label = names.index("label")
        self.split = names.index("split") if "split" in names else None
        self.key = names.index(group) if group in names else None
        self.locations: dict[str, str] = {}  # path -> its row
        self.absent: list[tuple[str, str]] = []

    def row(self, location: str, values: Sequence[str]) -> TableRow:
        """Return the row's image; DataError if the row is wrong."""
        if len(values) != self.count:
            fact = f"has {len(values)} values and the table {counted(self.count, 'column')}"
            raise self._wrong(location, fact, "quote values that hold the separator")
        name, label = values[self.path], values[self.label].strip()
        if not name.strip():
            raise self._wrong(location, "has no path")
        if not label:
            raise self._wrong(location, f"has no label for {name!r}")
        path = os.path.normpath(os.path.join(self.folder, name))
        if path in self.locations:
            raise self._wrong(location, f"names {name!r} again, after {self.locations[path]}", "keep one row per image")
        self.locations[path] = location
        key = "" if self.key is None else values[self.key].strip()
        return TableRow(path, label, self._split(location, values), key, self._status(location, path))

    def check_absent(self) -> None:
        """Raise DataError if files do not exist."""
        if self.absent:
            location, path = self.absent[0]
            more = len(self.absent) - 1
            rest = f" and {more} more rows name files that do not exist" if more else ""
            hint = "paths start from the table's folder"
            raise self._wrong(location, f"names {path!r}, which does not exist{rest}", hint)

    def _split(self, location: str, values: Sequence[str]) -> str:
        given = "" if self.split is None else values[self.split].strip()
        if given and given.lower() not in SPLIT_NAMES:
            raise self._wrong(location, f"has the split {given!r}", "use train, val or test, or leave it empty")
        return SPLIT_NAMES.get(given.lower(), "")

    def _status(self, location: str, path: str) -> os.stat_result | None:
        try:
            return os.stat(path)
        except _ABSENT:
            self.absent.append((location, path))
        except OSError:  # no permission: reading the file later reports it
            pass
        return None

    def _wrong(self, location: str, fact: str, hint: str = "correct the table") -> DataError:
        return DataError(f"{location} of {str(self.table)!r} {fact}", hint)
