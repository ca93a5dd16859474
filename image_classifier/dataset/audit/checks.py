"""The checks of the audit: from the metadata of each file to issues. They delete nothing."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from image_classifier.dataset.audit.duplicate_checks import (
    DuplicatePairs,
    find_conflicts,
    find_duplicates,
    find_leaks,
    leaked_counts,
)
from image_classifier.dataset.audit.exclude import AUDIT, Exclusions
from image_classifier.dataset.audit.issues import Audit, AuditSettings, Issue, IssueItem, by_detail, in_order
from image_classifier.dataset.audit.overview import describe
from image_classifier.dataset.discovery import FileTree
from image_classifier.dataset.duplicates import NearDuplicates
from image_classifier.dataset.scan import FileMetadata
from image_classifier.images import is_image_name
from image_classifier.text import counted

__all__ = ["Audit", "AuditSettings", "Issue", "find_issues"]

_NAMED_FORMATS = {
    **dict.fromkeys(("jpg", "jpeg", "jpe", "jfif"), "JPEG"),
    **dict.fromkeys(("tif", "tiff"), "TIFF"),
    **{name.lower(): name for name in ("PNG", "WEBP", "GIF", "BMP")},
}
_GREY = ("1", "L", "LA", "La", "I", "F")  # and I;16 of all kinds
# Issue type -> pattern in the decoder's error; the first that matches.
_REASONS = {
    "empty_file": "is empty",
    "no_permission": "permission|not permitted|access is denied",
    "too_large": r"larger than|more than the|bomb|\bexceeds\b",
    "truncated": "truncated|cut short|ends too|unexpected end|premature|incomplete",
    "not_an_image": (
        r"not an? [A-Z].*image|none of the allowed|cannot identify|no such file|not a file|is not allowed|formats?\b"
    ),
}
_TRAINED = ("train", "")  # images without a split will mostly go to train


def find_issues(
    tree: FileTree,
    metadata: FileMetadata,
    near_duplicates: NearDuplicates,
    settings: AuditSettings,
    exclusions: Exclusions | None = None,
    corrected: Mapping[str, int] | None = None,
) -> Audit:
    """Find all issues of a data set.

    Args:
        tree: The files.
        metadata: Metadata of each file; row i is `tree.images[i]`.
        near_duplicates: Near-identical pairs of these rows.
        settings: Limits of the checks.
        exclusions: The rows of exclude.csv. Images that a person excluded are not checked. Images that the audit itself
            excluded are checked again, so that an issue and its row last as long as their reason.
        corrected: Numbers of labels that fix.csv changed and images that it excludes, for the summary.
    """
    exclusions = exclusions or Exclusions()
    paths = [image.path for image in tree.images]
    covered = exclusions.covers(paths)
    dataset = _Dataset(tree, metadata, settings, ~exclusions.by_hand(paths))
    issues = _all_issues(dataset, near_duplicates)
    leaks = leaked_counts(
        (issue for issue in issues if issue.issue_type == "leak"),
        Counter(tree.images[row].split for row in dataset.rows.tolist()),
    )
    data = describe(tree, metadata, dataset.kept) | {"leaked": leaks, "corrected": dict(corrected or {})}
    headlines = {"leak": "; ".join(_leak_sentence(split, numbers) for split, numbers in leaks.items())} if leaks else {}
    return Audit(
        issues,
        data,
        settings,
        headlines=headlines,
        proposed=_proposed(issues, settings),
        excluded={paths[row]: exclusions.reason(paths[row]) for row in np.flatnonzero(covered).tolist()},
        unmatched=tuple(exclusions.unmatched(paths)),
    )


def _leak_sentence(split: str, numbers: Mapping[str, float]) -> str:
    images = counted(int(numbers["images"]), f"{split} image")
    share = f"{100 * numbers['share']:.1f} %"
    return f"{int(numbers['leaked'])} of {images} ({share}) have a duplicate or near-duplicate in train"


@dataclass(frozen=True, eq=False)
class _Dataset:
    """The images that are checked: the rows of `kept`, bool [N]."""

    tree: FileTree
    metadata: FileMetadata
    settings: AuditSettings
    kept: np.ndarray

    @cached_property
    def readable(self) -> np.ndarray:
        """Whether each row is kept and can be decoded, bool [N]."""
        mask: np.ndarray = self.kept & self.metadata.readable
        return mask

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows that are kept and can be decoded, int64 [M]."""
        return np.flatnonzero(self.readable)

    @cached_property
    def counts(self) -> Mapping[str, Counter[str]]:
        """Label -> split -> number of readable images."""
        counts: dict[str, Counter[str]] = {
            label: Counter() for label in sorted({image.label for image in self.tree.images})
        }
        for row in self.rows.tolist():
            counts[self.tree.images[row].label][self.tree.images[row].split] += 1
        return counts

    @cached_property
    def _by_label(self) -> Mapping[str, list[int]]:
        rows: dict[str, list[int]] = {label: [] for label in self.counts}
        for row in self.rows.tolist():
            rows[self.tree.images[row].label].append(row)
        return rows

    def of(self, label: str, splits: Sequence[str]) -> list[int]:
        """Return the readable rows of one class in some splits."""
        return [row for row in self._by_label[label] if self.tree.images[row].split in splits]

    @cached_property
    def trained(self) -> Mapping[str, int]:
        """Label -> number of readable images that are for training, or not split yet."""
        return {label: sum(splits[split] for split in _TRAINED) for label, splits in self.counts.items()}

    def item(self, row: int, note: str = "") -> IssueItem:
        """Return a row as an item of an issue."""
        image = self.tree.images[row]
        return IssueItem(image.path, image.label, image.split, note)

    def of_mode(self, wanted: Callable[[str], bool]) -> np.ndarray:
        """Return whether the mode of each row is wanted, bool [N]."""
        return np.isin(
            self.metadata.modes, [code for code, mode in enumerate(self.metadata.mode_names) if wanted(mode)]
        )

    def chosen(self, mask: np.ndarray) -> list[int]:
        """Return the readable rows of a mask, bool [N]."""
        rows: list[int] = np.flatnonzero(self.readable & mask).tolist()
        return rows


