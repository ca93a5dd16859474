"""A stratified group split: groups of images assigned to splits, class by class.

Only content and seed decide the order. This module knows numbers only, no files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from image_classifier.dataset.duplicates import clusters
from image_classifier.manifest import SPLITS

UNASSIGNED, TRAIN, VAL, TEST = -1, *range(len(SPLITS))


class StratifiedGroupSplitter:
    """Images in groups that must not be torn, and the split of each group.

    A *cell* is the images of one class in one group. *Linked classes* share groups, directly or through other classes.
    Of linked classes only the sum can be held to a ratio; a class that shares no group is held to its own count.

    Attributes:
        names: Name of each group, uint64 [K], sorted.
        group_of: Group of each image, int64 [N].
        sizes: Images in each group, int64 [K].
        splits: Split of each group, int8 [K]; UNASSIGNED at first.
        cell_groups, cell_labels, cell_counts: Group, class and images of each cell, int64 [M], ordered by group.
        linked_classes: For each class the smallest class it is linked to, int64 [C].
        order: The groups in the order in which they are assigned, int64 [K].

    Args:
        groups: Name of each image's group, uint64 [N].
        targets: Class of each image, int64 [N].
        num_classes: Number of classes, C.
        seed: Decides the order in which groups are assigned.
    """

    def __init__(self, groups: np.ndarray, targets: np.ndarray, num_classes: int, seed: int) -> None:
        self.names, self.group_of = np.unique(groups, return_inverse=True)
        self.sizes = np.bincount(self.group_of, minlength=len(self.names))
        self.splits = np.full(len(self.names), UNASSIGNED, dtype=np.int8)
        # One code for each (group, class) that occurs: sorted by group, then by class.
        cells, self.cell_counts = np.unique(self.group_of * num_classes + targets, return_counts=True)
        self.cell_groups, self.cell_labels = np.divmod(cells, max(1, num_classes))
        self.starts = np.searchsorted(self.cell_groups, np.arange(len(self.names) + 1))
        # Neighbouring cells of one group link their classes.
        shared = np.flatnonzero(self.cell_groups[1:] == self.cell_groups[:-1])
        self.linked_classes = clusters(num_classes, self.cell_labels[shared], self.cell_labels[shared + 1])
        self.order = np.argsort(ranks((f"{name:016x}" for name in self.names.tolist()), seed), kind="stable")

    @property
    def train_groups(self) -> np.ndarray:
        """Number of groups of each class in train or not yet assigned, int64 [C]."""
        in_train = self.splits[self.cell_groups] <= TRAIN
        return np.asarray(np.bincount(self.cell_labels[in_train], minlength=len(self.linked_classes)))

    def images(self, chosen: np.ndarray) -> np.ndarray:
        """Return the images in the chosen groups (bool [K]) of each class and of its linked classes, float64 [2, C]."""
        count, links = len(self.linked_classes), self.linked_classes
        of_class = np.bincount(self.cell_labels, weights=self.cell_counts * chosen[self.cell_groups], minlength=count)
        of_linked = np.bincount(links, weights=of_class, minlength=count)[links]
        return np.stack([of_class, of_linked])

    def assign(self, split: int, ratio: float, min_train_groups: int) -> None:
        """Hold out `ratio` of each class for `split`, from groups that are not assigned yet.

        Args:
            split: VAL or TEST.
            ratio: Share of the images of each class.
            min_train_groups: So many groups of each class stay unassigned.
        """
        several = self.sizes > 1
        # Groups of several images fill their own share first: a split is neither made of them nor without them.
        own_share = np.minimum(self._deficit(split, ratio, several), self._deficit(split, ratio))
        self._fill(split, min_train_groups, several, own_share)
        # Single images then fill each class to the count.
        self._fill(split, min_train_groups, ~several, self._deficit(split, ratio))
        # What is still missing can come only from groups of several images.
        self._fill(split, min_train_groups, several, self._deficit(split, ratio))
        self._fill(split, min_train_groups, several, self._deficit(split, ratio), linked_only=True)
        self._show_every_class(split, min_train_groups)

    def _deficit(self, split: int, ratio: float, chosen: np.ndarray | None = None) -> np.ndarray:
        """Return how many images the split lacks of each class and of its linked classes, float64 [2, C].

        Over all groups the share is rounded and is one image at least; over the `chosen` groups, bool [K], it is not.
        """
        groups = np.ones(len(self.splits), dtype=bool) if chosen is None else chosen
        images = self.images(groups)
        wanted = ratio * images
        if chosen is None:
            wanted = np.where(images > 0, np.maximum(1, np.floor(wanted + 0.5)), 0)
        return np.asarray(wanted - self.images(groups & (self.splits == split)))

    def _fill(
        self, split: int, min_train_groups: int, chosen: np.ndarray, deficit: np.ndarray, linked_only: bool = False
    ) -> None:
        """Assign each chosen group that reduces the deficit, in the splitter's order.

        A group is assigned only if its size is at most twice the deficit of its linked classes. So the count is
        exceeded by half a group at most, and where a group was refused less than half of it is lacking.

        Args:
            split: VAL or TEST.
            min_train_groups: So many groups of each class stay unassigned.
            chosen: The groups to take from, bool [K].
            deficit: Images lacking of each class and of its linked classes, float64 [2, C].
            linked_only: Ignore the deficit of the single classes.
        """
        # Lists: this loop reads single numbers, which is much faster than from arrays.
        train_groups = self.train_groups.tolist()
        linked_classes = self.linked_classes.tolist()
        starts = self.starts.tolist()
        labels = self.cell_labels.tolist()
        counts = self.cell_counts.tolist()
        sizes = self.sizes.tolist()
        of_class, of_linked = deficit.tolist()
        for group in self._unassigned(chosen).tolist():
            start, size = starts[group], sizes[group]
            linked = linked_classes[labels[start]]  # all classes of a group are linked
            # 1. Too large for what its linked classes lack.
            if size > 2 * of_linked[linked]:
                continue
            # 2. Its classes, taken together, must not end further from their counts.
            cells = range(start, starts[group + 1])
            change = sum(abs(of_class[labels[cell]] - counts[cell]) - abs(of_class[labels[cell]]) for cell in cells)
            if not linked_only and change > 0:
                continue
            # 3. Every class of it must keep enough groups to train on.
            if any(train_groups[labels[cell]] <= min_train_groups for cell in cells):
                continue
            self.splits[group] = split
            of_linked[linked] -= size
            for cell in cells:
                of_class[labels[cell]] -= counts[cell]
                train_groups[labels[cell]] -= 1

    def _unassigned(self, chosen: np.ndarray) -> np.ndarray:
        """Return the chosen groups that have no split yet, in the splitter's order, int64."""
        return np.asarray(self.order[chosen[self.order] & (self.splits[self.order] == UNASSIGNED)])

    def _show_every_class(self, split: int, min_train_groups: int) -> None:
        """Assign the smallest group of each class that the split lacks, if the class has groups enough."""
        train_groups = self.train_groups
        # The cells of each class, smallest group first, equal sizes in the splitter's order.
        cells = np.lexsort((self._positions()[self.cell_groups], self.sizes[self.cell_groups], self.cell_labels))
        bounds = np.searchsorted(self.cell_labels[cells], np.arange(len(self.linked_classes) + 1))
        for label in np.flatnonzero(self.images(self.splits == split)[0] == 0):
            groups = self.cell_groups[cells[bounds[label] : bounds[label + 1]]]
            if (self.splits[groups] == split).any():  # assigned for another class, a moment ago
                continue
            for group in groups[self.splits[groups] == UNASSIGNED]:
                shown = self.cell_labels[self.starts[group] : self.starts[group + 1]]
                if (train_groups[shown] > min_train_groups).all():
                    self.splits[group] = split
                    train_groups[shown] -= 1
                    break

    def train_on_every_class(self) -> np.ndarray:
        """Move one group back to train, from val rather than test, for each class without any; return these classes."""
        positions = self._positions()
        missing = np.flatnonzero((self.train_groups == 0) & (self.images(self.sizes > 0)[0] > 0))
        for label in missing:
            groups = self.cell_groups[self.cell_labels == label]
            if (self.splits[groups] > TRAIN).all():
                # Val is smaller than test; of one split the last group in the splitter's order.
                self.splits[groups[np.lexsort((-positions[groups], self.splits[groups]))[0]]] = TRAIN
        return missing

    def _positions(self) -> np.ndarray:
        """Return the position of each group in the splitter's order, int64 [K]."""
        positions = np.empty_like(self.order)
        positions[self.order] = np.arange(len(self.order))
        return positions

    def folds(self, count: int) -> np.ndarray:
        """Return the fold of each group, int64 [K].

        Large groups come first; each goes to the fold with the fewest images of its classes. So no two folds differ by
        more than one group in a class that shares no group with others.
        """
        folds = np.zeros(len(self.splits), dtype=np.int64)
        totals = self.images(self.sizes > 0)[0].tolist()
        in_fold = [[0] * count for _ in totals]  # images of each class in each fold
        load = [0] * count  # images in each fold
        starts, labels, counts = self.starts.tolist(), self.cell_labels.tolist(), self.cell_counts.tolist()
        for group in self.order[np.argsort(-self.sizes[self.order], kind="stable")].tolist():
            cells = range(starts[group], starts[group + 1])
            # How full each fold is: images of the class; for several classes the sum of shares, weighted by images.
            fullness: list[float] = list(in_fold[labels[cells.start]])
            if len(cells) > 1:
                fullness = [
                    sum(counts[cell] * in_fold[labels[cell]][fold] / totals[labels[cell]] for cell in cells)
                    for fold in range(count)
                ]
            # The emptiest fold; of equal ones the one with fewer images, then the first.
            fold = min(zip(fullness, load, range(count), strict=True))[2]
            folds[group] = fold
            for cell in cells:
                in_fold[labels[cell]][fold] += counts[cell]
                load[fold] += counts[cell]
        return folds


def ranks(names: Iterable[str], seed: int) -> np.ndarray:
    """Return a sort key for each name that only name and seed decide, uint64 [K]: the start of sha256("seed:name").

    >>> ranks(["a", "b"], seed=0).tolist() == ranks(["b", "a"], seed=0).tolist()[::-1]
    True
    """
    digests = b"".join(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)
