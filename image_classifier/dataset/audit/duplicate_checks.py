"""What equal files and near-identical pictures mean for a data set: duplicates, leaks between parts, conflicting labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from image_classifier.dataset.audit.issues import Issue, IssueItem
from image_classifier.dataset.discovery import ImageFile
from image_classifier.dataset.duplicates import NearDuplicates, clusters
from image_classifier.dataset.scan import FileMetadata

_Best = dict[int, tuple[float, bool]]  # row -> correlation of its strongest pair, and whether that is a mirrored one


@dataclass(frozen=True, eq=False)
class Copies:
    """The pairs among a tree's images; rows are positions in `images`.

    Args:
        images: All images of the tree, N.
        digests: sha256 of each file, uint8 [N, 32].
        first: One row of each pair, int64 [P].
        second: The other, int64 [P].
        correlation: Of the thumbnails, float32 [P]; 1 for equal files.
        mirrored: Whether the second must be mirrored for that, bool [P].
        equal: Pairs of equal files, bool [P]: each later copy with the first one.
    """

    images: Sequence[ImageFile]
    digests: np.ndarray
    first: np.ndarray
    second: np.ndarray
    correlation: np.ndarray
    mirrored: np.ndarray
    equal: np.ndarray

    @classmethod
    def of(cls, images: Sequence[ImageFile], facts: FileMetadata, twins: NearDuplicates, kept: np.ndarray) -> Copies:
        """The pairs whose images both are among the `kept` rows, bool [N]."""
        digests = np.asarray(facts.digests)
        near = kept[twins.first] & kept[twins.second]
        first, second = _equal(digests, kept)
        count = len(first)
        ends = np.concatenate([first, twins.first[near]]), np.concatenate([second, twins.second[near]])
        correlation = np.concatenate([np.ones(count, np.float32), twins.correlation[near]])
        mirrored = np.concatenate([np.zeros(count, bool), twins.mirrored[near]])
        if not near.all():
            added = _bridges(digests, facts.thumbnails, twins, kept, ends)
            ends = np.concatenate([ends[0], added.first]), np.concatenate([ends[1], added.second])
            correlation = np.concatenate([correlation, added.correlation])
            mirrored = np.concatenate([mirrored, added.mirrored])
        return cls(images, digests, *ends, correlation, mirrored, np.arange(len(correlation)) < count)

    @cached_property
    def clusters(self) -> list[list[int]]:
        """Rows of each connected cluster, sorted."""
        return self.components(np.ones(len(self.first), dtype=bool))

    def components(self, pairs: np.ndarray) -> list[list[int]]:
        """Rows of each cluster that some pairs, bool [P], connect."""
        first, second = self.first[pairs], self.second[pairs]
        names = clusters(len(self.images), first, second)
        touched = np.unique(np.concatenate([first, second]))
        return _grouped(touched.tolist(), lambda row: int(names[row]))

    def differ(self, key: Callable[[ImageFile], Hashable]) -> np.ndarray:
        """Which pairs, bool [P], differ in this."""
        rows = np.unique(np.concatenate([self.first, self.second]))
        codes = np.zeros(len(self.images), dtype=np.int64)
        seen: dict[Hashable, int] = {}
        codes[rows] = [seen.setdefault(key(self.images[row]), len(seen)) for row in rows.tolist()]
        return np.asarray(codes[self.first] != codes[self.second])

    def strongest(self, pairs: np.ndarray) -> _Best:
        """The strongest of some pairs, bool [P], for each row in them."""
        chosen = np.flatnonzero(pairs)
        chosen = chosen[np.argsort(self.correlation[chosen], kind="stable")]
        best: _Best = {}
        for pair in chosen.tolist():
            best[int(self.first[pair])] = best[int(self.second[pair])] = (
                float(self.correlation[pair]),
                bool(self.mirrored[pair]),
            )
        return best

    def items(self, rows: Iterable[int], best: _Best) -> tuple[IssueItem, ...]:
        """The rows as items, each with its strongest correlation."""
        return tuple(
            IssueItem(image.path, image.label, image.split, _note(best.get(row)))
            for row in rows
            for image in [self.images[row]]
        )

    def likeness(self, rows: Sequence[int], best: _Best) -> tuple[str, dict[str, float]]:
        """How alike some rows are, in words and as numbers."""
        if (self.digests[rows] == self.digests[rows[0]]).all():
            return "the same bytes", {"correlation": 1.0}
        values = sorted(best[row] for row in rows if row in best)
        if not values:  # alike through others only
            return "near-identical", {}
        ends = dict.fromkeys((_shown(values[0][0]), _shown(values[-1][0])))
        return f"correlation {' to '.join(ends)}{', mirrored' if any(mirrored for _, mirrored in values) else ''}", {
            "correlation": values[0][0]
        }


def _bridges(
    digests: np.ndarray,
    thumbnails: np.ndarray,
    twins: NearDuplicates,
    kept: np.ndarray,
    ends: tuple[np.ndarray, np.ndarray],
) -> NearDuplicates:
    """Pairs of kept rows that only an image which is left out linked: not every pair of a cluster is listed, so what stays is compared anew."""
    equal = _equal(digests, np.ones(len(kept), dtype=bool))
    whole = clusters(len(kept), np.concatenate([equal[0], twins.first]), np.concatenate([equal[1], twins.second]))
    linked = clusters(len(kept), *ends)
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(whole[rows], kind="stable")]
    apart = (whole[rows[1:]] == whole[rows[:-1]]) & (linked[rows[1:]] != linked[rows[:-1]])
    first, second = rows[:-1][apart], rows[1:][apart]
    straight, mirrored = (_correlation(thumbnails[first], thumbnails[second][:, :, ::step]) for step in (1, -1))
    return NearDuplicates(first, second, np.maximum(straight, mirrored).astype(np.float32), mirrored > straight)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation of each pair of thumbnails uint8 [P, 16, 16, 3], float [P]; 0 for flat ones."""
    left, right = (side.reshape(-1, 768).astype(np.float32) for side in (one, other))
    left, right = (side - side.mean(axis=1, keepdims=True) for side in (left, right))
    length = np.sqrt((left * left).sum(axis=1) * (right * right).sum(axis=1))
    return np.asarray((left * right).sum(axis=1) / np.maximum(length, 1e-6))


