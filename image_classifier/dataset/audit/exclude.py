"""exclude.csv: the images that every run leaves out, and why.

The audit writes it and people edit it; a person's row always wins.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from image_classifier.dataset.audit.user_csv import ended, read_rows, row_text, write_if_changed

if TYPE_CHECKING:
    from image_classifier.dataset.audit.issues import Audit

AUDIT = "audit: "  # prefix of the reasons that the audit wrote and may remove
KEEP = "keep"  # the reason that keeps an image, whatever other rows say

_HEADER = "path,reason\n"
_COLUMNS = ["path", "reason"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file, or several if a quoted path holds line breaks; comments and empty lines have no path.

    `text` is the line as it is in the file, so that a person's text is written back unchanged.
    """

    text: str
    path: str = ""
    reason: str = ""

    @property
    def by_audit(self) -> bool:
        """Whether the audit wrote this row."""
        return self.reason.startswith(AUDIT)

    @property
    def keeps(self) -> bool:
        """Whether this row keeps its path."""
        return self.reason.strip().lower() == KEEP


@dataclass(frozen=True)
class Exclusions:
    """The rows of an exclude.csv.

    A path is one image or, in rows of a person, a folder or a pattern such as `blurry/*.jpg` (`*` crosses folders).

    Args:
        path: The file, for messages.
        lines: Every line after the header.
        header: The first line as it is in the file; "" if there is no file yet.
    """

    path: Path = Path("exclude.csv")
    lines: tuple[Line, ...] = ()
    header: str = field(default="", repr=False)

    @property
    def delimiter(self) -> str:
        """The separator of columns: a comma, or the semicolon of spreadsheets that use a decimal comma."""
        return ";" if ";" in self.header else ","

    @cached_property
    def _kept(self) -> _Names:
        return _Names((line.path, KEEP) for line in self.lines if line.keeps)

    @cached_property
    def _by_hand(self) -> _Names:
        return _Names(
            (line.path, line.reason) for line in self.lines if line.path and not line.keeps and not line.by_audit
        )

    @cached_property
    def _by_audit(self) -> dict[str, str]:
        return {line.path: line.reason for line in self.lines if line.by_audit}

    def by_hand(self, paths: Sequence[str]) -> np.ndarray:
        """Return which paths a person's row excludes, bool [N]."""
        return self._chosen(paths, lambda path: path in self._by_hand)

    def covers(self, paths: Sequence[str]) -> np.ndarray:
        """Return which paths any row excludes, bool [N]."""
        return self._chosen(paths, lambda path: path in self._by_audit or path in self._by_hand)

    def _chosen(self, paths: Sequence[str], named: Callable[[str], bool]) -> np.ndarray:
        if not self.lines:  # fast for a million paths
            return np.zeros(len(paths), dtype=bool)
        return np.array([named(path) and path not in self._kept for path in paths], dtype=bool)

    def reason(self, path: str) -> str:
        """Return why a path is excluded, a person's reason before the audit's; "" if it is not."""
        return self._by_hand.get(path) or self._by_audit.get(path, "")

    def keeps(self, path: str) -> bool:
        """Return whether a row with the reason `keep` keeps this path."""
        return path in self._kept

    def unmatched(self, paths: Sequence[str]) -> list[str]:
        """Return the names in a person's rows that match none of these paths: typos, or files that are gone."""
        known = set(paths)
        names = dict.fromkeys(line.path for line in self.lines if line.path and not line.by_audit)
        return [name for name in names if name not in known and not _matches_any(name, paths)]

    def also(self, excluded: Mapping[str, str]) -> Exclusions:
        """Return these exclusions and those of `excluded` (path -> reason) as a person's rows; not for writing."""
        added = (Line("", glob.escape(path), reason) for path, reason in excluded.items())
        return replace(self, lines=(*self.lines, *added))

    def updated(self, audit: Audit) -> Exclusions:
        """Return these exclusions with the audit's rows brought up to date."""
        return merge(self, audit.proposed)

    def write(self, path: Path | None = None) -> bool:
        """Write the file if its content changes; return whether it did.

        Raises:
            StorageError: The file cannot be written; the old one is unchanged.
        """
        return write_if_changed(path or self.path, (self.header or _HEADER) + "".join(line.text for line in self.lines))


class _Names:
    """Paths and patterns with their reasons; patterns also match literally, as a file may be called `a[1].jpg`."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        self._literal: dict[str, str] = {}
        for path, reason in rows:
            self._literal.setdefault(_plain(path), reason)
        names = [name for name in self._literal if _is_pattern(name)]
        self._patterns = [(re.compile(fnmatch.translate(name)), self._literal[name]) for name in names]

    def get(self, path: str) -> str | None:
        """Return the reason of the row with this path or a folder above it, else of the first matching pattern."""
        for end in (len(path), *(index for index in range(len(path) - 1, 0, -1) if path[index] == "/")):
            if path[:end] in self._literal:
                return self._literal[path[:end]]
        return next((reason for pattern, reason in self._patterns if pattern.match(path)), None)

    def __contains__(self, path: str) -> bool:
        return self.get(path) is not None


def _is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def _plain(name: str) -> str:
    """Return a path as the tree writes it: `roses` for `./roses/`."""
    return name.removeprefix("./").rstrip("/") or name


def _matches_any(name: str, paths: Sequence[str]) -> bool:
    match = re.compile(fnmatch.translate(_plain(name))).match
    return any(
        path == _plain(name) or path.startswith(f"{_plain(name)}/") or (_is_pattern(name) and match(path))
        for path in paths
    )


def merge(existing: Exclusions, proposed: Mapping[str, str]) -> Exclusions:
    """Return the existing rows with the audit's rows replaced by `proposed` (path -> reason).

    A person's lines stay unchanged and in order. A row of the audit stays at its position as long as its issue lasts;
    new rows are added at the end, by path. A path that a person excluded or kept gets no row from the audit.
    """
    new = {
        path: reason for path, reason in proposed.items() if not existing.keeps(path) and path not in existing._by_hand
    }
    lines: list[Line] = []
    for line in existing.lines:
        if not line.by_audit:
            lines.append(line)
        elif line.path in new:
            reason = new.pop(line.path)
            lines.append(line if line.reason == reason else _row(line.path, reason, existing.delimiter))
    lines += [_row(path, new[path], existing.delimiter) for path in sorted(new)]
    complete = [Line(ended(line.text), line.path, line.reason) for line in lines[:-1]]
    return Exclusions(existing.path, (*complete, *lines[-1:]), ended(existing.header))


def _row(path: str, reason: str, delimiter: str) -> Line:
    return Line(row_text((path, reason), delimiter), path, reason)


def read_exclusions(path: Path) -> Exclusions:
    """Read an exclude.csv; without a file there are no exclusions.

    Raises:
        DataError: The file cannot be read, its header is not `path,reason`, or a line is not such a row.
    """
    rows = read_rows(path, _COLUMNS)
    if rows is None:
        return Exclusions(path)
    return Exclusions(path, tuple(Line(text, *cells) for text, cells in rows.lines), rows.header)