def _all_issues(dataset: _Dataset, near_duplicates: NearDuplicates) -> tuple[Issue, ...]:
    duplicates = DuplicatePairs.of(dataset.tree.images, dataset.metadata, near_duplicates, dataset.readable)
    files = (_unreadable(dataset), _misnamed(dataset), _odd_modes(dataset), _greyscale(dataset), _shapes(dataset))
    classes = (_empty(dataset), _uneven(dataset), _few(dataset), _missing(dataset), _variants(dataset))
    pairs = (find_duplicates(duplicates), find_leaks(duplicates), find_conflicts(duplicates))
    return in_order(issue for group in (*files, *classes, *pairs, _strays(dataset)) for issue in group)


def _unreadable(dataset: _Dataset) -> Iterator[Issue]:
    found: dict[str, list[tuple[str, IssueItem]]] = {}
    for row, reason in sorted(dataset.metadata.errors.items()):
        if dataset.kept[row]:
            found.setdefault(issue_type_of(reason), []).append((reason, dataset.item(row)))
    for name, items in found.items():
        yield from by_detail(name, items)


def issue_type_of(reason: str) -> str:
    """Return the issue type of a file that cannot be read for this reason.

    >>> issue_type_of("image file is truncated"), issue_type_of("broken data stream")
    ('truncated', 'corrupt')
    """
    return next((name for name, pattern in _REASONS.items() if re.search(pattern, reason, re.IGNORECASE)), "corrupt")