def _equal(digests: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs int64 [P] of rows of equal content, each later row with the first."""
    rows = np.flatnonzero(kept)
    whole = np.ascontiguousarray(digests[rows]).view(f"V{digests.shape[1]}").ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    heads = rows[first[inverse]]
    return heads[heads != rows], rows[heads != rows]


def _grouped(rows: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _note(pair: tuple[float, bool] | None) -> str:
    return "" if pair is None else f"{_shown(pair[0])}{' mirrored' if pair[1] else ''}"


def _shown(correlation: float) -> str:
    """Three digits, cut and not rounded: 0.9996 is not 1.000."""
    return f"{int(correlation * 1000 + 1e-6) / 1000:.3f}"


def find_duplicates(copies: Copies) -> Iterator[Issue]:
    """Equal files and near-identical pictures in one class and part, a finding for each cluster."""
    best = copies.strongest(~copies.differ(_place))
    for cluster in copies.clusters:
        for rows in _grouped(cluster, lambda row: _place(copies.images[row])):
            contents = _grouped(rows, lambda row: copies.digests[row].tobytes())
            for same in contents:
                if len(same) > 1:
                    yield Issue("exact_duplicates", "the same bytes", copies.items(same, {}), {"correlation": 1.0})
            if len(contents) > 1:
                words, numbers = copies.likeness(rows, best)
                yield Issue("near_duplicates", words, copies.items(rows, best), numbers)


def _place(image: ImageFile) -> tuple[str, str]:
    return image.label, image.split


def find_leaks(copies: Copies) -> Iterator[Issue]:
    """Clusters that reach from one given part into another."""
    best = copies.strongest(copies.differ(lambda image: image.split))
    for cluster in copies.clusters:
        parts = Counter(copies.images[row].split for row in cluster)
        parts.pop("", None)  # to be dealt, whole
        if len(parts) > 1:
            rows = [row for row in cluster if copies.images[row].split]
            words, numbers = copies.likeness(rows, best)
            counts = ", ".join(f"{parts[split]} in {split}" for split in sorted(parts))
            yield Issue("leak", f"{words}: {counts}", copies.items(rows, best), numbers | dict(parts))


def leaked_counts(leaks: Iterable[Issue], sizes: Counter[str]) -> dict[str, dict[str, float]]:
    """Held-out part -> how many of its images are also in the train part, of how many, and their share."""
    leaked: Counter[str] = Counter()
    for leak in leaks:
        if "train" in leak.numbers:
            leaked.update({split: int(leak.numbers.get(split, 0)) for split in ("test", "val")})
    return {
        split: {"leaked": count, "images": sizes[split], "share": count / sizes[split]}
        for split, count in leaked.items()
        if count
    }


def find_conflicts(copies: Copies) -> Iterator[Issue]:
    """The same picture under two labels: pairs that differ in their label, with all their equal files."""
    across = copies.differ(lambda image: image.label)
    best, pairs = copies.strongest(across), across.copy()
    for _ in range(2):  # from a copy to the first copy, and from there to all
        rows = np.zeros(len(copies.images), dtype=bool)
        rows[copies.first[pairs]] = rows[copies.second[pairs]] = True
        pairs |= copies.equal & (rows[copies.first] | rows[copies.second])
    for cluster in copies.components(pairs):
        words, numbers = copies.likeness(cluster, best)
        labels = Counter(copies.images[row].label for row in cluster)
        yield Issue("label_conflict", f"{words}: {', '.join(sorted(labels))}", copies.items(cluster, best), numbers)
