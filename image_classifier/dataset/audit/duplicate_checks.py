"""Issues from identical and near-identical images: duplicates, leaks between splits, conflicting labels."""

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

_Best = dict[int, tuple[float, bool]]  # row -> correlation of its strongest pair, and whether that pair is mirrored


@dataclass(frozen=True, eq=False)
class DuplicatePairs:
    """The pairs of duplicates among a tree's images; rows are positions in `images`.

    Args:
        images: All images of the tree, N.
        digests: sha256 of each file, uint8 [N, 32].
        first: First row of each pair, int64 [P].
        second: Second row of each pair, int64 [P].
        correlation: Correlation of the thumbnails, float32 [P]; 1 for equal files.
        mirrored: Whether the second must be mirrored for it, bool [P].
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
    def of(
        cls, images: Sequence[ImageFile], metadata: FileMetadata, near_duplicates: NearDuplicates, kept: np.ndarray
    ) -> DuplicatePairs:
        """Return the pairs of which both images are among the `kept` rows, bool [N]."""
        digests = np.asarray(metadata.digests)
        near = kept[near_duplicates.first] & kept[near_duplicates.second]
        first, second = _equal(digests, kept)
        count = len(first)
        ends = (
            np.concatenate([first, near_duplicates.first[near]]),
            np.concatenate([second, near_duplicates.second[near]]),
        )
        correlation = np.concatenate([np.ones(count, np.float32), near_duplicates.correlation[near]])
        mirrored = np.concatenate([np.zeros(count, bool), near_duplicates.mirrored[near]])
        if not near.all():
            added = _bridges(digests, metadata.thumbnails, near_duplicates, kept, ends)
            ends = np.concatenate([ends[0], added.first]), np.concatenate([ends[1], added.second])
            correlation = np.concatenate([correlation, added.correlation])
            mirrored = np.concatenate([mirrored, added.mirrored])
        return cls(images, digests, *ends, correlation, mirrored, np.arange(len(correlation)) < count)

    @cached_property
    def clusters(self) -> list[list[int]]:
        """The rows of each connected cluster, sorted."""
        return self.components(np.ones(len(self.first), dtype=bool))

    def components(self, pairs: np.ndarray) -> list[list[int]]:
        """Return the rows of each cluster that some of the pairs, bool [P], connect."""
        first, second = self.first[pairs], self.second[pairs]
        names = clusters(len(self.images), first, second)
        touched = np.unique(np.concatenate([first, second]))
        return _grouped(touched.tolist(), lambda row: int(names[row]))

    def differ(self, key: Callable[[ImageFile], Hashable]) -> np.ndarray:
        """Return which pairs differ in a key, bool [P]."""
        rows = np.unique(np.concatenate([self.first, self.second]))
        codes = np.zeros(len(self.images), dtype=np.int64)
        seen: dict[Hashable, int] = {}
        codes[rows] = [seen.setdefault(key(self.images[row]), len(seen)) for row in rows.tolist()]
        return np.asarray(codes[self.first] != codes[self.second])

    def strongest(self, pairs: np.ndarray) -> _Best:
        """Return the strongest of some pairs, bool [P], for each row in them."""
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
        """Return the rows as items, each with its strongest correlation."""
        return tuple(
            IssueItem(image.path, image.label, image.split, _note(best.get(row)))
            for row in rows
            for image in [self.images[row]]
        )

    def likeness(self, rows: Sequence[int], best: _Best) -> tuple[str, dict[str, float]]:
        """Return how similar some rows are, in words and as numbers."""
        if (self.digests[rows] == self.digests[rows[0]]).all():
            return "the same bytes", {"correlation": 1.0}
        values = sorted(best[row] for row in rows if row in best)
        if not values:  # similar only through other images
            return "near-identical", {}
        ends = dict.fromkeys((_shown(values[0][0]), _shown(values[-1][0])))
        return f"correlation {' to '.join(ends)}{', mirrored' if any(mirrored for _, mirrored in values) else ''}", {
            "correlation": values[0][0]
        }


def _bridges(
    digests: np.ndarray,
    thumbnails: np.ndarray,
    near_duplicates: NearDuplicates,
    kept: np.ndarray,
    ends: tuple[np.ndarray, np.ndarray],
) -> NearDuplicates:
    """Return pairs of kept rows that were linked only through an excluded image.

    Not every pair of a cluster is listed, so the remaining images are compared again.
    """
    equal = _equal(digests, np.ones(len(kept), dtype=bool))
    # Clusters of all images, and those that the pairs of kept rows connect.
    all_clusters = clusters(
        len(kept),
        np.concatenate([equal[0], near_duplicates.first]),
        np.concatenate([equal[1], near_duplicates.second]),
    )
    linked = clusters(len(kept), *ends)
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(all_clusters[rows], kind="stable")]
    # Neighbours within a cluster that are not connected any more.
    apart = (all_clusters[rows[1:]] == all_clusters[rows[:-1]]) & (linked[rows[1:]] != linked[rows[:-1]])
    first, second = rows[:-1][apart], rows[1:][apart]
    straight, mirrored = (_correlation(thumbnails[first], thumbnails[second][:, :, ::step]) for step in (1, -1))
    return NearDuplicates(first, second, np.maximum(straight, mirrored).astype(np.float32), mirrored > straight)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the correlation of each pair of thumbnails uint8 [P, 16, 16, 3], float32 [P]; 0 for flat ones."""
    left, right = (side.reshape(-1, 768).astype(np.float32) for side in (one, other))
    left, right = (side - side.mean(axis=1, keepdims=True) for side in (left, right))
    length = np.sqrt((left * left).sum(axis=1) * (right * right).sum(axis=1))
    return np.asarray((left * right).sum(axis=1) / np.maximum(length, 1e-6))