def _misnamed(dataset: _Dataset) -> list[Issue]:
    found = []
    names = dataset.metadata.format_names
    formats = dataset.metadata.formats.tolist()
    suffixes = {image.path.rpartition(".")[2] for image in dataset.tree.images}
    promised = {suffix: _NAMED_FORMATS[suffix.lower()] for suffix in suffixes if suffix.lower() in _NAMED_FORMATS}
    for row in dataset.rows.tolist():
        suffix, actual = dataset.tree.images[row].path.rpartition(".")[2], names[formats[row]]
        if promised.get(suffix, actual) != actual:
            found.append((f"{actual} named .{suffix}", dataset.item(row)))
    return by_detail("wrong_extension", found)


def _odd_modes(dataset: _Dataset) -> Iterator[Issue]:
    metadata = dataset.metadata
    cmyk = dataset.chosen(dataset.of_mode(lambda mode: mode == "CMYK"))
    yield from by_detail("cmyk", [("mode CMYK", dataset.item(row)) for row in cmyk])
    deep = dataset.chosen(metadata.bits > 8)
    yield from by_detail(
        "deep_samples", [(f"{metadata.bits[row]} bits per channel", dataset.item(row)) for row in deep]
    )
    palette = dataset.chosen(dataset.of_mode(lambda mode: mode in ("P", "PA")))
    yield from by_detail("palette", [("mode P", dataset.item(row)) for row in palette])
    transparent = dataset.chosen(metadata.transparent)
    yield from by_detail("transparency", [("transparent pixels", dataset.item(row)) for row in transparent])
    animated = dataset.chosen(metadata.frames > 1)
    frames = [("several frames", dataset.item(row, f"{metadata.frames[row]} frames")) for row in animated]
    yield from by_detail("animation", frames)
    rotated = dataset.chosen(metadata.orientation > 1)
    yield from by_detail(
        "exif_rotation", [(f"orientation {metadata.orientation[row]}", dataset.item(row)) for row in rotated]
    )


def _greyscale(dataset: _Dataset) -> list[Issue]:
    """Return the fewer of grey and colour images, if a data set holds both."""
    grey = dataset.of_mode(lambda mode: mode in _GREY or mode.startswith("I;16"))
    greys, colours = dataset.chosen(grey), dataset.chosen(~grey)
    if not greys or not colours:
        return []
    detail, few = ("grey among colour", greys) if len(greys) <= len(colours) else ("colour among grey", colours)
    return by_detail("greyscale", [(detail, dataset.item(row)) for row in few])


def _shapes(dataset: _Dataset) -> Iterator[Issue]:
    widths = dataset.metadata.widths.astype(np.int64)
    heights = dataset.metadata.heights.astype(np.int64)
    shorter = np.minimum(widths, heights)
    longer = np.maximum(widths, heights)
    bound = min(dataset.settings.tiny, float(np.median(shorter[dataset.rows])) / 2) if len(dataset.rows) else 0
    aspect = dataset.settings.aspect
    checks = (
        ("tiny", f"shorter side below {bound:g} pixels", shorter < bound),
        ("extreme_aspect", f"one side above {aspect:g} times the other", longer > aspect * shorter),
    )
    for name, detail, mask in checks:
        items = [(detail, dataset.item(row, f"{widths[row]} × {heights[row]}")) for row in dataset.chosen(mask)]
        yield from by_detail(name, items)


def _empty(dataset: _Dataset) -> list[Issue]:
    return by_detail("empty_class", [("no image in it", IssueItem(folder)) for folder in dataset.tree.empty])


def _uneven(dataset: _Dataset) -> Iterator[Issue]:
    sizes = {label: count for label, count in dataset.trained.items() if count}
    if not sizes:
        return
    large = max(sizes, key=lambda label: sizes[label])
    small = min(sizes, key=lambda label: sizes[label])
    ratio = sizes[large] / sizes[small]
    if ratio > dataset.settings.imbalance:
        detail = (
            f"{large!r} has {counted(sizes[large], 'training image')}, {small!r} has {sizes[small]}: {ratio:.1f} to 1"
        )
        yield Issue("imbalance", detail, numbers={"largest": sizes[large], "smallest": sizes[small], "ratio": ratio})


