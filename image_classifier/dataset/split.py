"""Assign images to train, val and test or to folds: groups stay together, and an image keeps the split it once had."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from image_classifier.dataset.duplicates import clusters
from image_classifier.dataset.group_split import TEST, TRAIN, UNASSIGNED, VAL, StratifiedGroupSplitter
from image_classifier.errors import ConfigError, DataError
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.text import listed

log = logging.getLogger(__name__)

_UNKNOWN = len(SPLITS)  # greater than every split, so that a minimum is the earliest known one
ALL_FOLDS = "all"  # data.fold: train every fold
_LISTED = 10  # classes that a message names


@dataclass(frozen=True)
class SplitSettings:
    """Shares of each class to hold out, used where the folder does not give the split itself.

    `group` keeps images of one key in one split: a regular expression on the path (its first group, else the match as a
    whole, is the key), or the name of a table's column.

    Raises:
        ConfigError: A share below 0, or nothing left to train on.
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


def check_folds(fold: int | str | None, folds: int | None) -> None:
    """Check that `data.fold` and `data.folds` name one of two or more folds, or all; ConfigError if they do not."""
    if fold is None and folds is None:
        return
    if folds is None:
        hint = "data.fold=0 data.folds=5 validates on the first fifth"
        raise ConfigError(f"data.fold={fold} needs data.folds", "data.folds=5 is usual" if fold == ALL_FOLDS else hint)
    if folds < 2:
        raise ConfigError(
            f"data.folds must be at least 2, not {folds}", "data.fold=0 data.folds=5 validates on the first fifth"
        )
    if fold != ALL_FOLDS and fold not in range(folds):
        given = "null" if fold is None else fold
        raise ConfigError(
            f"data.fold must be 0 to {folds - 1} or all with data.folds={folds}, not {given}",
            "data.fold=0 trains one fold, data.fold=all every fold and delivers them as one model",
        )


def group_keys(paths: Sequence[str], pattern: str) -> list[str]:
    r"""Return the key of each path under `data.split.group`, "" for none.

    The key is the first group of the first match, or the match itself if the pattern has no groups.

    >>> group_keys(["cat/tom_1.png", "cat/tom_2.png", "dog/rex_1.png"], r"([^/]+)_\d+")
    ['tom', 'tom', 'rex']

    Raises:
        ConfigError: The pattern is not a regular expression, or matches no path.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"data.split.group={pattern!r} is not a regular expression ({error})",
            "'([^/]+)_\\d+' takes the text before _12",
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
    """Return the group names of images without duplicates, uint64 [N]: the first 8 bytes of sha256, uint8 [N, 32]."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8").ravel().astype(np.uint64)


def join_groups(
    manifest: Manifest, first: np.ndarray, second: np.ndarray, keys: Sequence[str] | None = None
) -> Manifest:
    """Return the manifest with the group of each record set to its cluster.

    Records are in one cluster if equal content, near-duplicates or equal keys link them, directly or through others. A
    cluster is named after the smallest content name of its members, so neither order nor file names matter.

    Args:
        manifest: N records.
        first: Row of one image of each near-duplicate pair, int64 [P].
        second: Row of the other, int64 [P].
        keys: Key of each record, "" for none.
    """
    names = content_names(manifest.digests)
    # Pairs of rows from all three kinds of links.
    copies = _chains(names)
    same_key = _key_chains(keys) if keys is not None else (np.empty(0, np.int64),) * 2
    links = [np.concatenate(ends) for ends in zip((first, second), copies, same_key, strict=True)]
    cluster_of = clusters(len(manifest), links[0].astype(np.int64), links[1].astype(np.int64))
    # The smallest name of each cluster, kept in the row that the cluster is numbered by; other rows are not read.
    groups = names.copy()
    np.minimum.at(groups, cluster_of, names)
    return replace(manifest, groups=groups[cluster_of])


