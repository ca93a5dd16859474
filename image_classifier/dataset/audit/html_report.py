"""The audit as files: audit.json for programs, and audit.html, one page with thumbnails that needs no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import write_text
from image_classifier.dataset.audit.issue_types import (
    DUPLICATE_TYPES,
    ISSUE_TYPES,
    NOUNS,
    SEVERITIES,
    UNREADABLE,
    IssueType,
)
from image_classifier.dataset.audit.issues import Audit, Issue, IssueItem
from image_classifier.html import document
from image_classifier.html.text import number, plain, unbroken
from image_classifier.html.thumbnails import BUDGET, NO_PICTURE, Thumbnail, thumbnail
from image_classifier.images import DEFAULT_LIMITS, WHITE, DecodeLimits
from image_classifier.text import counted

_MARKUP = 250  # characters of HTML around one image
_MAX_GROUP = 12  # images of one group on the page
_MAX_CLASSES = 100  # classes that are drawn
_MAX_ROWS = 200  # rows of exclude.csv on the page
_WORKERS = 4
_BATCH = 32  # images decoded before the size is checked again
_NAMES_ONLY = ("stray_files", "ignored_folders", "empty_class")
_HERE = Path(__file__).parent


def write_audit(
    audit: Audit,
    directory: Path,
    page: bool = True,
    limits: DecodeLimits = DEFAULT_LIMITS,
    background: tuple[int, int, int] = WHITE,
) -> Path:
    """Write audit.json and, with `page`, audit.html; return the path of audit.json.

    Raises:
        StorageError: A file cannot be written; each is written completely or not at all.
    """
    path = directory / "audit.json"
    html = render(audit, limits, background) if page else None
    # ASCII, so that names that are not UTF-8 survive.
    write_text(path, json.dumps(audit.as_dict(), indent=1, allow_nan=False) + "\n")
    if html is not None:
        write_text(directory / "audit.html", html)
    return path


def render(audit: Audit, limits: DecodeLimits = DEFAULT_LIMITS, background: tuple[int, int, int] = WHITE) -> str:
    """Return the page as HTML below 10 MB; all file names are escaped."""
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
        excluded=[(plain(path), plain(reason)) for path, reason in list(audit.excluded.items())[:_MAX_ROWS]],
    )


def _splits(audit: Audit) -> list[str]:
    """Return the splits of the data set; images without a split come last."""
    return [split for split in ("train", "val", "test", "undealt") if split in audit.data["splits"]]


@dataclass(frozen=True)
class _Picture:
    """A file of an issue on the page."""

    item: IssueItem
    thumbnail: Thumbnail = NO_PICTURE


@dataclass(frozen=True)
class _Group:
    """An issue on the page; `more` of its images are not shown."""

    detail: str
    pictures: Sequence[_Picture]
    more: int


@dataclass(frozen=True)
class _Section:
    """One issue type on the page; `shown_note` says how much of it is shown, if not all."""

    issue_type: str
    about: IssueType
    headline: str
    amount: str
    shown_note: str
    groups: Sequence[_Group]

    @property
    def is_duplicates(self) -> bool:
        """Whether the images of a group are shown side by side."""
        return self.issue_type in DUPLICATE_TYPES

    @property
    def is_text(self) -> bool:
        """Whether it is a list of names or sentences, without images."""
        return self.issue_type in _NAMES_ONLY or not any(group.pictures for group in self.groups)


def _sections(audit: Audit, limits: DecodeLimits, background: tuple[int, int, int]) -> Iterator[_Section]:
    """Yield the sections, worst first; room that one type does not use goes to the next."""
    room = BUDGET
    by_type = audit.by_type
    with ThreadPoolExecutor(_WORKERS) as pool:
        for index, (name, issues) in enumerate(by_type.items()):
            without_images = name in (*UNREADABLE, *_NAMES_ONLY)
            draw = _Picture if without_images else partial(_picture, audit.root, limits, background)
            share = room // (len(by_type) - index)
            groups, spent = _drawn(_chosen(issues, audit.settings.max_listed), partial(pool.map, draw), share)
            room -= spent
            yield _Section(
                name,
                ISSUE_TYPES[name],
                unbroken(audit.headlines.get(name, "")),
                unbroken(audit.amount(name)),
                _shown_note(issues, groups),
                groups,
            )


def _chosen(issues: Iterable[Issue], limit: int) -> Iterator[tuple[Issue, Sequence[IssueItem]]]:
    """Yield the first issues with their first items, at most `limit` items in total."""
    for issue in issues:
        items = issue.items[: min(limit, _MAX_GROUP) if issue.issue_type in DUPLICATE_TYPES else limit]
        if limit <= 0:
            return
        limit -= max(1, len(items))
        yield issue, items


def _drawn(
    chosen: Iterable[tuple[Issue, Sequence[IssueItem]]],
    draw: Callable[[Sequence[IssueItem]], Iterable[_Picture]],
    room: int,
) -> tuple[list[_Group], int]:
    """Return the issues with their images until `room` characters are used, and the characters used."""
    groups: list[_Group] = []
    spent = 0
    for issue, items in chosen:
        pictures: list[_Picture] = []
        for start in range(0, len(items), _BATCH):
            for picture in draw(items[start : start + _BATCH]) if spent < room else ():
                spent += len(picture.thumbnail.address) + len(picture.item.path) + _MARKUP
                if spent < room:
                    pictures.append(picture)
        if pictures or not items:
            spent += _MARKUP
            groups.append(_Group(plain(issue.detail), pictures, len(issue.items) - len(pictures)))
        if spent >= room:
            break
    return groups, min(spent, room)


def _shown_note(issues: Sequence[Issue], groups: Sequence[_Group]) -> str:
    """Return how much is shown ("200 of 1 234 images shown"), "" for all."""
    if issues[0].issue_type in DUPLICATE_TYPES or not issues[0].items:
        noun = "group" if issues[0].issue_type in DUPLICATE_TYPES else "issue"
        shown = len(groups)
        total = len(issues)
    else:
        noun = NOUNS.get(issues[0].issue_type, "image")
        shown = sum(len(group.pictures) for group in groups)
        total = sum(len(issue.items) for issue in issues)
    return unbroken(f"{number(shown)} of {counted(total, noun)} shown; all are in audit.json") if shown < total else ""


def _picture(root: Path, limits: DecodeLimits, background: tuple[int, int, int], item: IssueItem) -> _Picture:
    return _Picture(item, thumbnail(root / item.path, limits, background))


def _classes(classes: Mapping[str, Mapping[str, int]], splits: Sequence[str]) -> list[dict[str, Any]]:
    """Return the classes to draw, largest first; of many classes the largest and the smallest."""
    ordered = sorted(classes, key=lambda label: (-classes[label]["images"], label))
    shown = ordered if len(ordered) <= _MAX_CLASSES else ordered[: _MAX_CLASSES // 2] + ordered[-_MAX_CLASSES // 2 :]
    largest = max((classes[label]["images"] for label in ordered), default=0) or 1
    counts = {label: [(split, classes[label].get(split, 0)) for split in splits] for label in shown}
    return [
        {"label": plain(label), "counts": classes[label], "splits": counts[label], "largest": largest}
        for label in shown
    ]
