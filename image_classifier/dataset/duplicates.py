"""Near-duplicates: a hash of the thumbnails proposes pairs (lsh.py), pixels decide.

Two images are near-duplicates if two correlations are high enough. The first is of their 16 x 16 RGB thumbnails, all
768 values less their mean: it must reach the threshold. The second is of their detail, each channel less the plane that
fits it best: it may fall short of 1 five times as far. The second keeps different birds on the same blue sky apart.
Thumbnails whose detail is below 2 grey levels (standard deviation) show nothing to compare: they are in no pair, and
exact copies of such files are known by their content hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from image_classifier.dataset.lsh import propose
from image_classifier.errors import ConfigError

SIDE = 16  # pixels of a thumbnail's side
MIN_DETAIL = 2.0  # grey levels: less may be noise of the encoding
TRIES = 256  # compared pairs of an image, after which it is compared only with images that had fewer
ENOUGH = 32  # near-duplicates of an image, after which pairs within its cluster are skipped
_SLACK = 5.0  # how much further from 1 the correlation of detail may be
_LOWEST = 0.8  # of a threshold: below, the detail would not matter
_BLOCK = 1024  # pairs or thumbnails in float32 at a time: 3 MB
_ROUND = 1 << 16  # minimum number of pairs that are compared at a time


@dataclass(frozen=True)
class DuplicateSettings:
    """How alike near-duplicates are; `threshold` null or 1 means files of equal content only.

    Raises:
        ConfigError: A threshold outside 0.8 to 1.
    """

    threshold: float | None = 0.98
    mirrored: bool = True

    def __post_init__(self) -> None:
        if self.threshold is not None and not _LOWEST <= self.threshold <= 1:
            fact = f"data.duplicates.threshold must lie between {_LOWEST} and 1, not {self.threshold}"
            raise ConfigError(
                fact, "0.98 finds frames of one shot, 0.995 little more than re-encoded copies, 1 only equal files"
            )


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of images that show the same, first < second, sorted.

    `mirrored` is True for pairs of which only the mirror image of one is like the other.
    """

    first: np.ndarray  # int64 [P]
    second: np.ndarray  # int64 [P]
    correlation: np.ndarray  # float32 [P]
    mirrored: np.ndarray  # bool [P]

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def of(cls, parts: list[Self]) -> Self:
        """Return all pairs of several lists, sorted."""
        columns = [
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("first", "second", "correlation", "mirrored")
        ]
        order = np.lexsort((columns[1], columns[0]))
        return cls(*(column[order] for column in columns))

    @classmethod
    def none(cls) -> Self:
        """Return no pairs."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, bool))


def find_near_duplicates(thumbnails: np.ndarray, settings: DuplicateSettings, progress: bool = False) -> NearDuplicates:
    """Return the near-duplicate pairs of thumbnails uint8 [N, 16, 16, 3]; the same on any machine.

    No false pair is listed. Of the true ones, a pair exactly at the threshold is found with a probability of 99 %,
    closer pairs more surely (lsh.py). Two cuts keep crowds from making quadratic lists; `clusters` of all pairs stay
    complete all the same:

    - k equal thumbnails give k - 1 pairs, each with the first of them, which alone is compared with others;
    - once two images of one cluster have 32 near-duplicates each, their own pair is left out.

    So leave images out of the clusters, not of the pairs: the pairs of an image may be all that connects others. Where
    thousands differ in detail only, as plain skies do, pairs are missed: 9 % among 5 000 generated ones, three quarters
    among 100 000.
    """
    if settings.threshold is None or settings.threshold >= 1:
        return NearDuplicates.none()
    pixels = _Pixels(thumbnails, settings.threshold, settings.mirrored)
    # Equal thumbnails are pairs by themselves; one of each set takes part in the search.
    rows, copies = _distinct(thumbnails, np.flatnonzero(pixels.detail >= MIN_DETAIL))
    search = _Search(pixels)
    for first, second in propose(thumbnails, rows, settings.threshold, settings.mirrored, progress):
        search.add(first, second)
    search.compare()
    return NearDuplicates.of([copies, *search.found])


def clusters(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cluster that the pairs connect each of `count` images to, int64 [count]: its smallest member.

    >>> clusters(5, np.array([0, 3]), np.array([3, 4])).tolist()
    [0, 1, 2, 0, 0]
    """
    names = np.arange(count, dtype=np.int64)
    while True:
        one, other = names[first], names[second]
        apart = one != other
        if not apart.any():
            return names
        # Hang the larger root of each pair under the smaller one, then follow the chains to their ends.
        np.minimum.at(names, np.maximum(one, other)[apart], np.minimum(one, other)[apart])
        while (names[names] != names).any():
            names = names[names]


