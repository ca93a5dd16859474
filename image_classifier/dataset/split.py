"""Dealing images into train, val and test or folds: clusters stay whole, and what was dealt once is never dealt again."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from image_classifier.dataset.duplicates import clusters
from image_classifier.dataset.group_split import TEST, TRAIN, UNDEALT, VAL, StratifiedGroupSplitter
from image_classifier.errors import ConfigError, DataError
from image_classifier.manifest import SPLITS, Manifest

log = logging.getLogger(__name__)

_UNKNOWN = len(SPLITS)  # comes after every part, so that the smallest is the earliest known one


@dataclass(frozen=True)
class SplitSettings:
    """Parts of each class to hold out, used where the tree does not give the split itself.

    `group` keeps images of one key in one part: a regular expression on the path (its first group, else the whole match,
    is the key), or the name of a table's column.

    Raises:
        ConfigError: A part below 0, or nothing left to train on.
    """

    val: float = 0.2
    test: float = 0.0
    seed: int = 0
    group: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("val", self.val), ("test", self.test)):
            if not 0 <= value < 1:
                raise ConfigError(
                    f"data.split.{name} must be at least 0 and below 1, not {value}", "0.2 holds out a fifth"
                )
        if self.val + self.test >= 1:
            raise ConfigError(
                f"data.split.val + data.split.test must be below 1, not {self.val + self.test:g}",
                "leave something to train on",
            )


def check_folds(fold: int | None, folds: int | None) -> None:
    """ConfigError where `data.fold` and `data.folds` do not name one of two or more folds."""
    if fold is None and folds is None:
        return
    if folds is None:
        raise ConfigError(f"data.fold={fold} needs data.folds", "data.fold=0 data.folds=5 validates on the first fifth")
    if folds < 2:
        raise ConfigError(
            f"data.folds must be at least 2, not {folds}", "data.fold=0 data.folds=5 validates on the first fifth"
        )
    if fold is None or not 0 <= fold < folds:
        raise ConfigError(
            f"data.fold must be 0 to {folds - 1} with data.folds={folds}, not {'null' if fold is None else fold}"
        )


def group_keys(paths: Sequence[str], pattern: str) -> list[str]:
    """The key of each path under `data.split.group`: the first group of its first match, else the whole match; "" where there is none.

    Raises:
        ConfigError: The pattern is no regular expression, or finds nothing.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"data.split.group={pattern!r} is not a regular expression ({error})",
            "'([^/]+)_\\d+' takes what stands before _12",
        ) from error
    keys = [(match[1 if regex.groups else 0] or "") if (match := regex.search(path)) else "" for path in paths]
    alone = keys.count("")
    if alone == len(keys):
        example = f"it is searched in paths such as {paths[0]!r}" if keys else ""
        raise ConfigError(f"data.split.group={pattern!r} finds no group in any of the {len(keys)} paths", example)
    if alone:
        log.info("data.split.group: %d of %d images have no key, each is a group of its own", alone, len(keys))
    return keys


def content_names(digests: np.ndarray) -> np.ndarray:
    """The group of an image that is like no other, uint64 [N]: the first eight bytes of its sha256, of uint8 [N, 32]."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8").ravel().astype(np.uint64)


def join_groups(
    manifest: Manifest, first: np.ndarray, second: np.ndarray, keys: Sequence[str] | None = None
) -> Manifest:
    """The manifest with each record's group set to its cluster: what equal content, twins and equal keys link, however indirectly.

    A cluster is called after the smallest content name of its members, so neither order nor names of files matter.

    Args:
        manifest: N records.
        first: Row of one of each pair of twins, int64 [P].
        second: Row of the other, int64 [P].
        keys: Key of each record, "" where it has none.
    """
    names = content_names(manifest.digests)
    copies = _chains(names)
    sharers = _key_chains(keys) if keys is not None else (np.empty(0, np.int64),) * 2
    links = [np.concatenate(ends) for ends in zip((first, second), copies, sharers, strict=True)]
    member_of = clusters(len(manifest), links[0].astype(np.int64), links[1].astype(np.int64))
    groups = names.copy()
    np.minimum.at(groups, member_of, names)  # right where a cluster's own row stands, which is all that is read
    return replace(manifest, groups=groups[member_of])


def _chains(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows that link all rows of one name, each with the next."""
    order = np.argsort(names, kind="stable")
    same = names[order[1:]] == names[order[:-1]]
    return order[:-1][same], order[1:][same]


