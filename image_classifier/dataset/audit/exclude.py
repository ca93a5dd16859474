"""`exclude.csv`: which images every run leaves out, and why; written by the audit, edited by hand, never overruling the hand."""

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

AUDIT = "audit: "  # how the reason of a row begins that the audit wrote, and may take back
KEEP = "keep"  # the reason that makes a path stay, whatever other rows say

_HEADER = "path,reason\n"
_COLUMNS = ["path", "reason"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file, or several where a quoted path holds line breaks; a comment and an empty line have no path.

    `text` is how it stands in the file, so that what a person wrote is written back letter by letter.
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
        """Whether this row makes its path stay."""
        return self.reason.strip().lower() == KEEP


@dataclass(frozen=True)
class Exclusions:
    """The rows of an exclude.csv. A path in it is one image or, by hand, a folder or a pattern such as `blurry/*.jpg` (`*` crosses folders).

    Args:
        path: The file they came from, for messages.
        lines: Every line after the header.
        header: The first line as it stands in the file; "" where there is no file yet.
    """

    path: Path = Path("exclude.csv")
    lines: tuple[Line, ...] = ()
    header: str = field(default="", repr=False)

    @property
    def delimiter(self) -> str:
        """What separates the columns: a comma, or the semicolon of spreadsheets whose decimal point is the comma."""
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
        """Which paths, bool [N], a row written by hand leaves out."""
        return self._chosen(paths, lambda path: path in self._by_hand)

    def covers(self, paths: Sequence[str]) -> np.ndarray:
        """Which paths, bool [N], any row leaves out."""
        return self._chosen(paths, lambda path: path in self._by_audit or path in self._by_hand)

    def _chosen(self, paths: Sequence[str], named: Callable[[str], bool]) -> np.ndarray:
        if not self.lines:  # a million paths, and nothing to look for
            return np.zeros(len(paths), dtype=bool)
        return np.array([named(path) and path not in self._kept for path in paths], dtype=bool)

    def reason(self, path: str) -> str:
        """Why this path is left out, "" where no row says: a person's words before the audit's."""
        return self._by_hand.get(path) or self._by_audit.get(path, "")

    def keeps(self, path: str) -> bool:
        """Whether a row with the reason `keep` makes this path stay."""
        return path in self._kept

    def unmatched(self, paths: Sequence[str]) -> list[str]:
        """What rows written by hand name and none of these paths is: a slip of the pen, or a file that is gone."""
        known = set(paths)
        named = dict.fromkeys(
            line.path for line in self.lines if line.path and not line.by_audit and line.path not in known
        )
        return [name for name in named if not _matches_any(name, paths)]

    def also(self, left_out: Mapping[str, str]) -> Exclusions:
        """These exclusions and, as if by hand, the images of `left_out` (path to reason): to look with, not to write."""
        return replace(
            self, lines=(*self.lines, *(Line("", glob.escape(path), reason) for path, reason in left_out.items()))
        )

    def updated(self, audit: Audit) -> Exclusions:
        """These exclusions with the audit's rows brought up to date."""
        return merge(self, audit.proposed)

    def write(self, path: Path | None = None) -> bool:
        """Write the file whole or not at all, and only where its content changes; says whether it did.

        Raises:
            StorageError: The disk refuses.
        """
        return write_if_changed(path or self.path, (self.header or _HEADER) + "".join(line.text for line in self.lines))


class _Names:
    """Paths and patterns with a reason each; what could be a pattern is also taken literally, for a file may be called `a[1].jpg`."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        self._literal: dict[str, str] = {}
        for path, reason in rows:
            self._literal.setdefault(_plain(path), reason)
        names = [name for name in self._literal if _is_pattern(name)]
        self._patterns = [(re.compile(fnmatch.translate(name)), self._literal[name]) for name in names]

    def get(self, path: str) -> str | None:
        """The reason of the row that names this path, a folder above it, or else the first pattern that fits; None where none does."""
        for end in (len(path), *(place for place in range(len(path) - 1, 0, -1) if path[place] == "/")):
            if path[:end] in self._literal:
                return self._literal[path[:end]]
        return next((reason for pattern, reason in self._patterns if pattern.match(path)), None)

    def __contains__(self, path: str) -> bool:
        return self.get(path) is not None


def _is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def _plain(name: str) -> str:
    """A path as the tree writes it: `./roses/` is `roses`."""
    return name.removeprefix("./").rstrip("/") or name


def _matches_any(name: str, paths: Sequence[str]) -> bool:
    match = re.compile(fnmatch.translate(_plain(name))).match
    return any(
        path == _plain(name) or path.startswith(f"{_plain(name)}/") or (_is_pattern(name) and match(path))
        for path in paths
    )


def merge(existing: Exclusions, proposed: Mapping[str, str]) -> Exclusions:
    """The rows of both: `proposed` (path to reason) are the audit's rows of now.

    What a person wrote stays, letter by letter and in its order. A row of the audit stays where it stands while its finding
    lasts, and goes with it; new ones follow at the end, by path. A path that a person named, to leave it out or to keep it,
    gets no row from the audit.
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
    whole = [Line(ended(line.text), line.path, line.reason) for line in lines[:-1]]
    return Exclusions(existing.path, (*whole, *lines[-1:]), ended(existing.header))


def _row(path: str, reason: str, delimiter: str) -> Line:
    return Line(row_text((path, reason), delimiter), path, reason)


def read_exclusions(path: Path) -> Exclusions:
    """Read an exclude.csv; none where there is no such file.

    Raises:
        DataError: The file cannot be read, its header is not `path,reason`, or a line is no such row (named by its number).
    """
    rows = read_rows(path, _COLUMNS)
    return (
        Exclusions(path, tuple(Line(text, *cells) for text, cells in rows.lines), rows.header)
        if rows
        else Exclusions(path)
    )