def _equal(digests: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of rows with equal content, two int64 [P]: the first row, and each later row."""
    rows = np.flatnonzero(kept)
    contents = np.ascontiguousarray(digests[rows]).view(f"V{digests.shape[1]}").ravel()
    _, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
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
    """Return three digits, not rounded up: 0.9996 is not shown as 1.000."""
    return f"{int(correlation * 1000 + 1e-6) / 1000:.3f}"


def find_duplicates(pairs: DuplicatePairs) -> Iterator[Issue]:
    """Yield identical files and near-identical images in one class and split, one issue for each cluster."""
    best = pairs.strongest(~pairs.differ(_class_and_split))
    for cluster in pairs.clusters:
        for rows in _grouped(cluster, lambda row: _class_and_split(pairs.images[row])):
            contents = _grouped(rows, lambda row: pairs.digests[row].tobytes())
            for same in contents:
                if len(same) > 1:
                    yield Issue("exact_duplicates", "the same bytes", pairs.items(same, {}), {"correlation": 1.0})
            if len(contents) > 1:
                words, numbers = pairs.likeness(rows, best)
                yield Issue("near_duplicates", words, pairs.items(rows, best), numbers)


def _class_and_split(image: ImageFile) -> tuple[str, str]:
    return image.label, image.split


def find_leaks(pairs: DuplicatePairs) -> Iterator[Issue]:
    """Yield clusters with images in more than one given split."""
    best = pairs.strongest(pairs.differ(lambda image: image.split))
    for cluster in pairs.clusters:
        splits = Counter(pairs.images[row].split for row in cluster)
        splits.pop("", None)  # not split yet: kept in one split later
        if len(splits) > 1:
            rows = [row for row in cluster if pairs.images[row].split]
            words, numbers = pairs.likeness(rows, best)
            counts = ", ".join(f"{splits[split]} in {split}" for split in sorted(splits))
            yield Issue("leak", f"{words}: {counts}", pairs.items(rows, best), numbers | dict(splits))


def leaked_counts(leaks: Iterable[Issue], sizes: Counter[str]) -> dict[str, dict[str, float]]:
    """Return for each held-out split how many of its images are also in train, of how many, and their share."""
    leaked: Counter[str] = Counter()
    for leak in leaks:
        if "train" in leak.numbers:
            leaked.update({split: int(leak.numbers.get(split, 0)) for split in ("test", "val")})
    return {
        split: {"leaked": count, "images": sizes[split], "share": count / sizes[split]}
        for split, count in leaked.items()
        if count
    }


def find_conflicts(pairs: DuplicatePairs) -> Iterator[Issue]:
    """Yield images with two labels: pairs that differ in their label, with all files equal to them."""
    across = pairs.differ(lambda image: image.label)
    best = pairs.strongest(across)
    chosen = across.copy()
    # Twice: from a copy to the first copy, and from there to all copies.
    for _ in range(2):
        rows = np.zeros(len(pairs.images), dtype=bool)
        rows[pairs.first[chosen]] = True
        rows[pairs.second[chosen]] = True
        chosen |= pairs.equal & (rows[pairs.first] | rows[pairs.second])
    for cluster in pairs.components(chosen):
        words, numbers = pairs.likeness(cluster, best)
        labels = Counter(pairs.images[row].label for row in cluster)
        yield Issue("label_conflict", f"{words}: {', '.join(sorted(labels))}", pairs.items(cluster, best), numbers)