def _key_chains(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    codes: dict[str, int] = {}
    numbered = np.array([codes.setdefault(key, len(codes)) if key else -1 for key in keys], dtype=np.int64)
    rows = np.flatnonzero(numbered >= 0)
    first, second = _chains(numbered[rows])
    return rows[first], rows[second]


def assign_splits(
    manifest: Manifest,
    settings: SplitSettings,
    previous: Manifest | None = None,
    fold: int | None = None,
    folds: int | None = None,
) -> Manifest:
    """The manifest with every record in a split, no cluster (`groups`) in two.

    Splits given by the tree stay, also where they tear a cluster: that is a leak to report. Every other image of such a
    cluster goes with the given ones, and none of it is carved out of train. What the tree does not give is carved out of
    the rest by ratio, class by class, in the order of sha256("seed:group"). Images that `previous` knows, by content or
    by path, keep their split; only new ones are dealt. With `folds` the test part is held out as ever, all the rest, a
    given val part too, is dealt into so many folds, and number `fold` is val: that depends on the data and the seed only,
    never on `previous`, so that the folds of one data set agree.

    Raises:
        ConfigError: A fold that cannot be.
        DataError: A class has one distinct image where a part of it must be held out.
    """
    check_folds(fold, folds)
    given = set(np.unique(manifest.splits).tolist())
    ratios = {TEST: settings.test, VAL: settings.val if folds is None else 0.0}
    pending = {part: ratio for part, ratio in ratios.items() if ratio > 0 and part not in given}
    splits = _with_what_is_given(manifest)
    rows, pool = _pool(manifest, splits <= TRAIN, settings.seed)
    pool.parts[np.isin(pool.names, manifest.groups[splits > TRAIN])] = TRAIN
    if pending:
        _check(pool, manifest.classes)
    if previous is not None and folds is None:
        _remember(pool, manifest, rows, previous, {TRAIN, *pending})
    for part, ratio in pending.items():
        # While val is still to come, test leaves one cluster for it.
        pool.deal(part, ratio, leave=2 if part == TEST and (VAL in pending or folds) else 1)
        _tell_of_lacking(pool, part, manifest.classes)
    splits[rows] = np.maximum(pool.parts, TRAIN)[pool.of]
    if fold is not None and folds is not None:
        splits = _fold(manifest, splits, settings.seed, fold, folds)
    return replace(manifest, splits=splits)


def _with_what_is_given(manifest: Manifest) -> np.ndarray:
    """The splits, where an image that none is given goes with the earliest part given to its cluster, int8 [N]."""
    splits = manifest.splits.copy()
    given = splits != UNDEALT
    if given.all() or not given.any():
        return splits
    _, cluster = np.unique(manifest.groups, return_inverse=True)
    earliest = np.full(len(splits), _UNKNOWN, dtype=np.int8)
    np.minimum.at(earliest, cluster[given], splits[given])
    follows = ~given & (earliest[cluster] != _UNKNOWN)
    splits[follows] = earliest[cluster[follows]]
    return splits


def _pool(manifest: Manifest, chosen: np.ndarray, seed: int) -> tuple[np.ndarray, StratifiedGroupSplitter]:
    rows = np.flatnonzero(chosen)
    return rows, StratifiedGroupSplitter(manifest.groups[rows], manifest.targets[rows], len(manifest.classes), seed)


def _check(pool: StratifiedGroupSplitter, classes: Sequence[str]) -> None:
    """Raise DataError for a class that has nothing to hold out."""
    single = np.flatnonzero(np.bincount(pool.labels, minlength=len(classes)) == 1)
    if len(single):
        fact = f"the class {classes[single[0]]!r} has one distinct image, or one group of them, which cannot be both trained on and held out"
        hint = "add images of it, leave it out, loosen data.duplicates.threshold or data.split.group, or give val/ and test/ folders"
        raise DataError(fact, hint)


def _remember(
    pool: StratifiedGroupSplitter, manifest: Manifest, rows: np.ndarray, previous: Manifest, allowed: Collection[int]
) -> None:
    """Decide the clusters that `previous` knows.

    One whose members were dealt apart goes where the earliest of train, val and test is: what a model has learnt from is
    not to test its successor, while an image less in test harms no figure.
    """
    known = _earlier_parts(manifest, rows, previous, allowed)
    earliest = np.full(len(pool.parts), _UNKNOWN, dtype=np.int8)
    latest = np.full(len(pool.parts), UNDEALT, dtype=np.int8)
    np.minimum.at(earliest, pool.of, known)
    np.maximum.at(latest, pool.of, np.where(known == _UNKNOWN, UNDEALT, known).astype(np.int8))
    free = (pool.parts == UNDEALT) & (earliest != _UNKNOWN)
    pool.parts[free] = earliest[free]
    torn = int(np.count_nonzero(free & (latest > earliest)))
    if torn:
        log.warning(
            "%d clusters join images that were in different parts: each is now whole in the earliest of train, val, test",
            torn,
        )
    bare = pool.train_on_every_class()
    if len(bare):
        log.warning("held-out images go back to train, which would have none of %s", _listed(bare, manifest.classes))


def _earlier_parts(manifest: Manifest, rows: np.ndarray, previous: Manifest, allowed: Collection[int]) -> np.ndarray:
    """The part each of the rows had in `previous`, int8, by content first: a file that moved is still the same picture."""
    parts = np.full(len(rows), _UNKNOWN, dtype=np.int8)
    usable = np.flatnonzero(np.isin(previous.splits, list(allowed)))
    names = content_names(previous.digests[usable])
    order = np.lexsort((previous.splits[usable], names))  # of copies in several parts the earliest is found
    mine = content_names(manifest.digests[rows])
    place = np.searchsorted(names[order], mine)
    found = np.append(names[order], np.uint64(0))[place] == mine
    found &= place < len(order)
    parts[found] = previous.splits[usable[order[place[found]]]]
    new = {manifest.paths[rows[row]]: row for row in np.flatnonzero(~found).tolist()}
    if new:
        for path, part in zip(previous.paths, previous.splits.tolist(), strict=True):
            if path in new and part in allowed:
                parts[new[path]] = part
    return parts


def _tell_of_lacking(pool: StratifiedGroupSplitter, part: int, classes: Sequence[str]) -> None:
    counts = np.bincount(pool.labels, minlength=len(classes))
    held = np.bincount(pool.labels[pool.parts[pool.owners] == part], minlength=len(classes))
    lacking = np.flatnonzero((counts > 0) & (held == 0))
    if len(lacking):
        log.warning("too few distinct images to hold any out for %s: %s", SPLITS[part], _listed(lacking, classes))


def _fold(manifest: Manifest, splits: np.ndarray, seed: int, fold: int, folds: int) -> np.ndarray:
    """The splits with all that is not test dealt into folds, of which one is val, int8 [N]."""
    classes = manifest.classes
    if (manifest.splits == VAL).any():
        log.info("data.folds: the given val part is dealt into the folds with train")
    rows, pool = _pool(manifest, splits != TEST, seed)
    _check(pool, classes)
    fold_of = pool.folds(folds)
    spread = np.bincount(np.unique(pool.labels * folds + fold_of[pool.owners]) // folds, minlength=len(classes))
    if (spread == 1).any():
        fact = f"all images of the class {classes[np.flatnonzero(spread == 1)[0]]!r} fall into one fold of data.folds={folds}"
        raise DataError(fact, "its groups are bound to those of other classes: take fewer folds or looser groups")
    thin = np.flatnonzero((spread > 0) & (spread < folds))
    if len(thin):
        log.warning("data.folds=%d: not in every fold, for want of distinct images: %s", folds, _listed(thin, classes))
    dealt = splits.copy()
    dealt[rows] = np.where(fold_of == fold, VAL, TRAIN)[pool.of]
    return dealt


def _listed(labels: np.ndarray, classes: Sequence[str], most: int = 10) -> str:
    names = ", ".join(classes[label] for label in labels[:most].tolist())
    return f"{names} and {len(labels) - most} more" if len(labels) > most else names
