"""Clusters dealt into parts: whole, stratified by class, in an order that only content and seed decide. Knows numbers, no files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from image_classifier.dataset.duplicates import clusters
from image_classifier.manifest import SPLITS

UNDEALT, TRAIN, VAL, TEST = -1, *range(len(SPLITS))


class StratifiedGroupSplitter:
    """Images by the cluster that must stay whole, and the part that each cluster goes to.

    A *cell* is what one cluster holds of one class; a *bunch* is the classes that share clusters, however indirectly: of
    them only the sum can be held to a ratio, of a class that shares none its own count.

    Args:
        groups: Name of each image's cluster, uint64 [N].
        targets: Class of each image, int64 [N].
        num_classes: How many classes there are, C.
        seed: Decides the order in which clusters are dealt.
    """

    def __init__(self, groups: np.ndarray, targets: np.ndarray, num_classes: int, seed: int) -> None:
        self.names, self.of = np.unique(groups, return_inverse=True)  # uint64 [K]; the images' clusters, int64 [N]
        self.sizes = np.bincount(self.of, minlength=len(self.names))
        self.parts = np.full(len(self.names), UNDEALT, dtype=np.int8)
        cells, self.counts = np.unique(self.of * num_classes + targets, return_counts=True)
        self.owners, self.labels = np.divmod(cells, max(1, num_classes))
        self.starts = np.searchsorted(self.owners, np.arange(len(self.names) + 1))
        shared = np.flatnonzero(self.owners[1:] == self.owners[:-1])
        self.bunches = clusters(num_classes, self.labels[shared], self.labels[shared + 1])
        self.order = np.argsort(ranks((f"{name:016x}" for name in self.names.tolist()), seed), kind="stable")

    @property
    def trained(self) -> np.ndarray:
        """How many clusters of each class are trained on as it stands, int64 [C]; what is not dealt is."""
        return np.asarray(np.bincount(self.labels[self.parts[self.owners] <= TRAIN], minlength=len(self.bunches)))

    def images(self, among: np.ndarray) -> np.ndarray:
        """How many images the clusters `among`, bool [K], hold of each class and of each class's bunch, float64 [2, C]."""
        of_class = np.bincount(self.labels, weights=self.counts * among[self.owners], minlength=len(self.bunches))
        return np.stack(
            [of_class, np.bincount(self.bunches, weights=of_class, minlength=len(self.bunches))[self.bunches]]
        )

    def deal(self, part: int, ratio: float, leave: int) -> None:
        """Hold out `ratio` of each class for `part`, from what is not dealt yet; `leave` clusters of a class always stay.

        The clusters of several images fill their own share first, so that a part is made neither of them nor without
        them; single images then fill each class to the count.
        """
        several = self.sizes > 1
        self._fill(part, leave, several, np.minimum(self._lack(part, ratio, several), self._lack(part, ratio)))
        self._fill(part, leave, ~several, self._lack(part, ratio))
        self._fill(part, leave, several, self._lack(part, ratio))
        self._fill(part, leave, several, self._lack(part, ratio), bunch_only=True)
        self._show_every_class(part, leave)

    def _lack(self, part: int, ratio: float, among: np.ndarray | None = None) -> np.ndarray:
        """Images that the part lacks of each class and bunch, float64 [2, C]: of all, at least one; of the clusters `among`, the bare share."""
        chosen = np.ones(len(self.parts), dtype=bool) if among is None else among
        images = self.images(chosen)
        wanted = ratio * images
        if among is None:
            wanted = np.where(images > 0, np.maximum(1, np.floor(wanted + 0.5)), 0)
        return np.asarray(wanted - self.images(chosen & (self.parts == part)))

    def _fill(self, part: int, leave: int, among: np.ndarray, lack: np.ndarray, bunch_only: bool = False) -> None:
        """Put each cluster that brings its bunch, and its classes taken together, nearer to what they lack.

        A cluster goes in only where its size is at most twice the lack: so it is never overdone by more than half a
        cluster, and where a cluster was refused less than half of it is lacking.
        """
        trained, bunches = self.trained.tolist(), self.bunches.tolist()
        starts, labels, counts, sizes = (
            self.starts.tolist(),
            self.labels.tolist(),
            self.counts.tolist(),
            self.sizes.tolist(),
        )
        need, room = lack.tolist()
        for cluster in self._undealt(among).tolist():
            start, size = starts[cluster], sizes[cluster]
            bunch = bunches[labels[start]]
            if size > 2 * room[bunch]:
                continue
            cells = range(start, starts[cluster + 1])
            nearer = (
                bunch_only
                or sum(abs(need[labels[cell]] - counts[cell]) - abs(need[labels[cell]]) for cell in cells) <= 0
            )
            if nearer and all(trained[labels[cell]] > leave for cell in cells):
                self.parts[cluster] = part
                room[bunch] -= size
                for cell in cells:
                    need[labels[cell]] -= counts[cell]
                    trained[labels[cell]] -= 1

    def _undealt(self, among: np.ndarray) -> np.ndarray:
        return np.asarray(self.order[among[self.order] & (self.parts[self.order] == UNDEALT)])

    def _show_every_class(self, part: int, leave: int) -> None:
        """Put the smallest cluster of each class that the part does not show, where there are clusters enough."""
        trained = self.trained
        position = np.empty_like(self.order)
        position[self.order] = np.arange(len(self.order))
        cells = np.lexsort((position[self.owners], self.sizes[self.owners], self.labels))
        bounds = np.searchsorted(self.labels[cells], np.arange(len(self.bunches) + 1))
        for label in np.flatnonzero(self.images(self.parts == part)[0] == 0):
            owners = self.owners[cells[bounds[label] : bounds[label + 1]]]
            if (self.parts[owners] == part).any():  # another class's cluster brought it
                continue
            for cluster in owners[self.parts[owners] == UNDEALT]:
                shown = self.labels[self.starts[cluster] : self.starts[cluster + 1]]
                if (trained[shown] > leave).all():
                    self.parts[cluster] = part
                    trained[shown] -= 1
                    break

    def train_on_every_class(self) -> np.ndarray:
        """Take a cluster back, from val rather than test, for each class that is held out whole; returns these classes."""
        position = np.empty_like(self.order)
        position[self.order] = np.arange(len(self.order))
        bare = np.flatnonzero((self.trained == 0) & (self.images(self.sizes > 0)[0] > 0))
        for label in bare:
            owners = self.owners[self.labels == label]
            if (self.parts[owners] > TRAIN).all():
                self.parts[owners[np.lexsort((-position[owners], self.parts[owners]))[0]]] = TRAIN
        return bare

    def folds(self, count: int) -> np.ndarray:
        """The fold of each cluster, int64 [K]: large ones first, each where its classes are fewest.

        So no two folds differ by more than one cluster in a class that shares none.
        """
        folds = np.zeros(len(self.parts), dtype=np.int64)
        totals = self.images(self.sizes > 0)[0].tolist()
        held = [[0] * count for _ in totals]
        load = [0] * count
        starts, labels, counts = self.starts.tolist(), self.labels.tolist(), self.counts.tolist()
        for cluster in self.order[np.argsort(-self.sizes[self.order], kind="stable")].tolist():
            cells = range(starts[cluster], starts[cluster + 1])
            crowd: list[float] = list(held[labels[cells.start]])
            if len(cells) > 1:
                crowd = [
                    sum(counts[cell] * held[labels[cell]][fold] / totals[labels[cell]] for cell in cells)
                    for fold in range(count)
                ]
            fold = min(zip(crowd, load, range(count), strict=True))[2]
            folds[cluster] = fold
            for cell in cells:
                held[labels[cell]][fold] += counts[cell]
                load[fold] += counts[cell]
        return folds


def ranks(names: Iterable[str], seed: int) -> np.ndarray:
    """Where each name stands in an order that only content and seed decide, uint64 [K]: the start of sha256("seed:name")."""
    digests = b"".join(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)
