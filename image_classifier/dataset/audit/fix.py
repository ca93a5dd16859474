"""`fix.csv`: which labels are corrected and which images go with them; proposed by `suspects`, decided by hand, honoured by every run.

A row without an action is a proposal and changes nothing; taking a row out undoes it. The files themselves are never touched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from image_classifier.dataset.audit.user_csv import ended, read_rows, row_text, write_if_changed
from image_classifier.dataset.discovery import FileTree
from image_classifier.errors import DataError
from image_classifier.text import counted, did_you_mean

log = logging.getLogger(__name__)

RELABEL, EXCLUDE, KEEP = "relabel", "exclude", "keep"
ACTIONS = (RELABEL, EXCLUDE, KEEP)
COLUMNS = ("path", "label", "action", "new_label", "reason")
FILE_NAME = "fix.csv"

_HEADER = ",".join(COLUMNS) + "\n"
_NAMED = 5  # paths that a warning names


@dataclass(frozen=True, slots=True)
class Fix:
    """One row: `label` is the one that the image had when the row was written, "" for any; an empty `action` leaves the image as it is."""

    path: str
    label: str = ""
    action: str = ""
    new_label: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Correction:
    """What fix.csv did to a tree: its images under their new labels, and of those the ones that are left out (path to reason)."""

    tree: FileTree
    relabelled: int = 0
    excluded: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How many labels were changed and images left out, as plain values; empty where none was."""
        counts = {"relabelled": self.relabelled, "excluded": len(self.excluded)}
        return counts if any(counts.values()) else {}


@dataclass(frozen=True)
class Fixes:
    """The rows of a fix.csv.

    Args:
        path: The file they came from, for messages.
        lines: Every line after the header: how it stands in the file, and its row (None for a comment).
        header: The first line as it stands in the file; "" where there is no file yet.
    """

    path: Path = Path(FILE_NAME)
    lines: tuple[tuple[str, Fix | None], ...] = ()
    header: str = field(default="", repr=False)

    @cached_property
    def decided(self) -> dict[str, Fix]:
        """The rows with an action, by path."""
        return {row.path: row for _, row in self.lines if row and row.action}

    def applied(self, tree: FileTree) -> Correction:
        """The tree as the rows correct it; rows of files that are gone or labelled otherwise by now are passed over, and said in the log.

        Raises:
            DataError: A new label that is no class of the tree.
        """
        if not self.decided:
            return Correction(tree)
        _check_labels(self, {image.label for image in tree.images})
        labels = {image.path: image.label for image in tree.images if image.path in self.decided}
        self._warn("is not there", [path for path in self.decided if path not in labels])
        stale = [path for path, label in labels.items() if self.decided[path].label not in ("", label)]
        self._warn("has another label by now than the row says", stale)
        valid = {path: row for path, row in self.decided.items() if path in labels and path not in set(stale)}
        new = {
            path: row.new_label
            for path, row in valid.items()
            if row.action == RELABEL and row.new_label != labels[path]
        }
        images = tuple(replace(image, label=new[image.path]) if image.path in new else image for image in tree.images)
        excluded = {path: row.reason for path, row in valid.items() if row.action == EXCLUDE}
        return Correction(replace(tree, images=images), len(new), excluded)

    def _warn(self, fact: str, paths: Sequence[str]) -> None:
        if paths:
            named = ", ".join(map(repr, paths[:_NAMED])) + (" …" if len(paths) > _NAMED else "")
            log.warning("%s: %s passed over, as the image %s: %s", self.path, counted(len(paths), "row"), fact, named)

    def proposing(self, rows: Iterable[Fix]) -> Fixes:
        """These decisions, letter by letter, with `rows` as the new proposals; what was proposed before and never decided goes."""
        delimiter = ";" if ";" in self.header else ","
        kept = tuple((ended(text), row) for text, row in self.lines if row is None or row.action)
        new = tuple((row_text(astuple(row), delimiter), row) for row in rows if row.path not in self.decided)
        return Fixes(self.path, kept + new, ended(self.header))

    def write(self) -> bool:
        """Write the file whole or not at all, and only where its content changes; says whether it did. StorageError where the disk refuses."""
        return write_if_changed(self.path, self.to_csv())

    def to_csv(self) -> str:
        """The file as text."""
        return (self.header or _HEADER) + "".join(text for text, _ in self.lines)


def _check_labels(fixes: Fixes, classes: Iterable[str]) -> None:
    known = set(classes)
    for row in fixes.decided.values():
        if row.action == RELABEL and row.new_label not in known:
            fact = f"{str(fixes.path)!r} relabels {row.path!r} to {row.new_label!r}, which is no class"
            raise DataError(
                fact, f"{did_you_mean(row.new_label, known)}a new class begins with a folder and images of its own"
            )


def read_fixes(path: Path) -> Fixes:
    """Read a fix.csv; none where there is no such file.

    Raises:
        DataError: The file cannot be read, its header is not that of a fix.csv, a line is no row, or two rows decide on one image.
    """
    rows = read_rows(path, COLUMNS)
    if rows is None:
        return Fixes(path)
    lines, seen = [], set()
    for text, cells in rows.lines:
        row = _row(cells, path) if cells else None
        if row and row.action:
            if row.path in seen:
                raise DataError(f"{str(path)!r} decides twice on {row.path!r}", "take one of the rows out")
            seen.add(row.path)
        lines.append((text, row))
    return Fixes(path, tuple(lines), rows.header)


def _row(cells: Sequence[str], path: Path) -> Fix:
    row = Fix(cells[0].removeprefix("./"), cells[1], cells[2].strip().lower(), cells[3].strip(), cells[4])
    if row.action and row.action not in ACTIONS:
        raise DataError(
            f"{str(path)!r} has the action {cells[2]!r} for {row.path!r}",
            f"use one of {', '.join(ACTIONS)}, or leave it empty",
        )
    if row.action == RELABEL and not row.new_label:
        raise DataError(
            f"{str(path)!r} relabels {row.path!r} and does not say to what", "write the class into the column new_label"
        )
    return row
