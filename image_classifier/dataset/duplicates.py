"""Near-duplicates: a hash of the thumbnails proposes pairs (signatures.py), pixels decide.

Two images are twins when the correlation of their 16 x 16 RGB thumbnails, all 768 values less their own mean, reaches the threshold, and
that of their detail, each channel less the plane that fits it best, falls short of 1 by at most five times as much. The second keeps
different birds on the same blue sky apart. Thumbnails whose detail is below 2 grey levels (standard deviation) show nothing to compare:
they are nobody's twins, and exact copies of such files are known by their content hash.
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
TRIES = 256  # pairs of an image that pixels decided, after which it is compared only with images that had fewer
ENOUGH = 32  # twins after which an image's further twins in its own cluster are not looked for
_SLACK = 5.0  # how much further from 1 the correlation of detail may be
_LOWEST = 0.8  # below, the detail would have no say
_BLOCK = 1024  # pairs or thumbnails in float32 at a time: 3 MB
_ROUND = 1 << 16  # pairs, at least, that are decided at a time


@dataclass(frozen=True)
class DuplicateSettings:
    """How alike two images must be to count as one; `threshold` null or 1: only files of equal content.

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
    """Pairs of images that show the same: first < second, sorted; `mirrored` where only the mirror image of one is like the other."""

    first: np.ndarray  # int64 [P]
    second: np.ndarray  # int64 [P]
    correlation: np.ndarray  # float32 [P]
    mirrored: np.ndarray  # bool [P]

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def of(cls, parts: list[Self]) -> Self:
        """All pairs of several lists, sorted."""
        columns = [
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("first", "second", "correlation", "mirrored")
        ]
        order = np.lexsort((columns[1], columns[0]))
        return cls(*(column[order] for column in columns))

    @classmethod
    def none(cls) -> Self:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, bool))


def find_near_duplicates(thumbnails: np.ndarray, settings: DuplicateSettings, progress: bool = False) -> NearDuplicates:
    """The pairs of twins among thumbnails uint8 [N, 16, 16, 3]; the same answer on any machine.

    No pair is listed that is none. Of the true ones, a pair exactly at the threshold is found with a probability of 99 %, closer pairs
    more surely (signatures.py). Two cuts keep crowds from making quadratic lists; `clusters` of all pairs stay whole all the same:
    k equal thumbnails give k - 1 pairs, each with the first of them, which alone is compared with others; and once two images of one
    cluster have 32 twins each, their own pair is left out. Leave images out of the clusters, not of the pairs: the pairs of an image
    may be all that connects others. Where thousands differ in detail only, as plain skies do, work is cut and pairs are missed: 9 %
    among 5 000 generated ones, three quarters among 100 000.
    """
    if settings.threshold is None or settings.threshold >= 1:
        return NearDuplicates.none()
    pixels = _Pixels(thumbnails, settings.threshold, settings.mirrored)
    rows, copies = _distinct(thumbnails, np.flatnonzero(pixels.detail >= MIN_DETAIL))
    found = _Found(pixels)
    for first, second in propose(thumbnails, rows, settings.threshold, settings.mirrored, progress):
        found.weigh(first, second)
    found.decide()
    return NearDuplicates.of([copies, *found.parts])


