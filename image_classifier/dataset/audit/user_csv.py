"""CSV files that people and the program both edit, read line by line so that a person's text stays unchanged."""

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
    """A CSV file: its first line, the separator, and each further line with its cells (none for a comment)."""

    header: str
    delimiter: str
    lines: tuple[tuple[str, tuple[str, ...]], ...]


def read_rows(path: Path, columns: Sequence[str]) -> UserCsv | None:
    """Read the rows of a file; None if there is no file, or it is empty.

    Raises:
        DataError: The file cannot be read, its first line does not name the columns, or a line is not such a row.
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
        hint = "write the header there, with commas between the columns"
        raise DataError(f"line 1 of {str(path)!r} is not the header {','.join(columns)}", hint)
    # Spreadsheets that use a decimal comma separate columns by semicolons.
    delimiter = ";" if ";" in header else ","
    return UserCsv(header, delimiter, tuple(_parsed(physical[1:], path, columns, delimiter)))


def _parsed(
    physical: Sequence[str], path: Path, columns: Sequence[str], delimiter: str
) -> Iterator[tuple[str, tuple[str, ...]]]:
    position = 0
    shape = ",".join(columns)
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
            hint = f'write {shape}, with quotes around a path that contains "'
            raise DataError(f"line {number} of {str(path)!r} is not a row ({error})", hint) from error
        if len(row) != len(columns) or not row[0]:
            fact = f"has {len(row)} columns" if len(row) != len(columns) else "has no path"
            hint = f"write {shape}, with quotes around cells that contain a comma; a comment starts with #"
            raise DataError(f"line {number} of {str(path)!r} {fact}", hint)
        position += reader.line_num
        yield "".join(physical[position - reader.line_num : position]), tuple(row)


def row_text(cells: Sequence[str], delimiter: str) -> str:
    r"""Return a row as a line of the file.

    >>> row_text(("a,b.png", "blurred"), ",")
    '"a,b.png",blurred\n'
    """
    text = io.StringIO()
    # A path that starts with # would be a comment, and csv.writer does not quote a bare carriage return.
    special = cells[0].startswith("#") or any("\r" in cell for cell in cells)
    csv.writer(
        text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL if special else csv.QUOTE_MINIMAL
    ).writerow(cells)
    return text.getvalue()


def ended(text: str) -> str:
    """Return the line with a line break at its end."""
    return text if text.endswith("\n") or not text else text + "\n"


def write_if_changed(path: Path, text: str) -> bool:
    """Write a file if its content changes; return whether it did.

    Raises:
        StorageError: The file cannot be written; the old one is unchanged.
    """
    if path.is_file() and path.read_bytes() == text.encode(*ENCODING):
        return False
    write_text(path, text)
    return True
