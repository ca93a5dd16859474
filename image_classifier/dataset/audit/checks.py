"""The audit: from what one look at each file told to findings, facts with paths. Nothing is deleted; `exclude.csv` leaves out."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from image_classifier.dataset.audit.duplicate_checks import (
    Copies,
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
_REASONS = {  # what the decoder says -> kind; the first that fits
    "empty_file": "is empty",
    "no_permission": "permission|not permitted|access is denied",
    "too_large": r"larger than|more than the|bomb|\bexceeds\b",
    "truncated": "truncated|cut short|ends too|unexpected end|premature|incomplete",
    "not_an_image": r"not an? [A-Z].*image|none of the allowed|cannot identify|no such file|not a file|is not allowed|formats?\b",
}
_TRAINED = ("train", "")  # what is not given to a part is dealt, most of it to train


def find_issues(
    tree: FileTree,
    facts: FileMetadata,
    twins: NearDuplicates,
    settings: AuditSettings,
    exclusions: Exclusions | None = None,
    corrected: Mapping[str, int] | None = None,
) -> Audit:
    """Everything that is wrong with a data set, or worth knowing.

    Args:
        tree: The files.
        facts: One look at each; row i is `tree.images[i]`.
        twins: Near-identical pairs of these rows.
        settings: What counts as a finding.
        exclusions: What is left out. Images that a person left out yield no finding; what the audit itself left out does, again
            and again: a finding lasts as long as its reason, and so does its row.
        corrected: How many labels of the tree fix.csv changed and images it leaves out, for the summary.
    """
    exclusions = exclusions or Exclusions()
    paths = [image.path for image in tree.images]
    covered = exclusions.covers(paths)
    seen = _Seen(tree, facts, settings, ~exclusions.by_hand(paths))
    findings = _findings(seen, twins)
    leaks = leaked_counts(
        (finding for finding in findings if finding.kind == "leak"),
        Counter(tree.images[row].split for row in seen.rows.tolist()),
    )
    data = describe(tree, facts, seen.kept) | {"leaked": leaks, "corrected": dict(corrected or {})}
    return Audit(
        findings,
        data,
        settings,
        headlines={"leak": "; ".join(_leak_sentence(split, numbers) for split, numbers in leaks.items())}
        if leaks
        else {},
        proposed=_proposed(findings, settings),
        left_out={paths[row]: exclusions.reason(paths[row]) for row in np.flatnonzero(covered).tolist()},
        unmatched=tuple(exclusions.unmatched(paths)),
    )


def _leak_sentence(split: str, numbers: Mapping[str, float]) -> str:
    leaked, whole = int(numbers["leaked"]), int(numbers["images"])
    return f"{leaked} of {counted(whole, f'{split} image')} ({100 * numbers['share']:.1f} %) have a copy or a twin in train"


@dataclass(frozen=True, eq=False)
class _Seen:
    """A data set as the checks see it: only the rows of `kept`, bool [N]."""

    tree: FileTree
    facts: FileMetadata
    settings: AuditSettings
    kept: np.ndarray

    @cached_property
    def readable(self) -> np.ndarray:
        """Rows that are kept and can be decoded, bool [N]."""
        mask: np.ndarray = self.kept & self.facts.readable
        return mask

    @cached_property
    def rows(self) -> np.ndarray:
        """The same as int64 [M]."""
        return np.flatnonzero(self.readable)

    @cached_property
    def counts(self) -> Mapping[str, Counter[str]]:
        """Label -> split -> how many images can be read."""
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
        """The readable rows of one class in some splits."""
        return [row for row in self._by_label[label] if self.tree.images[row].split in splits]

    @cached_property
    def trained(self) -> Mapping[str, int]:
        """Label -> how many images can be read and are for training, or are still to be dealt."""
        return {label: sum(splits[split] for split in _TRAINED) for label, splits in self.counts.items()}

    def item(self, row: int, note: str = "") -> IssueItem:
        """A row as an item of a finding."""
        image = self.tree.images[row]
        return IssueItem(image.path, image.label, image.split, note)

    def of_mode(self, wanted: Callable[[str], bool]) -> np.ndarray:
        """Rows whose mode is one of these, bool [N]."""
        return np.isin(self.facts.modes, [code for code, mode in enumerate(self.facts.mode_names) if wanted(mode)])

    def chosen(self, mask: np.ndarray) -> list[int]:
        """The readable rows among some, bool [N]."""
        rows: list[int] = np.flatnonzero(self.readable & mask).tolist()
        return rows


def _findings(seen: _Seen, twins: NearDuplicates) -> tuple[Issue, ...]:
    copies = Copies.of(seen.tree.images, seen.facts, twins, seen.readable)
    files = (_unreadable(seen), _misnamed(seen), _odd_modes(seen), _greyscale(seen), _shapes(seen))
    classes = (_empty(seen), _uneven(seen), _few(seen), _missing(seen), _variants(seen))
    pairs = (find_duplicates(copies), find_leaks(copies), find_conflicts(copies))
    return in_order(finding for group in (*files, *classes, *pairs, _strays(seen)) for finding in group)


def _unreadable(seen: _Seen) -> Iterator[Issue]:
    found: dict[str, list[tuple[str, IssueItem]]] = {}
    for row, reason in sorted(seen.facts.errors.items()):
        if seen.kept[row]:
            found.setdefault(kind_of(reason), []).append((reason, seen.item(row)))
    for kind, items in found.items():
        yield from by_detail(kind, items)


def kind_of(reason: str) -> str:
    """Which kind of finding it is when a file cannot be read for this reason."""
    return next((kind for kind, pattern in _REASONS.items() if re.search(pattern, reason, re.IGNORECASE)), "corrupt")


def _misnamed(seen: _Seen) -> list[Issue]:
    found = []
    names, formats = seen.facts.format_names, seen.facts.formats.tolist()
    suffixes = {image.path.rpartition(".")[2] for image in seen.tree.images}
    promised = {suffix: _NAMED_FORMATS[suffix.lower()] for suffix in suffixes if suffix.lower() in _NAMED_FORMATS}
    for row in seen.rows.tolist():
        suffix, actual = seen.tree.images[row].path.rpartition(".")[2], names[formats[row]]
        if promised.get(suffix, actual) != actual:
            found.append((f"{actual} named .{suffix}", seen.item(row)))
    return by_detail("wrong_extension", found)


def _odd_modes(seen: _Seen) -> Iterator[Issue]:
    facts = seen.facts
    yield from by_detail(
        "cmyk", [("mode CMYK", seen.item(row)) for row in seen.chosen(seen.of_mode(lambda mode: mode == "CMYK"))]
    )
    yield from by_detail(
        "deep_samples", [(f"{facts.bits[row]} bits a sample", seen.item(row)) for row in seen.chosen(facts.bits > 8)]
    )
    yield from by_detail(
        "palette", [("mode P", seen.item(row)) for row in seen.chosen(seen.of_mode(lambda mode: mode in ("P", "PA")))]
    )
    yield from by_detail(
        "transparency", [("transparent pixels", seen.item(row)) for row in seen.chosen(facts.transparent)]
    )
    yield from by_detail(
        "animation",
        [("several frames", seen.item(row, f"{facts.frames[row]} frames")) for row in seen.chosen(facts.frames > 1)],
    )
    turned = [(f"orientation {facts.orientation[row]}", seen.item(row)) for row in seen.chosen(facts.orientation > 1)]
    yield from by_detail("exif_rotation", turned)


def _greyscale(seen: _Seen) -> list[Issue]:
    """The fewer of grey and colour images, where a data set holds both."""
    grey = seen.of_mode(lambda mode: mode in _GREY or mode.startswith("I;16"))
    greys, colours = seen.chosen(grey), seen.chosen(~grey)
    if not greys or not colours:
        return []
    detail, few = ("grey among colour", greys) if len(greys) <= len(colours) else ("colour among grey", colours)
    return by_detail("greyscale", [(detail, seen.item(row)) for row in few])


def _shapes(seen: _Seen) -> Iterator[Issue]:
    widths, heights = seen.facts.widths.astype(np.int64), seen.facts.heights.astype(np.int64)
    shorter, longer = np.minimum(widths, heights), np.maximum(widths, heights)
    bound = min(seen.settings.tiny, float(np.median(shorter[seen.rows])) / 2) if len(seen.rows) else 0
    for kind, mask in (("tiny", shorter < bound), ("extreme_aspect", longer > seen.settings.aspect * shorter)):
        detail = (
            f"shorter side below {bound:g} pixels"
            if kind == "tiny"
            else f"one side above {seen.settings.aspect:g} times the other"
        )
        yield from by_detail(
            kind, [(detail, seen.item(row, f"{widths[row]} × {heights[row]}")) for row in seen.chosen(mask)]
        )


def _empty(seen: _Seen) -> list[Issue]:
    return by_detail("empty_class", [("no images in it", IssueItem(folder)) for folder in seen.tree.empty])


def _uneven(seen: _Seen) -> Iterator[Issue]:
    sizes = {label: count for label, count in seen.trained.items() if count}
    if not sizes:
        return
    large, small = max(sizes, key=lambda label: sizes[label]), min(sizes, key=lambda label: sizes[label])
    ratio = sizes[large] / sizes[small]
    if ratio > seen.settings.imbalance:
        detail = (
            f"{large!r} has {counted(sizes[large], 'training image')}, {small!r} has {sizes[small]}: {ratio:.1f} to 1"
        )
        yield Issue("imbalance", detail, numbers={"largest": sizes[large], "smallest": sizes[small], "ratio": ratio})


def _few(seen: _Seen) -> Iterator[Issue]:
    few = {
        label: count
        for label, count in seen.trained.items()
        if count < seen.settings.few_images and (count or not seen.counts[label])
    }
    for label, count in few.items():
        items = tuple(seen.item(row) for row in seen.of(label, _TRAINED))
        yield Issue(
            "few_images", f"{label!r} has {counted(count, 'training image')} that can be read", items, {"images": count}
        )


def _missing(seen: _Seen) -> Iterator[Issue]:
    for split in ("val", "test"):
        if not any(splits[split] for splits in seen.counts.values()):
            continue
        for label, splits in seen.counts.items():
            if splits[split] and not seen.trained[label]:
                items = tuple(seen.item(row) for row in seen.of(label, (split,)))
                yield Issue(
                    "missing_in_train", f"{label!r} is in {split} and not in train", items, {"images": splits[split]}
                )
            elif seen.trained[label] and not splits[split]:
                yield Issue(
                    "missing_in_test",
                    f"{label!r} is in train and not in {split}",
                    numbers={"images": seen.trained[label]},
                )


def _variants(seen: _Seen) -> Iterator[Issue]:
    groups: dict[str, list[str]] = {}
    for label in seen.counts:
        plain = unicodedata.normalize("NFKC", label).casefold()
        groups.setdefault(re.sub(r"[\s_-]+", " ", plain).strip(), []).append(label)
    for names in groups.values():
        if len(names) > 1:
            yield Issue(
                "class_name_variants",
                ", ".join(f"{name!r} ({counted(sum(seen.counts[name].values()), 'image')})" for name in names),
            )


def _strays(seen: _Seen) -> Iterator[Issue]:
    images = [path for path in seen.tree.strays if is_image_name(path.rpartition("/")[2])]
    others = sorted(set(seen.tree.strays) - set(images))
    yield from by_detail("stray_images", [("in no class folder", IssueItem(path)) for path in images])
    yield from by_detail("stray_files", [("no image by its name", IssueItem(path)) for path in others])
    yield from by_detail("ignored_folders", [("beside the parts", IssueItem(folder)) for folder in seen.tree.ignored])


def _proposed(findings: Sequence[Issue], settings: AuditSettings) -> dict[str, str]:
    """Path -> reason of the images that the chosen kinds leave out; the worst kind gives the reason."""
    reasons: dict[str, str] = {}
    wanted = settings.excluded_kinds
    for finding in findings:
        if finding.kind in wanted:
            for item, detail in _to_leave_out(finding):
                reasons.setdefault(item.path, f"{AUDIT}{finding.kind}: {detail}")
    return dict(sorted(reasons.items()))


def _to_leave_out(finding: Issue) -> Iterable[tuple[IssueItem, str]]:
    """Which images of a finding go, and what to say of each: of duplicates all but the first, of a leak what is trained on."""
    if finding.kind in ("exact_duplicates", "near_duplicates"):
        return [(item, _like(item, finding.items[0])) for item in finding.items[1:]]
    if finding.kind == "leak":
        return _leaking(finding)
    return [(item, ", ".join(filter(None, (finding.detail, item.note)))) for item in finding.items]


def _leaking(finding: Issue) -> list[tuple[IssueItem, str]]:
    """The copies that are trained on, and those in val of what is in test: the test part stays whole."""
    last = "test" if "test" in finding.numbers else "val"
    kept = next(item for item in finding.items if item.split == last)
    return [(item, _like(item, kept)) for item in finding.items if item.split != last]


def _like(item: IssueItem, kept: IssueItem) -> str:
    return f"like {kept.path} ({item.note})" if item.note else f"the same as {kept.path}"
