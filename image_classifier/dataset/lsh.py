"""Candidates for near-duplicates: locality-sensitive hashing by random hyperplanes, cheap enough for millions.

Charikar, "Similarity estimation techniques from rounding algorithms", 2002, section 3. Bit i of a thumbnail's signature
is the side of a random hyperplane that it is on. Two that correlate by c differ in a bit with the probability
arccos(c) / pi, whatever the images show: 6.4 % at 0.98. A table sorts the thumbnails by the next few bits and compares
those that have them in common by 256 bits of their signatures. There are so many tables that a pair at the threshold
shares the bits of one with a probability of 99 %. The bits of a table are chosen by counting what they would cost on
these thumbnails.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from image_classifier.progress import with_bar

RECALL = 0.99  # of pairs exactly at the threshold
WINDOW = 32  # neighbours, by the next bits, that a thumbnail is compared with if more share the bits of a table
MAX_BITS = 1024  # of a signature
_NEAR = 4  # words of a signature that two are compared by
_SORT = 8  # pairs that can be compared in the time it takes to sort one thumbnail in
_BLOCK = 2048  # thumbnails in float32 at a time: 6 MB


@dataclass(frozen=True)
class HashPlan:
    """Number of tables, and bits of each."""

    bits: int
    tables: int


def propose(
    thumbnails: np.ndarray, rows: np.ndarray, threshold: float, mirrored: bool, progress: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of `rows` that may correlate by `threshold`, first < second, int64 [P] twice; some come repeatedly.

    Thumbnails are uint8 [N, 16, 16, 3].
    """
    if len(rows) < 2:
        return
    plan = best_plan(_signatures(thumbnails, rows, 1, mirrored)[0], threshold)
    words = _signatures(thumbnails, rows, max(_NEAR, plan.bits * plan.tables // 64 + 2), mirrored)
    differ = math.acos(threshold) / math.pi
    limit = 64 * _NEAR * differ + 3.5 * math.sqrt(64 * _NEAR * differ * (1 - differ))
    tables: Iterable[int] = range(plan.tables)
    if progress:
        tables = with_bar(tables, "looking for near-duplicates", plan.tables)
    for table in tables:
        for one, other in _table(words, table * plan.bits, plan.bits, int(limit)):
            first, second = rows[one % len(rows)], rows[other % len(rows)]
            apart = first != second  # an image and its own mirror image
            yield np.minimum(first, second)[apart], np.maximum(first, second)[apart]


def best_plan(words: np.ndarray, threshold: float) -> HashPlan:
    """Return the cheapest plan with the recall, by how many of these words, uint64 [E], would be compared.

    A plan that crowds more of them into windows than the longest tables do would miss more pairs, and is not chosen.
    """
    words = np.sort(words)
    differing = words[1:] ^ words[:-1]
    agree = 1 - math.acos(threshold) / math.pi
    plans = []
    for bits in range(6, 41):
        tables = math.ceil(math.log1p(-RECALL) / math.log1p(-(agree**bits)))
        if bits * tables <= MAX_BITS:
            ends = np.flatnonzero(np.r_[differing >> np.uint64(64 - bits) != 0, True])
            sizes = np.diff(np.r_[-1, ends])
            near = np.minimum(sizes - 1, WINDOW)
            compared = int((near * sizes - near * (near + 1) // 2).sum())
            crowded = int(sizes[sizes > WINDOW].sum())
            plans.append((crowded, tables * (_SORT * len(words) + compared), HashPlan(bits, tables)))
    fewest = min(crowded for crowded, _, _ in plans)
    return min((cost, plan.bits, plan) for crowded, cost, plan in plans if crowded <= fewest + len(words) // 1000)[2]


def hyperplanes(count: int) -> np.ndarray:
    """Return random directions as whole numbers that add up to 0, float32 [768, count].

    So brightness does not matter, and sums with uint8 values are exact.
    """
    planes = np.rint(np.random.default_rng(20_260).normal(0, 32, (count, 768)))
    excess = planes.sum(1).astype(np.int64)
    planes -= (excess // 768)[:, None]
    planes -= np.arange(768) < (excess % 768)[:, None]
    return planes.T.astype(np.float32)


def _signatures(thumbnails: np.ndarray, rows: np.ndarray, words: int, mirrored: bool) -> np.ndarray:
    """Signatures of the rows, and then of their mirror images, uint64 [words, E].

    The halves' sum is the same in an image and its mirror image, their difference changes its sign: each is projected
    once, which is half the work for both.
    """
    even, odd = (part.reshape(384, -1) for part in _halves(hyperplanes(64 * words).reshape(16, 16, 3, -1), axis=1))
    result = np.empty((words, (1 + mirrored) * len(rows)), np.uint64)
    for start in range(0, len(rows), _BLOCK):
        values = thumbnails[rows[start : start + _BLOCK]].astype(np.float32)
        common, other = (
            part.reshape(-1, 384) @ planes for part, planes in zip(_halves(values, axis=2), (even, odd), strict=True)
        )
        for side, projections in enumerate((common + other, common - other)[: 1 + mirrored]):
            at = side * len(rows) + start
            result[:, at : at + len(projections)] = np.packbits(projections > 0, axis=1).view(">u8").T
    return result


def _halves(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the difference of the left half and the mirrored right half."""
    left, right = np.split(values, 2, axis)
    right = np.flip(right, axis)
    return left + right, left - right


def _table(words: np.ndarray, start: int, bits: int, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs that share `bits` bits from bit `start` on and differ in at most `limit` of the first 256."""
    word, shift = divmod(start, 64)
    keys = words[word] << np.uint64(shift)
    if shift:
        keys |= words[word + 1] >> np.uint64(64 - shift)
    order = np.argsort(keys, kind="stable")
    keys = keys[order] >> np.uint64(64 - bits)
    near = words[:_NEAR, order]
    at = np.arange(len(keys))
    for step in range(1, WINDOW + 1):
        at = at[: np.searchsorted(at, len(keys) - step)]
        at = at[keys[at] == keys[at + step]]
        if not len(at):
            break
        apart = np.zeros(len(at), np.uint16)
        for column in near:
            apart += np.bitwise_count(column[at] ^ column[at + step])
        close = at[apart <= limit]
        yield order[close], order[close + step]
