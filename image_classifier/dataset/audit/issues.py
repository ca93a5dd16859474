"""The issues that an audit found: as a table for a terminal, as lines for a log, and as JSON."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.dataset.audit.issue_types import (
    DUPLICATE_TYPES,
    EXCLUDABLE,
    GROUP_NOUNS,
    ISSUE_TYPES,
    NOUNS,
    SEVERITIES,
    UNREADABLE,
)
from image_classifier.errors import ConfigError
from image_classifier.text import counted, listed, printable

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AuditSettings:
    """The config group `audit`.

    Args:
        fail_on: Exit with code 1 for issues of this severity or above: "error", "warning" or "info"; None for never.
        exclude: Issue types whose images go to exclude.csv; "unreadable" stands for all that cannot be decoded.
        output_dir: Folder of audit.json, audit.html and exclude.csv; None for one named after the data set.
        tiny: An image is tiny if its shorter side is below this many pixels and below half of the median.
        aspect: Limit for the longer side divided by the shorter side.
        imbalance: Limit for the number of images of the largest class divided by that of the smallest.
        few_images: Smallest number of training images of a class.
        max_listed: Images of each type on the page; audit.json lists all.

    Raises:
        ConfigError: A value is invalid.
    """

    fail_on: str | None = None
    exclude: list[str] = field(default_factory=lambda: ["unreadable"])
    output_dir: str | None = None
    tiny: int = 16
    aspect: float = 5.0
    imbalance: float = 10.0
    few_images: int = 10
    max_listed: int = 200

    def __post_init__(self) -> None:
        if isinstance(self.fail_on, str) and self.fail_on not in SEVERITIES:
            hint = f"use one of {', '.join(SEVERITIES)}, or null"
            raise ConfigError(f"invalid audit.fail_on {self.fail_on!r}", hint)
        for name in self.exclude if isinstance(self.exclude, list) else ():
            if name not in EXCLUDABLE:
                raise ConfigError(f"invalid audit.exclude {name!r}", f"use any of {', '.join(EXCLUDABLE)}")
        bounds = {"tiny": 0, "aspect": 1, "imbalance": 1, "few_images": 0, "max_listed": 0}
        for name, low in bounds.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not value >= low:
                raise ConfigError(f"invalid audit.{name} {value}: expected at least {low}")

    @property
    def excluded_types(self) -> tuple[str, ...]:
        """The issue types of `exclude`, with "unreadable" expanded, worst first."""
        named = {*self.exclude, *(UNREADABLE if "unreadable" in self.exclude else ())}
        return tuple(name for name in ISSUE_TYPES if name in named)


@dataclass(frozen=True, slots=True)
class IssueItem:
    """One file or folder of an issue: `path` relative to the root, and a note such as "12 × 9 pixels"."""

    path: str
    label: str = ""
    split: str = ""
    note: str = ""


@dataclass(frozen=True)
class Issue:
    """One issue: its type, a detail, and the files; `numbers` are for programs."""

    issue_type: str
    detail: str
    items: tuple[IssueItem, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def severity(self) -> str:
        """error, warning or info."""
        return ISSUE_TYPES[self.issue_type].severity

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of its files or folders."""
        return tuple(item.path for item in self.items)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for audit.json."""
        items = [
            {name: value for name, value in zip(IssueItem.__slots__, _values(item), strict=True) if value}
            for item in self.items
        ]
        return {
            "kind": self.issue_type,
            "severity": self.severity,
            "detail": self.detail,
            "numbers": dict(self.numbers),
            "files": items,
        }


def _values(item: IssueItem) -> tuple[str, str, str, str]:
    return item.path, item.label, item.split, item.note


@dataclass(frozen=True)
class Audit:
    """All issues, worst first, and a description of the data set.

    Args:
        issues: Sorted by severity, then type, then first path.
        data: Description: images, classes, sizes, formats, modes, splits, fingerprint.
        settings: Settings of the audit.
        headlines: Issue type -> one sentence that sums it up, where counts are not enough.
        proposed: Path -> reason of the images that the audit adds to exclude.csv.
        excluded: Path -> reason of the images that exclude.csv or fix.csv already excluded.
        unmatched: Paths and patterns written in exclude.csv by hand that match no image.
    """

    issues: tuple[Issue, ...]
    data: Mapping[str, Any]
    settings: AuditSettings
    headlines: Mapping[str, str] = field(default_factory=dict)
    proposed: Mapping[str, str] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """The folder that all paths are relative to."""
        return Path(self.data["root"])

    @property
    def corrected(self) -> Mapping[str, int]:
        """Numbers of labels that fix.csv changed and images that it excludes; empty if there are none."""
        corrected: Mapping[str, int] = self.data.get("corrected", {})
        return corrected

    @property
    def by_type(self) -> dict[str, list[Issue]]:
        """The issues of each type that was found, worst first."""
        by_type: dict[str, list[Issue]] = {}
        for issue in self.issues:
            by_type.setdefault(issue.issue_type, []).append(issue)
        return by_type

    @property
    def counts(self) -> dict[str, int]:
        """Issue type -> number of files, or of issues where these have no files."""
        return {
            name: len({path for issue in group for path in issue.paths}) or len(group)
            for name, group in self.by_type.items()
        }

    @property
    def severities(self) -> dict[str, int]:
        """Severity -> number of issue types with it."""
        found = self.by_type
        return {severity: sum(ISSUE_TYPES[name].severity == severity for name in found) for severity in SEVERITIES}

    def exceeds(self, fail_on: str | None) -> bool:
        """Return whether there is an issue of this severity or above; never if `fail_on` is None."""
        return fail_on is not None and any(
            SEVERITIES.index(issue.severity) <= SEVERITIES.index(fail_on) for issue in self.issues
        )

    def headline(self, issue_type: str) -> str:
        """Return one line for all issues of a type."""
        return self.headlines.get(issue_type) or f"for example {_example(self.by_type[issue_type][0])}"

    def amount(self, issue_type: str) -> str:
        """Return the amount of a type: "12 images", "6 groups, 14 images"."""
        total = counted(self.counts[issue_type], NOUNS.get(issue_type, "image"))
        noun = GROUP_NOUNS.get(issue_type)
        return f"{counted(len(self.by_type[issue_type]), noun)}, {total}" if noun else total

    def table(self, width: int | None = None) -> list[str]:
        """Return lines for a terminal: severity, type, amount and an example; one line without issues.

        `width` is the number of columns; None takes that of the terminal.
        """
        size = f"{counted(self.data['images'], 'image')} in {counted(len(self.data['classes']), 'class')}"
        if not self.issues:
            return [f"{size}: no issues", *self._excluded_lines()]
        rows = [("severity", "issue", "amount", "")]
        rows += [
            (ISSUE_TYPES[name].severity, name, self.amount(name), printable(self.headline(name)))
            for name in self.by_type
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        room = max(30, (width or shutil.get_terminal_size((160, 24)).columns) - sum(widths) - 6)
        columns = ([cell.ljust(size) for cell, size in zip(row, widths, strict=False)] for row in rows)
        lines = ["  ".join((*cells, _cut(row[3], room))).rstrip() for cells, row in zip(columns, rows, strict=True)]
        return [f"{size}: {self._severity_counts()}", "", *lines, *self._excluded_lines()]

    def _excluded_lines(self) -> list[str]:
        excluded = len(self.excluded) - self.corrected.get("excluded", 0)
        lines = [f"{counted(excluded, 'image')} excluded by exclude.csv"] if excluded > 0 else []
        lines += [f"fix.csv: {issue_counts_text(self.corrected)}"] if self.corrected else []
        return lines + [
            f"exclude.csv names {printable(name)!r}, but there is no such image" for name in self.unmatched[:5]
        ]

    def _severity_counts(self) -> str:
        nouns = {"error": "error", "warning": "warning", "info": "note"}
        found = {nouns[severity]: number for severity, number in self.severities.items() if number}
        errors = "" if "error" in found else "no errors, "
        return errors + ", ".join(counted(number, noun) for noun, number in found.items())

    def summary(self) -> list[str]:
        """Return one or two lines for a log, worst issues first."""
        corrected = [f"audit: after fix.csv: {issue_counts_text(self.corrected)}"] if self.corrected else []
        if not self.exceeds("warning"):
            return ["audit: no errors or warnings", *corrected]
        found = [f"{name} {self.amount(name)}" for name in self.by_type if ISSUE_TYPES[name].severity != "info"]
        lines = [f"audit: {listed(found, 6, 'types', separator='; ')}"]
        return [*lines, *([f"audit: {self.headlines['leak']}"] if "leak" in self.headlines else []), *corrected]

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain values for audit.json."""
        groups = self.by_type
        counts = {
            name: {"severity": ISSUE_TYPES[name].severity, "findings": len(groups[name]), "files": count}
            for name, count in self.counts.items()
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "data": dict(self.data),
            "settings": asdict(self.settings),
            "counts": counts,
            "headlines": dict(self.headlines),
            "findings": [issue.as_dict() for issue in self.issues],
            "exclude": {
                "left_out": dict(self.excluded),
                "proposed": dict(self.proposed),
                "unmatched": list(self.unmatched),
            },
        }


