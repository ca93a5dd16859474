"""What an audit says: findings as facts with paths, and the whole as a table for a terminal, lines for a log and data for a program."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.dataset.audit.issue_types import ALIKE, EXCLUDABLE, GROUPED, KINDS, NOUNS, SEVERITIES, UNREADABLE
from image_classifier.errors import ConfigError
from image_classifier.text import counted, printable

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AuditSettings:
    """The config group `audit`.

    Args:
        fail_on: Findings of this severity and above make exit code 1: "error", "warning", "info"; None for never.
        exclude: Kinds whose images are written to exclude.csv; "unreadable" stands for all that cannot be decoded.
        output_dir: Folder of audit.json, audit.html and exclude.csv; None: one named after the data set.
        tiny: A shorter side below this many pixels, and below half the data set's median, is tiny.
        aspect: Longer over shorter side above this is extreme.
        imbalance: Images of the largest over those of the smallest class above this is a finding.
        few_images: Fewer training images in a class than this is a finding.
        max_listed: Images shown on the page for each kind; audit.json lists all.

    Raises:
        ConfigError: A value that cannot be, named by its key.
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
            raise ConfigError(f"audit.fail_on must be one of {', '.join(SEVERITIES)} or null, not {self.fail_on!r}")
        for kind in self.exclude if isinstance(self.exclude, list) else ():
            if kind not in EXCLUDABLE:
                raise ConfigError(f"audit.exclude cannot name {kind!r}", f"its kinds are {', '.join(EXCLUDABLE)}")
        bounds = {"tiny": 0, "aspect": 1, "imbalance": 1, "few_images": 0, "max_listed": 0}
        for name, least in bounds.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not value >= least:
                raise ConfigError(f"audit.{name} must be at least {least}, not {value}")

    @property
    def excluded_kinds(self) -> tuple[str, ...]:
        """The kinds of `exclude`, "unreadable" spelt out, worst first."""
        named = {*self.exclude, *(UNREADABLE if "unreadable" in self.exclude else ())}
        return tuple(kind for kind in KINDS if kind in named)


@dataclass(frozen=True, slots=True)
class IssueItem:
    """One file or folder of a finding: `path` relative to the root, and what sets it apart from the others ("12 × 9 pixels")."""

    path: str
    label: str = ""
    split: str = ""
    note: str = ""


