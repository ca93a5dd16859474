"""Dealing images into train, val and test: stratified, by content, and never again for an image already dealt."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from image_classifier.errors import ConfigError, DataError
from image_classifier.records import Manifest, Record


@dataclass(frozen=True)
class SplitSettings:
    """Parts of each class to hold out, used where the tree does not give the split itself.

    Raises:
        ConfigError: A part below 0, or nothing left to train on.
    """

    val: float = 0.2
    test: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("val", self.val), ("test", self.test)):
            if not 0 <= value < 1:
                raise ConfigError(f"data.split.{name} must be at least 0 and below 1, not {value}", "0.2 holds out a fifth")
        if self.val + self.test >= 1:
            raise ConfigError(f"data.split.val + data.split.test must be below 1, not {self.val + self.test:g}", "leave something to train on")


def assign_splits(manifest: Manifest, settings: SplitSettings, previous: Manifest | None = None) -> Manifest:
    """The manifest with every record in a split.

    Splits given by the tree stay. What they do not give is carved out of the rest by ratio, class by class, in the order of
    sha256("seed:group"): neither names nor the file system's order matter, and exact duplicates (one group) stay together.
    Images that `previous` knows, by content or by path, keep their split; only new ones are dealt.

    Raises:
        DataError: A class has one distinct image where a part of it must be held out.
    """
    given = {record.split for record in manifest}
    pending = {name: part for name, part in (("test", settings.test), ("val", settings.val)) if part > 0 and name not in given}
    pool = [record for record in manifest if record.split in ("", "train")]
    dealer = _Dealer(pool, settings.seed)
    if pending:
        dealer.check()
    if previous is not None:
        dealer.keep(previous, allowed={"train", *pending})
    for name, part in pending.items():
        # While val is still to come, test leaves one image for it.
        dealer.deal(name, part, leave=2 if name == "test" and "val" in pending else 1)
    splits = dealer.splits
    records = (replace(record, split=splits.get(record.group, "train")) if record.split in ("", "train") else record for record in manifest)
    return Manifest(manifest.root, tuple(records))


class _Dealer:
    """The groups of one pool of records; `splits` says where those that are decided go, `left` how many each class trains on."""

    def __init__(self, pool: Sequence[Record], seed: int) -> None:
        self.pool, self.seed = pool, seed
        self.splits: dict[str, str] = {}
        self.labels: dict[str, Counter[str]] = defaultdict(Counter)  # group -> how many records of each class
        self.groups: dict[str, set[str]] = defaultdict(set)  # class -> its groups
        for record in pool:
            self.labels[record.group][record.label] += 1
            self.groups[record.label].add(record.group)
        self.left = Counter({label: len(groups) for label, groups in self.groups.items()})

    def check(self) -> None:
        """Raise DataError for a class that has nothing to hold out."""
        for label in sorted(self.groups):
            if len(self.groups[label]) < 2:
                fact = f"the class {label!r} has one distinct image, which cannot be both trained on and held out"
                raise DataError(fact, "add images of it, remove its folder, or give val/ and test/ folders")

    def keep(self, previous: Manifest, allowed: set[str]) -> None:
        """Decide the groups that `previous` knows, by content first: a file that moved is still the same picture."""
        by_group = {record.group: record.split for record in previous if record.split in allowed}
        by_path = {record.path: record.split for record in previous if record.split in allowed}
        for record in self.pool:
            split = by_group.get(record.group) or by_path.get(record.path)
            if split and record.group not in self.splits:
                self._put(record.group, split)

    def deal(self, name: str, part: float, leave: int) -> None:
        """Put groups into the split `name` until each class has its part, always leaving `leave` groups of a class."""
        for label in sorted(self.groups):
            total = sum(self.labels[group][label] for group in self.groups[label])
            held = sum(self.labels[group][label] for group in self.groups[label] if self.splits.get(group) == name)
            target = max(1, math.floor(part * total + 0.5))
            for group in sorted(self.groups[label] - self.splits.keys(), key=self._rank):
                if held >= target:
                    break
                if all(self.left[other] > leave for other in self.labels[group]):
                    self._put(group, name)
                    held += self.labels[group][label]

    def _put(self, group: str, split: str) -> None:
        self.splits[group] = split
        if split != "train":
            self.left.subtract(self.labels[group].keys())

    def _rank(self, group: str) -> str:
        return hashlib.sha256(f"{self.seed}:{group}".encode()).hexdigest()