def issue_counts_text(corrected: Mapping[str, int]) -> str:
    """Return the effect of fix.csv in words.

    >>> issue_counts_text({"relabelled": 3, "excluded": 1})
    '3 labels changed, 1 image excluded'
    """
    numbers = {
        "label": (corrected.get("relabelled", 0), "changed"),
        "image": (corrected.get("excluded", 0), "excluded"),
    }
    return ", ".join(f"{counted(number, noun)} {verb}" for noun, (number, verb) in numbers.items() if number)


def _example(issue: Issue) -> str:
    if not issue.items:
        return issue.detail
    first = issue.items[0]
    if issue.issue_type in DUPLICATE_TYPES:
        return f"{first.path} and {issue.items[1].path} ({issue.detail})"
    return f"{first.path} ({first.note or issue.detail})"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def by_detail(issue_type: str, found: Iterable[tuple[str, IssueItem]]) -> list[Issue]:
    """Return one issue for each detail, with all its items."""
    groups: dict[str, list[IssueItem]] = {}
    for detail, item in found:
        groups.setdefault(detail, []).append(item)
    return [Issue(issue_type, detail, tuple(items)) for detail, items in groups.items()]


def in_order(issues: Iterable[Issue]) -> tuple[Issue, ...]:
    """Return the issues worst first, type after type, each by first path."""
    ranks = {name: (SEVERITIES.index(ISSUE_TYPES[name].severity), rank) for rank, name in enumerate(ISSUE_TYPES)}

    def rank(issue: Issue) -> tuple[Any, ...]:
        return (*ranks[issue.issue_type], issue.paths[:1], issue.detail)

    return tuple(sorted(issues, key=rank))
