"""fix.csv: corrected labels and excluded images; `suspects` proposes, a person decides, and every run applies them.

A row without an action is a proposal and changes nothing. Deleting a row undoes it. Image files are never changed.
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
from image_classifier.text import counted, did_you_mean, listed

log = logging.getLogger(__name__)

RELABEL, EXCLUDE, KEEP = "relabel", "exclude", "keep"
ACTIONS = (RELABEL, EXCLUDE, KEEP)
COLUMNS = ("path", "label", "action", "new_label", "reason")
FILE_NAME = "fix.csv"

_HEADER = ",".join(COLUMNS) + "\n"


@dataclass(frozen=True, slots=True)
class Fix:
    """One row: `label` is the label when the row was written, "" for any; an empty `action` changes nothing."""

    path: str
    label: str = ""
    action: str = ""
    new_label: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Correction:
    """The effect of fix.csv on a tree: its images with corrected labels, and those to exclude (path -> reason)."""

    tree: FileTree
    relabelled: int = 0
    excluded: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of changed labels and excluded images for JSON; empty if both are 0."""
        counts = {"relabelled": self.relabelled, "excluded": len(self.excluded)}
        return counts if any(counts.values()) else {}


@dataclass(frozen=True)
class Fixes:
    """The rows of a fix.csv.

    Args:
        path: The file, for messages.
        lines: Every line after the header: its text, and its row (None for a comment).
        header: The first line as it is in the file; "" if there is no file yet.
    """

    path: Path = Path(FILE_NAME)
    lines: tuple[tuple[str, Fix | None], ...] = ()
    header: str = field(default="", repr=False)

    @cached_property
    def decided(self) -> dict[str, Fix]:
        """The rows with an action, by path."""
        return {row.path: row for _, row in self.lines if row and row.action}

    def applied(self, tree: FileTree) -> Correction:
        """Return the corrected tree; rows of files that are gone or have another label now are skipped with a warning.

        Raises:
            DataError: A new label is not a class of the tree.
        """
        if not self.decided:
            return Correction(tree)
        _check_labels(self, {image.label for image in tree.images})
        labels = {image.path: image.label for image in tree.images if image.path in self.decided}
        self._warn("does not exist", [path for path in self.decided if path not in labels])
        stale = [path for path, label in labels.items() if self.decided[path].label not in ("", label)]
        self._warn("has another label now", stale)
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
            names = listed(list(map(repr, paths)))
            log.warning("%s: %s skipped, the image %s: %s", self.path, counted(len(paths), "row"), fact, names)

    def proposing(self, rows: Iterable[Fix]) -> Fixes:
        """Return these decisions, unchanged, with `rows` as the new proposals; older proposals are dropped."""
        delimiter = ";" if ";" in self.header else ","
        kept = tuple((ended(text), row) for text, row in self.lines if row is None or row.action)
        new = tuple((row_text(astuple(row), delimiter), row) for row in rows if row.path not in self.decided)
        return Fixes(self.path, kept + new, ended(self.header))

    def write(self) -> bool:
        """Write the file if its content changes; return whether it did.

        Raises:
            StorageError: The file cannot be written; the old one is unchanged.
        """
        return write_if_changed(self.path, self.to_csv())

    def to_csv(self) -> str:
        """Return the file as text."""
        return (self.header or _HEADER) + "".join(text for text, _ in self.lines)


def _check_labels(fixes: Fixes, classes: Iterable[str]) -> None:
    known = set(classes)
    for row in fixes.decided.values():
        if row.action == RELABEL and row.new_label not in known:
            fact = f"{str(fixes.path)!r} relabels {row.path!r} to {row.new_label!r}, which is not a class"
            hint = f"{did_you_mean(row.new_label, known)}for a new class, make a folder with images first"
            raise DataError(fact, hint)


def read_fixes(path: Path) -> Fixes:
    """Read a fix.csv; without a file there are no rows.

    Raises:
        DataError: The file cannot be read, its header or a row is invalid, or two rows decide on the same image.
    """
    rows = read_rows(path, COLUMNS)
    if rows is None:
        return Fixes(path)
    lines = []
    seen = set()
    for text, cells in rows.lines:
        row = _row(cells, path) if cells else None
        if row and row.action:
            if row.path in seen:
                raise DataError(f"{str(path)!r} decides twice on {row.path!r}", "delete one of the rows")
            seen.add(row.path)
        lines.append((text, row))
    return Fixes(path, tuple(lines), rows.header)


def _row(cells: Sequence[str], path: Path) -> Fix:
    row = Fix(cells[0].removeprefix("./"), cells[1], cells[2].strip().lower(), cells[3].strip(), cells[4])
    if row.action and row.action not in ACTIONS:
        hint = f"use one of {', '.join(ACTIONS)}, or leave it empty"
        raise DataError(f"{str(path)!r} has the invalid action {cells[2]!r} for {row.path!r}", hint)
    if row.action == RELABEL and not row.new_label:
        hint = "write the class into the column new_label"
        raise DataError(f"{str(path)!r} relabels {row.path!r} without a new label", hint)
    return row
