"""The audit as files: audit.json for a program, and audit.html, one page with thumbnails that needs no network and runs no foreign script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import write_text
from image_classifier.dataset.audit.issue_types import ALIKE, KINDS, NOUNS, SEVERITIES, UNREADABLE, IssueType
from image_classifier.dataset.audit.issues import Audit, Issue, IssueItem
from image_classifier.html import document
from image_classifier.html.text import number, plain, unbroken
from image_classifier.html.thumbnails import BUDGET, NO_PICTURE, Thumbnail, thumbnail
from image_classifier.images import DEFAULT_LIMITS, WHITE, DecodeLimits
from image_classifier.text import counted

_MARKUP = 250  # characters of HTML around one image
_GROUP = 12  # images of one group that are shown
_CLASSES = 100  # classes that are drawn
_ROWS = 200  # rows of exclude.csv that are listed
_WORKERS = 4
_BATCH = 32  # images decoded before the room is looked at again
_NAMES_ONLY = ("stray_files", "ignored_folders", "empty_class")
_HERE = Path(__file__).parent


def write_audit(
    audit: Audit,
    directory: Path,
    page: bool = True,
    limits: DecodeLimits = DEFAULT_LIMITS,
    background: tuple[int, int, int] = WHITE,
) -> Path:
    """Write audit.json and, with `page`, audit.html; each whole or not at all. Returns the path of audit.json.

    Raises:
        StorageError: The disk refuses.
    """
    path = directory / "audit.json"
    html = render(audit, limits, background) if page else None
    write_text(
        path, json.dumps(audit.as_dict(), indent=1, allow_nan=False) + "\n"
    )  # ASCII: names that are no UTF-8 come back as they were
    if html is not None:
        write_text(directory / "audit.html", html)
    return path


def render(audit: Audit, limits: DecodeLimits = DEFAULT_LIMITS, background: tuple[int, int, int] = WHITE) -> str:
    """The page as one HTML text below 10 MB; file names are shown, never run."""
    return document.render(
        _HERE / "page.html.j2",
        _HERE / "page.css",
        Path(document.__file__).parent / "filter.js",
        audit=audit,
        data=audit.data,
        name=plain(audit.root.resolve().name or str(audit.root)),
        severities=[(severity, audit.severities[severity]) for severity in SEVERITIES],
        sections=list(_sections(audit, limits, background)),
        classes=_classes(audit.data["classes"], _splits(audit)),
        splits=_splits(audit),
        left_out=[(plain(path), plain(reason)) for path, reason in list(audit.left_out.items())[:_ROWS]],
    )


def _splits(audit: Audit) -> list[str]:
    """The parts that there are, those not dealt yet last."""
    return [split for split in ("train", "val", "test", "undealt") if split in audit.data["splits"]]


@dataclass(frozen=True)
class _Picture:
    """A file of a finding as the page shows it."""

    item: IssueItem
    thumbnail: Thumbnail = NO_PICTURE


@dataclass(frozen=True)
class _Group:
    """A finding as the page shows it; `more` of its images are left out."""

    detail: str
    pictures: Sequence[_Picture]
    more: int


@dataclass(frozen=True)
class _Section:
    """One kind as the page shows it; `cut` says how much of it, where that is not all."""

    kind: str
    about: IssueType
    headline: str
    amount: str
    cut: str
    groups: Sequence[_Group]

    @property
    def alike(self) -> bool:
        """Whether the images of a group stand side by side."""
        return self.kind in ALIKE

    @property
    def words(self) -> bool:
        """Whether it is a list of names or sentences, without pictures."""
        return self.kind in _NAMES_ONLY or not any(group.pictures for group in self.groups)


def _sections(audit: Audit, limits: DecodeLimits, background: tuple[int, int, int]) -> Iterator[_Section]:
    """The sections, worst first; what one kind leaves of its share of the page goes to the next."""
    room, kinds = BUDGET, audit.by_kind
    with ThreadPoolExecutor(_WORKERS) as pool:
        for place, (kind, findings) in enumerate(kinds.items()):
            draw = (
                _Picture if kind in (*UNREADABLE, *_NAMES_ONLY) else partial(_picture, audit.root, limits, background)
            )
            share = room // (len(kinds) - place)
            groups, spent = _drawn(_chosen(findings, audit.settings.max_listed), partial(pool.map, draw), share)
            room -= spent
            yield _Section(
                kind,
                KINDS[kind],
                unbroken(audit.headlines.get(kind, "")),
                unbroken(audit.amount(kind)),
                _cut(findings, groups),
                groups,
            )


def _chosen(findings: Iterable[Issue], limit: int) -> Iterator[tuple[Issue, Sequence[IssueItem]]]:
    """The first findings with their first items, at most `limit` of these."""
    for finding in findings:
        items = finding.items[: min(limit, _GROUP) if finding.kind in ALIKE else limit]
        if limit <= 0:
            return
        limit -= max(1, len(items))
        yield finding, items


def _drawn(
    chosen: Iterable[tuple[Issue, Sequence[IssueItem]]],
    draw: Callable[[Sequence[IssueItem]], Iterable[_Picture]],
    room: int,
) -> tuple[list[_Group], int]:
    """The findings with their pictures, as many as there is room for, and how much of it they take."""
    groups: list[_Group] = []
    spent = 0
    for finding, items in chosen:
        pictures: list[_Picture] = []
        for start in range(0, len(items), _BATCH):
            for picture in draw(items[start : start + _BATCH]) if spent < room else ():
                spent += len(picture.thumbnail.address) + len(picture.item.path) + _MARKUP
                if spent < room:
                    pictures.append(picture)
        if pictures or not items:
            spent += _MARKUP
            groups.append(_Group(plain(finding.detail), pictures, len(finding.items) - len(pictures)))
        if spent >= room:
            break
    return groups, min(spent, room)


def _cut(findings: Sequence[Issue], groups: Sequence[_Group]) -> str:
    """How much is shown (200 of 1 234 images shown), "" where that is all."""
    if findings[0].kind in ALIKE or not findings[0].items:
        shown, whole, noun = len(groups), len(findings), "group" if findings[0].kind in ALIKE else "finding"
    else:
        noun = NOUNS.get(findings[0].kind, "image")
        shown, whole = sum(len(group.pictures) for group in groups), sum(len(finding.items) for finding in findings)
    return unbroken(f"{number(shown)} of {counted(whole, noun)} shown; all are in audit.json") if shown < whole else ""


def _picture(root: Path, limits: DecodeLimits, background: tuple[int, int, int], item: IssueItem) -> _Picture:
    return _Picture(item, thumbnail(root / item.path, limits, background))


def _classes(classes: Mapping[str, Mapping[str, int]], splits: Sequence[str]) -> list[dict[str, Any]]:
    """The classes that are drawn, the largest first; of many, the largest and the smallest."""
    ordered = sorted(classes, key=lambda label: (-classes[label]["images"], label))
    shown = ordered if len(ordered) <= _CLASSES else ordered[: _CLASSES // 2] + ordered[-_CLASSES // 2 :]
    largest = max((classes[label]["images"] for label in ordered), default=0) or 1
    parts = {label: [(split, classes[label].get(split, 0)) for split in splits] for label in shown}
    return [
        {"label": plain(label), "counts": classes[label], "parts": parts[label], "largest": largest} for label in shown
    ]