class _Search:
    """The near-duplicates so far, and the pairs that need no second look."""

    def __init__(self, pixels: _Pixels) -> None:
        self.pixels = pixels
        self.count = len(pixels.norm)
        self.found = [NearDuplicates.none()]
        self.degree = np.zeros(self.count, np.int64)  # near-duplicates of each image
        self.tries = np.zeros(self.count, np.int64)  # compared pairs of each image
        self.cluster = np.arange(self.count)
        self.seen = np.empty(0, np.int64)  # compared pairs, as first * count + second, sorted
        self.waiting: list[np.ndarray] = []
        self.pending = 0

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """Keep proposed pairs, except those that only add to a crowd, and compare them once they are many."""
        # Both images already have many near-duplicates, and are connected.
        crowded = (np.minimum(self.degree[first], self.degree[second]) >= ENOUGH) & (
            self.cluster[first] == self.cluster[second]
        )
        # Both images were compared often enough.
        crowded |= np.minimum(self.tries[first], self.tries[second]) >= TRIES
        codes = (first * self.count + second)[~crowded]
        self.waiting.append(codes)
        self.pending += len(codes)
        if self.pending >= max(_ROUND, self.count):
            self.compare()

    def compare(self) -> None:
        """Compare the pixels of the waiting pairs that are new."""
        if not self.pending:
            return
        codes = np.unique(np.concatenate(self.waiting))
        self.waiting = []
        self.pending = 0
        # Drop pairs that were compared before; both arrays are sorted.
        if len(self.seen):
            codes = codes[self.seen[np.searchsorted(self.seen[:-1], codes)] != codes]
        self.seen = np.sort(np.concatenate([self.seen, codes]), kind="stable")  # merges two sorted runs
        first, second = np.divmod(codes, self.count)
        new = NearDuplicates.of([NearDuplicates.none(), *self.pixels.near_duplicates(first, second)])
        self.found.append(new)
        # Bring counts and clusters up to date, for the next call of `add`.
        self.tries += np.bincount(np.concatenate([first, second]), minlength=self.count)
        self.degree += np.bincount(np.concatenate([new.first, new.second]), minlength=self.count)
        self.cluster = clusters(self.count, self.cluster[new.first], self.cluster[new.second])[self.cluster]


def _basis() -> np.ndarray:
    """Return the planes of the three channels as whole numbers, float32 [768, 9].

    Columns: the levels of R, G, B, then their slopes along a row, then those along a column.
    """
    ramp = np.arange(1 - SIDE, SIDE, 2)
    shapes = (np.ones((SIDE, SIDE)), np.broadcast_to(ramp, (SIDE, SIDE)), np.broadcast_to(ramp[:, None], (SIDE, SIDE)))
    return (
        np.stack([np.kron(shape[..., None], np.eye(3)[channel]) for shape in shapes for channel in range(3)], axis=-1)
        .reshape(-1, 9)
        .astype(np.float32)
    )


