"""Tables of images: CSV, TSV and Parquet files with the columns path and label, and perhaps split and a group."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.errors import DataError

SUFFIXES = frozenset({".csv", ".tsv", ".parquet"})
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
_ABSENT = (FileNotFoundError, NotADirectoryError, ValueError)  # ValueError: a path with a zero character


@dataclass(frozen=True, slots=True)
class TableRow:
    """One image of a table: `path` absolute, `split` "" where the table does not say, `status` None where the file cannot be looked at."""

    path: str
    label: str
    split: str
    key: str
    status: os.stat_result | None


def is_table(path: Path) -> bool:
    """Whether a path is taken for a table: by its suffix, unless it is a folder."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def read_table(path: Path, group_column: str | None = None) -> list[TableRow]:
    """The rows of a table, in its order; `path` in them starts from the table's folder or from the root of the file system.

    Args:
        path: A .csv (commas or semicolons), .tsv or .parquet file; text in UTF-8, with or without a byte order mark, or UTF-16 with one.
        group_column: Where the rows' `key` comes from, if there is such a column.

    Raises:
        DataError: It cannot be read, lacks a column, or a row is wrong: no label, an unknown split, a file that is not there or was
            named before. The message names the first such row.
    """
    wanted = ("path", "label", "split", _column(group_column or ""))
    columns, rows = _parquet(path, wanted) if path.suffix.lower() == ".parquet" else _text(path)
    reader = _Reader(path, columns, wanted[3])
    found = [reader.row(place, values) for place, values in rows]
    if not found:
        raise DataError(f"the table {str(path)!r} holds no rows", "give it one row an image: path,label")
    reader.check_absent()
    return found


def _column(name: str) -> str:
    return name.strip().lower()


class _Reader:
    """Turns the values of a row into a TableRow and remembers what it saw."""

    def __init__(self, path: Path, columns: Sequence[str], group: str) -> None:
        self.table, self.folder = path, os.path.abspath(path.parent)
        names = [_column(column) for column in columns]
        self.count, self.path, self.label = len(names), names.index("path"), names.index("label")
        self.split = names.index("split") if "split" in names else None
        self.key = names.index(group) if group in names else None
        self.places: dict[str, str] = {}
        self.absent: list[tuple[str, str]] = []

    def row(self, place: str, values: Sequence[str]) -> TableRow:
        if len(values) != self.count:
            raise self._wrong(
                place,
                f"has {len(values)} values and the table {self.count} columns",
                "quote values that hold the separator",
            )
        name, label = values[self.path], values[self.label].strip()
        if not name.strip():
            raise self._wrong(place, "has no path")
        if not label:
            raise self._wrong(place, f"has no label for {name!r}")
        path = os.path.normpath(os.path.join(self.folder, name))
        if path in self.places:
            raise self._wrong(place, f"names {name!r} again, after {self.places[path]}", "keep one row an image")
        self.places[path] = place
        key = "" if self.key is None else values[self.key].strip()
        return TableRow(path, label, self._split(place, values), key, self._status(place, path))

    def check_absent(self) -> None:
        """Raise DataError where files are not there."""
        if self.absent:
            place, path = self.absent[0]
            more = (
                f" and {len(self.absent) - 1} more rows name files that are not there" if len(self.absent) > 1 else ""
            )
            raise self._wrong(place, f"names {path!r}, which is not there{more}", "paths start from the table's folder")

    def _split(self, place: str, values: Sequence[str]) -> str:
        given = "" if self.split is None else values[self.split].strip()
        if given and given.lower() not in SPLIT_NAMES:
            raise self._wrong(place, f"has the split {given!r}", "use train, val or test, or leave it empty")
        return SPLIT_NAMES.get(given.lower(), "")

    def _status(self, place: str, path: str) -> os.stat_result | None:
        try:
            return os.stat(path)
        except _ABSENT:
            self.absent.append((place, path))
        except OSError:  # no permission: what reads the file says so
            pass
        return None

    def _wrong(self, place: str, what: str, hint: str = "correct the table") -> DataError:
        return DataError(f"{place} of {str(self.table)!r} {what}", hint)


_Rows = Iterator[tuple[str, list[str]]]


def _text(path: Path) -> tuple[list[str], _Rows]:
    """Header and rows of a text file, each row with its place: `line 7`."""
    text = _decoded(path)
    header = text.partition("\n")[0]
    semicolons = ";" in header and "," not in header  # as spreadsheets write it where the comma is the decimal point
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if semicolons else ","
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows = _placed(path, lines)
    first = next(rows, None)
    if first is None:
        raise DataError(f"the table {str(path)!r} is empty", "give it a first line path,label and one row an image")
    _check_columns(path, first[1])
    return first[1], rows


def _decoded(path: Path) -> str:
    content = _opened(path, path.read_bytes)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return str(content.decode("utf-16", "replace"))
    return str(content.decode("utf-8-sig", "surrogateescape"))


def _placed(path: Path, lines: Any) -> _Rows:
    while True:
        place = f"line {lines.line_num + 1}"
        try:
            values = next(lines, None)
        except csv.Error as error:
            raise DataError(f"{place} of {str(path)!r} is not CSV ({error})", "correct the table") from error
        if values is None:
            return
        if values:  # not an empty line
            yield place, values


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = {"path", "label"} - set(map(_column, columns))
    if missing:
        fact = f"the table {str(path)!r} has no column {' and no column '.join(sorted(missing, reverse=True))}"
        raise DataError(fact, f"its columns are {', '.join(columns)[:100]}; it needs path and label")


def _parquet(path: Path, wanted: Sequence[str]) -> tuple[list[str], _Rows]:
    """Column names and rows of a Parquet file, each row with its place: `row 7`, counted from 1."""
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]  # here, as it takes half a second

    names = _opened(path, lambda: parquet.read_schema(path)).names
    _check_columns(path, names)
    names = [name for name in names if _column(name) in wanted]  # others may hold the pictures
    table = _opened(path, lambda: parquet.read_table(path, columns=names))
    rows = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    return names, (
        (f"row {number}", ["" if value is None else str(value) for value in row])
        for number, row in enumerate(rows, start=1)
    )


def _opened(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError as error:
        raise DataError(
            f"cannot read the table {str(path)!r} ({error.strerror or error})", "check the path and its permissions"
        ) from error
    except ValueError as error:  # pyarrow's errors
        raise DataError(
            f"the table {str(path)!r} is not a Parquet file ({str(error)[:100]})", "save it anew"
        ) from error