def _few(dataset: _Dataset) -> Iterator[Issue]:
    few = {
        label: count
        for label, count in dataset.trained.items()
        if count < dataset.settings.few_images and (count or not dataset.counts[label])
    }
    for label, count in few.items():
        items = tuple(dataset.item(row) for row in dataset.of(label, _TRAINED))
        yield Issue(
            "few_images", f"{label!r} has {counted(count, 'readable training image')}", items, {"images": count}
        )


def _missing(dataset: _Dataset) -> Iterator[Issue]:
    for split in ("val", "test"):
        if not any(splits[split] for splits in dataset.counts.values()):
            continue
        for label, splits in dataset.counts.items():
            if splits[split] and not dataset.trained[label]:
                items = tuple(dataset.item(row) for row in dataset.of(label, (split,)))
                yield Issue(
                    "missing_in_train", f"{label!r} is in {split} and not in train", items, {"images": splits[split]}
                )
            elif dataset.trained[label] and not splits[split]:
                yield Issue(
                    "missing_in_test",
                    f"{label!r} is in train and not in {split}",
                    numbers={"images": dataset.trained[label]},
                )


def _variants(dataset: _Dataset) -> Iterator[Issue]:
    groups: dict[str, list[str]] = {}
    for label in dataset.counts:
        plain = unicodedata.normalize("NFKC", label).casefold()
        groups.setdefault(re.sub(r"[\s_-]+", " ", plain).strip(), []).append(label)
    for names in groups.values():
        if len(names) > 1:
            yield Issue(
                "class_name_variants",
                ", ".join(f"{name!r} ({counted(sum(dataset.counts[name].values()), 'image')})" for name in names),
            )


def _strays(dataset: _Dataset) -> Iterator[Issue]:
    images = [path for path in dataset.tree.strays if is_image_name(path.rpartition("/")[2])]
    others = sorted(set(dataset.tree.strays) - set(images))
    yield from by_detail("stray_images", [("in no class folder", IssueItem(path)) for path in images])
    yield from by_detail("stray_files", [("not the name of an image", IssueItem(path)) for path in others])
    yield from by_detail(
        "ignored_folders", [("next to the splits", IssueItem(folder)) for folder in dataset.tree.ignored]
    )


def _proposed(issues: Sequence[Issue], settings: AuditSettings) -> dict[str, str]:
    """Return path -> reason of the images with the issue types to exclude; the worst type gives the reason."""
    reasons: dict[str, str] = {}
    wanted = settings.excluded_types
    for issue in issues:
        if issue.issue_type in wanted:
            for item, detail in _to_exclude(issue):
                reasons.setdefault(item.path, f"{AUDIT}{issue.issue_type}: {detail}")
    return dict(sorted(reasons.items()))


def _to_exclude(issue: Issue) -> Iterable[tuple[IssueItem, str]]:
    """Return which images of an issue to exclude, each with its reason.

    Of duplicates these are all but the first, of a leak those that are trained on.
    """
    if issue.issue_type in ("exact_duplicates", "near_duplicates"):
        return [(item, _like(item, issue.items[0])) for item in issue.items[1:]]
    if issue.issue_type == "leak":
        return _leaking(issue)
    return [(item, ", ".join(filter(None, (issue.detail, item.note)))) for item in issue.items]


def _leaking(issue: Issue) -> list[tuple[IssueItem, str]]:
    """Return the duplicates in train, and those in val of images in test: the test split stays complete."""
    last = "test" if "test" in issue.numbers else "val"
    kept = next(item for item in issue.items if item.split == last)
    return [(item, _like(item, kept)) for item in issue.items if item.split != last]


def _like(item: IssueItem, kept: IssueItem) -> str:
    return f"like {kept.path} ({item.note})" if item.note else f"the same as {kept.path}"