class _Pixels:
    """Correlations of thumbnails and of their detail.

    Sums of products of values less 128 stay below 2**24: float32 holds them exactly, in whatever order they are added.
    """

    def __init__(self, thumbnails: np.ndarray, threshold: float, mirrored: bool) -> None:
        self.thumbnails = thumbnails
        self.mirrored = mirrored
        self.threshold = threshold
        self.detail_threshold = 1 - _SLACK * (1 - threshold)
        basis = _basis()
        self.planes = np.empty((len(thumbnails), 9))  # [N, 9], coefficients in an orthonormal basis
        energy = np.empty(len(thumbnails))
        for start in range(0, len(thumbnails), _BLOCK):
            block = slice(start, start + _BLOCK)
            values = self._values(block)
            self.planes[block] = values @ basis
            energy[block] = np.vecdot(values, values)
        self.planes /= np.linalg.norm(basis, axis=0)
        # Norms of the thumbnails without their mean, and without their planes.
        self.levels = self.planes[:, :3].sum(1) / np.sqrt(3)
        self.norm = np.sqrt(np.maximum(energy - self.levels**2, 0))
        self.detail_norm = np.sqrt(np.maximum(energy - (self.planes**2).sum(1), 0))
        self.detail = self.detail_norm / np.sqrt(basis.shape[0])

    def _values(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return the values of some thumbnails less 128, float32 [n, 768]."""
        values = self.thumbnails[rows].reshape(-1, SIDE * SIDE * 3).astype(np.float32)
        values -= 128
        return values

    def near_duplicates(self, first: np.ndarray, second: np.ndarray) -> Iterator[NearDuplicates]:
        """Yield those of the pairs that are near-duplicates, in blocks."""
        for start in range(0, len(first), _BLOCK):
            yield self._decide(first[start : start + _BLOCK], second[start : start + _BLOCK])

    def _decide(self, first: np.ndarray, second: np.ndarray) -> NearDuplicates:
        a = self._values(first)  # [n, 768]
        b = self._values(second)
        plane = self.planes[second]  # [n, 9]
        correlation, alike = self._compare(first, second, np.vecdot(a, b), plane)
        mirrored = np.zeros(len(first), bool)
        if self.mirrored:
            # Mirroring an image reverses its rows, and so the sign of its slopes along them.
            flipped = b.reshape(-1, SIDE, SIDE, 3)[:, :, ::-1].reshape(a.shape)
            plane[:, 3:6] *= -1
            other, other_alike = self._compare(first, second, np.vecdot(a, flipped), plane)
            mirrored = other_alike & ~alike
            correlation = np.where(mirrored, other, correlation)
        keep = alike | mirrored
        return NearDuplicates(first[keep], second[keep], correlation[keep].astype(np.float32), mirrored[keep])

    def _compare(
        self, first: np.ndarray, second: np.ndarray, dot: np.ndarray, plane: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the correlations of n pairs, float64 [n], and which are near-duplicates, bool [n].

        `dot` [n] has the products of their values, `plane` [n, 9] the planes of `second`, mirrored or not.
        """
        dot = dot.astype(np.float64)
        full = (dot - self.levels[first] * self.levels[second]) / (self.norm[first] * self.norm[second])
        detail = (dot - np.vecdot(self.planes[first], plane)) / (self.detail_norm[first] * self.detail_norm[second])
        return full, (full >= self.threshold) & (detail >= self.detail_threshold)


def _distinct(thumbnails: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, NearDuplicates]:
    """Return the first of each set of equal thumbnails among `rows`, int64, and pairs of the others with it."""
    # A hash of each thumbnail: a sum of its 64-bit words times random odd numbers.
    random = np.random.default_rng(0)
    numbers = random.integers(0, 2**63, SIDE * SIDE * 3 // 8, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    hashes = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), _BLOCK):
        words = thumbnails[rows[start : start + _BLOCK]].reshape(-1, SIDE * SIDE * 3).view(np.uint64)
        hashes[start : start + _BLOCK] = ((words ^ (words >> np.uint64(32))) * numbers).sum(1, dtype=np.uint64)
    # The first row of each run of equal hashes leads the run.
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) != 0]) if len(rows) else np.empty(0, np.int64)
    leader = np.empty(len(rows), np.int64)
    leader[order] = np.repeat(rows[order[starts]], np.diff(np.r_[starts, len(rows)]))
    # Compare with the leader: two of 10**19 hashes are equal by chance.
    copy = np.flatnonzero(leader != rows)
    equal = np.empty(len(copy), bool)
    for start in range(0, len(copy), _BLOCK):
        block = copy[start : start + _BLOCK]
        equal[start : start + _BLOCK] = (thumbnails[rows[block]] == thumbnails[leader[block]]).all((1, 2, 3))
    copy = copy[equal]
    keep = np.ones(len(rows), bool)
    keep[copy] = False
    count = len(copy)
    return rows[keep], NearDuplicates(leader[copy], rows[copy], np.ones(count, np.float32), np.zeros(count, bool))