@dataclass(frozen=True)
class Issue:
    """One fact: what kind, which files, and what of them; `numbers` are its figures for a program."""

    kind: str
    detail: str
    items: tuple[IssueItem, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def severity(self) -> str:
        """error, warning or info."""
        return KINDS[self.kind].severity

    @property
    def paths(self) -> tuple[str, ...]:
        """The files or folders it is about."""
        return tuple(item.path for item in self.items)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in audit.json."""
        items = [
            {name: value for name, value in zip(IssueItem.__slots__, _values(item), strict=True) if value}
            for item in self.items
        ]
        return {
            "kind": self.kind,
            "severity": self.severity,
            "detail": self.detail,
            "numbers": dict(self.numbers),
            "files": items,
        }


def _values(item: IssueItem) -> tuple[str, str, str, str]:
    return item.path, item.label, item.split, item.note


@dataclass(frozen=True)
class Audit:
    """All findings, worst first, and what the data set is.

    Args:
        findings: Sorted by severity, then kind, then first path.
        data: The data set in figures: images, classes, sizes, formats, modes, splits, fingerprint.
        settings: What was asked for.
        headlines: Kind -> the one sentence that sums it up, where counts say too little.
        proposed: Path -> reason of the images that exclude.csv shall leave out by itself.
        left_out: Path -> reason of the images that exclude.csv left out before the audit looked.
        unmatched: What exclude.csv names by hand and is not there.
    """

    findings: tuple[Issue, ...]
    data: Mapping[str, Any]
    settings: AuditSettings
    headlines: Mapping[str, str] = field(default_factory=dict)
    proposed: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """The folder that all paths start from."""
        return Path(self.data["root"])

    @property
    def corrected(self) -> Mapping[str, int]:
        """How many labels fix.csv changed and images it leaves out; empty where none."""
        corrected: Mapping[str, int] = self.data.get("corrected", {})
        return corrected

    @property
    def by_kind(self) -> dict[str, list[Issue]]:
        """The findings of each kind that there is, worst first."""
        kinds: dict[str, list[Issue]] = {}
        for finding in self.findings:
            kinds.setdefault(finding.kind, []).append(finding)
        return kinds

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> how many files it concerns, or how many findings where it concerns classes."""
        return {
            kind: len({path for found in group for path in found.paths}) or len(group)
            for kind, group in self.by_kind.items()
        }

    @property
    def severities(self) -> dict[str, int]:
        """Severity -> how many kinds of finding have it."""
        kinds = self.by_kind
        return {severity: sum(KINDS[kind].severity == severity for kind in kinds) for severity in SEVERITIES}

    def exceeds(self, fail_on: str | None) -> bool:
        """Whether there is a finding of this severity or above; never where `fail_on` is None."""
        return fail_on is not None and any(
            SEVERITIES.index(finding.severity) <= SEVERITIES.index(fail_on) for finding in self.findings
        )

    def headline(self, kind: str) -> str:
        """One line for all findings of a kind."""
        return self.headlines.get(kind) or f"for example {_example(self.by_kind[kind][0])}"

    def amount(self, kind: str) -> str:
        """How much of a kind there is: "12 images", "6 groups, 14 images"."""
        total = counted(self.counts[kind], NOUNS.get(kind, "image"))
        return f"{counted(len(self.by_kind[kind]), GROUPED[kind])}, {total}" if kind in GROUPED else total

    def table(self, width: int | None = None) -> list[str]:
        """Lines for a terminal: severity, kind, how many, and the first of them; one line where nothing was found.

        `width` is that of the terminal in characters; None asks it.
        """
        size = f"{counted(self.data['images'], 'image')} in {counted(len(self.data['classes']), 'class')}"
        if not self.findings:
            return [f"{size}: nothing found", *self._left_out_lines()]
        rows = [("severity", "finding", "how many", "")]
        rows += [
            (KINDS[kind].severity, kind, self.amount(kind), printable(self.headline(kind))) for kind in self.by_kind
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        room = max(30, (width or shutil.get_terminal_size((160, 24)).columns) - sum(widths) - 6)
        columns = ([cell.ljust(size) for cell, size in zip(row, widths, strict=False)] for row in rows)
        lines = ["  ".join((*cells, _cut(row[3], room))).rstrip() for cells, row in zip(columns, rows, strict=True)]
        return [f"{size}: {self._severity_counts()}", "", *lines, *self._left_out_lines()]

    def _left_out_lines(self) -> list[str]:
        excluded = len(self.left_out) - self.corrected.get("excluded", 0)
        lines = [f"{counted(excluded, 'image')} left out by exclude.csv"] if excluded > 0 else []
        lines += [f"fix.csv: {issue_counts_text(self.corrected)}"] if self.corrected else []
        return lines + [f"exclude.csv names {printable(name)!r}, which is not there" for name in self.unmatched[:5]]

    def _severity_counts(self) -> str:
        nouns = {"error": ("kind of error", "kinds of error"), "warning": ("of warning",) * 2, "info": ("of note",) * 2}
        return ", ".join(f"{number} {nouns[severity][number != 1]}" for severity, number in self.severities.items())

    def summary(self) -> list[str]:
        """One or two lines for a log: what is wrong, worst first."""
        corrected = [f"audit: after fix.csv: {issue_counts_text(self.corrected)}"] if self.corrected else []
        if not self.exceeds("warning"):
            return ["audit: nothing wrong found", *corrected]
        parts = [f"{kind} {self.amount(kind)}" for kind in self.by_kind if KINDS[kind].severity != "info"]
        more = f" and {len(parts) - 6} more kinds" if len(parts) > 6 else ""
        lines = [f"audit: {'; '.join(parts[:6])}{more}"]
        return [*lines, *([f"audit: {self.headlines['leak']}"] if "leak" in self.headlines else []), *corrected]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values: audit.json."""
        groups = self.by_kind
        counts = {
            kind: {"severity": KINDS[kind].severity, "findings": len(groups[kind]), "files": count}
            for kind, count in self.counts.items()
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "data": dict(self.data),
            "settings": asdict(self.settings),
            "counts": counts,
            "headlines": dict(self.headlines),
            "findings": [finding.as_dict() for finding in self.findings],
            "exclude": {
                "left_out": dict(self.left_out),
                "proposed": dict(self.proposed),
                "unmatched": list(self.unmatched),
            },
        }


def issue_counts_text(corrected: Mapping[str, int]) -> str:
    """What fix.csv did: "3 labels changed, 1 image left out"."""
    parts = {"label": (corrected.get("relabelled", 0), "changed"), "image": (corrected.get("excluded", 0), "left out")}
    return ", ".join(f"{counted(number, noun)} {done}" for noun, (number, done) in parts.items() if number)


def _example(finding: Issue) -> str:
    if not finding.items:
        return finding.detail
    first = finding.items[0]
    if finding.kind in ALIKE:
        return f"{first.path} and {finding.items[1].path} ({finding.detail})"
    return f"{first.path} ({first.note or finding.detail})"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def by_detail(kind: str, found: Iterable[tuple[str, IssueItem]]) -> list[Issue]:
    """One finding of each detail, with all its items."""
    groups: dict[str, list[IssueItem]] = {}
    for detail, item in found:
        groups.setdefault(detail, []).append(item)
    return [Issue(kind, detail, tuple(items)) for detail, items in groups.items()]


def in_order(findings: Iterable[Issue]) -> tuple[Issue, ...]:
    """Worst first; one kind after the other, each by first path."""
    ranks = {kind: (SEVERITIES.index(KINDS[kind].severity), place) for place, kind in enumerate(KINDS)}
    key: Callable[[Issue], Any] = lambda finding: (*ranks[finding.kind], finding.paths[:1], finding.detail)  # noqa: E731
    return tuple(sorted(findings, key=key))