def clusters(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The cluster of each of `count` images, int64 [count], that the pairs connect it to, named by the cluster's smallest member."""
    names = np.arange(count, dtype=np.int64)
    while True:
        one, other = names[first], names[second]
        apart = one != other
        if not apart.any():
            return names
        np.minimum.at(names, np.maximum(one, other)[apart], np.minimum(one, other)[apart])
        while (names[names] != names).any():
            names = names[names]


class _Found:
    """Twins so far, and which pairs need no second look."""

    def __init__(self, pixels: _Pixels) -> None:
        self.pixels, self.count = pixels, len(pixels.norm)
        self.parts = [NearDuplicates.none()]
        self.twins = np.zeros(self.count, np.int64)  # of each image
        self.tries = np.zeros(self.count, np.int64)
        self.cluster = np.arange(self.count)
        self.seen = np.empty(0, np.int64)  # pairs decided, as first * count + second, sorted
        self.waiting: list[np.ndarray] = []
        self.pending = 0

    def weigh(self, first: np.ndarray, second: np.ndarray) -> None:
        """Take in proposed pairs but those that only add to a crowd, and decide once they are many."""
        crowded = (np.minimum(self.twins[first], self.twins[second]) >= ENOUGH) & (
            self.cluster[first] == self.cluster[second]
        )
        crowded |= np.minimum(self.tries[first], self.tries[second]) >= TRIES
        codes = (first * self.count + second)[~crowded]
        self.waiting.append(codes)
        self.pending += len(codes)
        if self.pending >= max(_ROUND, self.count):
            self.decide()

    def decide(self) -> None:
        """Let the pixels decide on those of the waiting pairs that are new."""
        if not self.pending:
            return
        codes = np.unique(np.concatenate(self.waiting))
        self.waiting, self.pending = [], 0
        if len(self.seen):
            codes = codes[self.seen[np.searchsorted(self.seen[:-1], codes)] != codes]
        self.seen = np.sort(np.concatenate([self.seen, codes]), kind="stable")  # merges two sorted runs
        first, second = np.divmod(codes, self.count)
        new = NearDuplicates.of([NearDuplicates.none(), *self.pixels.twins(first, second)])
        self.parts.append(new)
        self.tries += np.bincount(np.concatenate([first, second]), minlength=self.count)
        self.twins += np.bincount(np.concatenate([new.first, new.second]), minlength=self.count)
        self.cluster = clusters(self.count, self.cluster[new.first], self.cluster[new.second])[self.cluster]


def _basis() -> np.ndarray:
    """The planes of the three channels as whole numbers, float32 [768, 9]: level of R, G, B, then slopes along the row, then along the column."""
    ramp = np.arange(1 - SIDE, SIDE, 2)
    shapes = (np.ones((SIDE, SIDE)), np.broadcast_to(ramp, (SIDE, SIDE)), np.broadcast_to(ramp[:, None], (SIDE, SIDE)))
    return (
        np.stack([np.kron(shape[..., None], np.eye(3)[channel]) for shape in shapes for channel in range(3)], axis=-1)
        .reshape(-1, 9)
        .astype(np.float32)
    )


class _Pixels:
    """What decides: correlations of thumbnails and of their detail.

    Sums of products of the values less 128 stay below 2**24, so float32 holds them exactly, in whatever order they are added.
    """

    def __init__(self, thumbnails: np.ndarray, threshold: float, mirrored: bool) -> None:
        self.thumbnails, self.mirrored = thumbnails, mirrored
        self.threshold, self.floor = threshold, 1 - _SLACK * (1 - threshold)
        basis = _basis()
        self.planes = np.empty((len(thumbnails), 9))  # coefficients in an orthonormal basis
        energy = np.empty(len(thumbnails))
        for start in range(0, len(thumbnails), _BLOCK):
            block = slice(start, start + _BLOCK)
            values = self._values(block)
            self.planes[block] = values @ basis
            energy[block] = np.vecdot(values, values)
        self.planes /= np.linalg.norm(basis, axis=0)
        self.levels = self.planes[:, :3].sum(1) / np.sqrt(3)
        self.norm = np.sqrt(np.maximum(energy - self.levels**2, 0))
        self.detail_norm = np.sqrt(np.maximum(energy - (self.planes**2).sum(1), 0))
        self.detail = self.detail_norm / np.sqrt(basis.shape[0])

    def _values(self, rows: slice | np.ndarray) -> np.ndarray:
        values = self.thumbnails[rows].reshape(-1, SIDE * SIDE * 3).astype(np.float32)
        values -= 128
        return values

    def twins(self, first: np.ndarray, second: np.ndarray) -> Iterator[NearDuplicates]:
        """Those of the pairs that are twins, in blocks."""
        for start in range(0, len(first), _BLOCK):
            yield self._decide(first[start : start + _BLOCK], second[start : start + _BLOCK])

    def _decide(self, first: np.ndarray, second: np.ndarray) -> NearDuplicates:
        a, b = self._values(first), self._values(second)
        plane = self.planes[second]
        correlation, is_twin = self._compare(first, second, np.vecdot(a, b), plane)
        mirrored = np.zeros(len(first), bool)
        if self.mirrored:
            flipped = b.reshape(-1, SIDE, SIDE, 3)[:, :, ::-1].reshape(a.shape)
            plane[:, 3:6] *= -1
            other, is_other = self._compare(first, second, np.vecdot(a, flipped), plane)
            mirrored = is_other & ~is_twin
            correlation = np.where(mirrored, other, correlation)
        keep = is_twin | mirrored
        return NearDuplicates(first[keep], second[keep], correlation[keep].astype(np.float32), mirrored[keep])

    def _compare(
        self, first: np.ndarray, second: np.ndarray, dot: np.ndarray, plane: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Correlations of the pairs, and whether they are twins; `plane` is that of `second`, as it is turned."""
        dot = dot.astype(np.float64)
        whole = (dot - self.levels[first] * self.levels[second]) / (self.norm[first] * self.norm[second])
        detail = (dot - np.vecdot(self.planes[first], plane)) / (self.detail_norm[first] * self.detail_norm[second])
        return whole, (whole >= self.threshold) & (detail >= self.floor)


def _distinct(thumbnails: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, NearDuplicates]:
    """The first of each set of equal thumbnails among `rows`, and the others as its twins."""
    numbers = np.random.default_rng(0).integers(0, 2**63, SIDE * SIDE * 3 // 8, dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)
    hashes = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), _BLOCK):
        words = thumbnails[rows[start : start + _BLOCK]].reshape(-1, SIDE * SIDE * 3).view(np.uint64)
        hashes[start : start + _BLOCK] = ((words ^ (words >> np.uint64(32))) * numbers).sum(1, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) != 0]) if len(rows) else np.empty(0, np.int64)
    leader = np.empty(len(rows), np.int64)
    leader[order] = np.repeat(rows[order[starts]], np.diff(np.r_[starts, len(rows)]))
    copy = np.flatnonzero(leader != rows)
    equal = np.empty(len(copy), bool)
    for start in range(0, len(copy), _BLOCK):
        block = copy[start : start + _BLOCK]
        equal[start : start + _BLOCK] = (thumbnails[rows[block]] == thumbnails[leader[block]]).all((1, 2, 3))
    copy = copy[equal]  # two hashes in 10**19 are equal by chance
    keep = np.ones(len(rows), bool)
    keep[copy] = False
    count = len(copy)
    return rows[keep], NearDuplicates(leader[copy], rows[copy], np.ones(count, np.float32), np.zeros(count, bool))