def _chains(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of rows that link all rows of one name, each with the next, int64 [P] twice."""
    order = np.argsort(names, kind="stable")
    same = names[order[1:]] == names[order[:-1]]
    return order[:-1][same], order[1:][same]


def _key_chains(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of rows that link all rows of one key, int64 [P] twice; rows without a key are in no pair."""
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
    """Return the manifest with every record in a split and no group in two.

    Splits that the folder gives stay, also where they tear a group: that is a leak to report. Every other image of such
    a group follows the given ones, and none of it is taken out of train. Splits that the folder does not give are taken
    out of the rest by ratio, class by class, in the order of sha256("seed:group"). Images that `previous` knows, by
    content or by path, keep their split; only new ones are assigned. With `folds` the test split is held out as before.
    The rest, a given val split included, is divided into that many folds, and fold number `fold` is val. Folds depend
    on data and seed only, never on `previous`, so the folds of one data set agree.

    Raises:
        ConfigError: An invalid fold.
        DataError: A class has one distinct image only, but images of it must be held out.
    """
    check_folds(fold, folds)
    if isinstance(fold, str):
        raise ConfigError("data.fold=all is for the verb train", "choose one fold, such as data.fold=0")
    # 1. Which splits are not given and must be taken out of train.
    given = set(np.unique(manifest.splits).tolist())
    ratios = {TEST: settings.test, VAL: settings.val if folds is None else 0.0}
    pending = {split: ratio for split, ratio in ratios.items() if ratio > 0 and split not in given}
    # 2. Images without a given split follow their group.
    splits = _with_given_groups(manifest)
    # 3. All groups in train or without a split; those that also have held-out images stay in train.
    rows, splitter = _splitter(manifest, splits <= TRAIN, settings.seed)
    splitter.splits[np.isin(splitter.names, manifest.groups[splits > TRAIN])] = TRAIN
    if pending:
        _check_single_groups(splitter, manifest.classes)
    # 4. Groups that the previous manifest knows keep their split.
    if previous is not None and folds is None:
        _keep_previous(splitter, manifest, rows, previous, {TRAIN, *pending})
    # 5. Test first, then val, out of the groups that are left; what nobody took is train.
    for split, ratio in pending.items():
        # While val is still to come, test keeps one more group of each class for it.
        splitter.assign(split, ratio, min_train_groups=2 if split == TEST and (VAL in pending or folds) else 1)
        _warn_of_missing(splitter, split, manifest.classes)
    splits[rows] = np.maximum(splitter.splits, TRAIN)[splitter.group_of]
    # 6. With folds, everything but test is divided again.
    if fold is not None and folds is not None:
        splits = _fold_splits(manifest, splits, settings.seed, fold, folds)
    return replace(manifest, splits=splits)


def _with_given_groups(manifest: Manifest) -> np.ndarray:
    """Return the splits, int8 [N], with images that have none in the earliest split given to their group."""
    splits = manifest.splits.copy()
    given = splits != UNASSIGNED
    if given.all() or not given.any():
        return splits
    _, group = np.unique(manifest.groups, return_inverse=True)
    earliest = np.full(len(splits), _UNKNOWN, dtype=np.int8)
    np.minimum.at(earliest, group[given], splits[given])
    follows = ~given & (earliest[group] != _UNKNOWN)
    splits[follows] = earliest[group[follows]]
    return splits


def _splitter(manifest: Manifest, chosen: np.ndarray, seed: int) -> tuple[np.ndarray, StratifiedGroupSplitter]:
    """Return the chosen rows, int64, and a splitter over them."""
    rows = np.flatnonzero(chosen)
    return rows, StratifiedGroupSplitter(manifest.groups[rows], manifest.targets[rows], len(manifest.classes), seed)


def _check_single_groups(splitter: StratifiedGroupSplitter, classes: Sequence[str]) -> None:
    """Raise DataError for a class with one group, which leaves nothing to hold out."""
    single = np.flatnonzero(np.bincount(splitter.cell_labels, minlength=len(classes)) == 1)
    if len(single):
        fact = (
            f"the class {classes[single[0]]!r} has one distinct image, or one group of them, "
            "which cannot be both trained on and held out"
        )
        hint = (
            "add images of it, leave it out, loosen data.duplicates.threshold or data.split.group, "
            "or give val/ and test/ folders"
        )
        raise DataError(fact, hint)


def _keep_previous(
    splitter: StratifiedGroupSplitter,
    manifest: Manifest,
    rows: np.ndarray,
    previous: Manifest,
    allowed: Collection[int],
) -> None:
    """Assign the groups that `previous` knows to the split they had.

    A group whose members were in different splits goes to the earliest of train, val and test: an image that a model
    was trained on must not test its successor, while one image less in test does no harm.
    """
    known = _previous_splits(manifest, rows, previous, allowed)
    # The earliest and the latest split that the members of each group had.
    earliest = np.full(len(splitter.splits), _UNKNOWN, dtype=np.int8)
    latest = np.full(len(splitter.splits), UNASSIGNED, dtype=np.int8)
    np.minimum.at(earliest, splitter.group_of, known)
    np.maximum.at(latest, splitter.group_of, np.where(known == _UNKNOWN, UNASSIGNED, known).astype(np.int8))
    free = (splitter.splits == UNASSIGNED) & (earliest != _UNKNOWN)
    splitter.splits[free] = earliest[free]
    torn = int(np.count_nonzero(free & (latest > earliest)))
    if torn:
        log.warning(
            "%d groups join images that were in different splits: each is now in the earliest of train, val, test", torn
        )
    missing = splitter.train_on_every_class()
    if len(missing):
        log.warning(
            "held-out images move back to train, which would have none of %s", _class_names(missing, manifest.classes)
        )


def _previous_splits(manifest: Manifest, rows: np.ndarray, previous: Manifest, allowed: Collection[int]) -> np.ndarray:
    """Return the split that each of the rows had in `previous`, int8; _UNKNOWN for none.

    Content decides before the path: a file that was moved still shows the same image.
    """
    splits = np.full(len(rows), _UNKNOWN, dtype=np.int8)
    usable = np.flatnonzero(np.isin(previous.splits, list(allowed)))
    # By content; of copies in several splits the earliest comes first.
    names = content_names(previous.digests[usable])
    order = np.lexsort((previous.splits[usable], names))
    wanted = content_names(manifest.digests[rows])
    position = np.searchsorted(names[order], wanted)
    known = np.append(names[order], np.uint64(0))[position] == wanted
    known &= position < len(order)
    splits[known] = previous.splits[usable[order[position[known]]]]
    # By path, for the rest.
    new = {manifest.paths[rows[row]]: row for row in np.flatnonzero(~known).tolist()}
    if new:
        for path, split in zip(previous.paths, previous.splits.tolist(), strict=True):
            if path in new and split in allowed:
                splits[new[path]] = split
    return splits


def _warn_of_missing(splitter: StratifiedGroupSplitter, split: int, classes: Sequence[str]) -> None:
    """Warn of classes that have images but none in the split."""
    counts = np.bincount(splitter.cell_labels, minlength=len(classes))
    in_split = splitter.splits[splitter.cell_groups] == split
    held_out = np.bincount(splitter.cell_labels[in_split], minlength=len(classes))
    missing = np.flatnonzero((counts > 0) & (held_out == 0))
    if len(missing):
        log.warning("too few distinct images to hold any out for %s: %s", SPLITS[split], _class_names(missing, classes))


def _fold_splits(manifest: Manifest, splits: np.ndarray, seed: int, fold: int, folds: int) -> np.ndarray:
    """Return the splits, int8 [N], with everything but test divided into folds, one of which is val."""
    classes = manifest.classes
    if (manifest.splits == VAL).any():
        log.info("data.folds: the given val split is divided into the folds together with train")
    rows, splitter = _splitter(manifest, splits != TEST, seed)
    _check_single_groups(splitter, classes)
    fold_of = splitter.folds(folds)
    # The number of folds that each class is in.
    in_folds = np.unique(splitter.cell_labels * folds + fold_of[splitter.cell_groups]) // folds
    spread = np.bincount(in_folds, minlength=len(classes))
    if (spread == 1).any():
        name = classes[np.flatnonzero(spread == 1)[0]]
        fact = f"all images of the class {name!r} are in one fold of data.folds={folds}"
        raise DataError(fact, "its groups are linked to those of other classes: take fewer folds or looser groups")
    thin = np.flatnonzero((spread > 0) & (spread < folds))
    if len(thin):
        log.warning(
            "data.folds=%d: too few distinct images to be in every fold: %s", folds, _class_names(thin, classes)
        )
    divided = splits.copy()
    divided[rows] = np.where(fold_of == fold, VAL, TRAIN)[splitter.group_of]
    return divided


def _class_names(labels: np.ndarray, classes: Sequence[str]) -> str:
    return listed([classes[label] for label in labels.tolist()], _LISTED)
