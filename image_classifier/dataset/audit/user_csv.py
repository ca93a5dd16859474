"""Tables that people and the program both write: read line by line, so that what a person wrote is written back letter by letter."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from image_classifier.atomic_io import write_text
from image_classifier.errors import DataError
from image_classifier.manifest import ENCODING


@dataclass(frozen=True)
class UserCsv:
    """A table as it stands in its file: the first line, what separates columns, and each further line with its cells (none in comments)."""

    header: str
    delimiter: str
    lines: tuple[tuple[str, tuple[str, ...]], ...]


def read_rows(path: Path, columns: Sequence[str]) -> UserCsv | None:
    """The rows of the file; None where there is no such file, or nothing in it.

    Raises:
        DataError: The file cannot be read, its first line does not name the columns, or a line is no such row (named by its number).
    """
    try:
        text = path.read_bytes().decode(*ENCODING)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error.strerror})", "check its permissions") from error
    if not text.strip("\ufeff\r\n\t "):
        return None
    physical = [line + "\n" for line in text.split("\n")]
    physical[-1] = physical[-1].removesuffix("\n")
    header = physical[0]
    if [name.strip().lower() for name in header.removeprefix("\ufeff").replace(";", ",").split(",")] != list(columns):
        raise DataError(
            f"line 1 of {str(path)!r} is not the header {','.join(columns)}",
            "write it there; a comma separates the columns",
        )
    delimiter = ";" if ";" in header else ","  # that of spreadsheets whose decimal point is the comma
    return UserCsv(header, delimiter, tuple(_parsed(physical[1:], path, columns, delimiter)))


def _parsed(
    physical: Sequence[str], path: Path, columns: Sequence[str], delimiter: str
) -> Iterator[tuple[str, tuple[str, ...]]]:
    position, shape = 0, ",".join(columns)
    while position < len(physical):
        first = physical[position]
        if not first.strip() or first.startswith("#"):
            position += 1
            if first:
                yield first, ()
            continue
        rest = (physical[index] for index in range(position, len(physical)))
        reader = csv.reader(rest, delimiter=delimiter, strict=True)
        number = position + 2
        try:
            row = next(reader)
        except csv.Error as error:
            hint = f'write {shape} and put a path that holds " in quotes'
            raise DataError(f"line {number} of {str(path)!r} is not a row ({error})", hint) from error
        if len(row) != len(columns) or not row[0]:
            fact = f"has {len(row)} columns" if len(row) != len(columns) else "has no path"
            hint = f"write {shape}; put what holds a comma in quotes, and begin a comment with #"
            raise DataError(f"line {number} of {str(path)!r} {fact}", hint)
        position += reader.line_num
        yield "".join(physical[position - reader.line_num : position]), tuple(row)


def row_text(cells: Sequence[str], delimiter: str) -> str:
    """A row as its line in the file."""
    text = io.StringIO()
    # A path that begins with # would be a comment, and the writer lets a bare carriage return pass.
    special = cells[0].startswith("#") or any("\r" in cell for cell in cells)
    csv.writer(
        text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL if special else csv.QUOTE_MINIMAL
    ).writerow(cells)
    return text.getvalue()


def ended(text: str) -> str:
    """The line with a line break at its end, so that another can follow."""
    return text if text.endswith("\n") or not text else text + "\n"


def write_if_changed(path: Path, text: str) -> bool:
    """Write the file whole or not at all, and only where its content changes; says whether it did. StorageError where the disk refuses."""
    if path.is_file() and path.read_bytes() == text.encode(*ENCODING):
        return False
    write_text(path, text)
    return True
