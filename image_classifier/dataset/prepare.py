"""The data stage: look at every file, audit, leave out, select, keep duplicates together, deal the splits, write `manifest.csv`."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.cli.verbs.clean import tag_cache
from image_classifier.dataset.audit.checks import find_issues
from image_classifier.dataset.audit.exclude import Exclusions, read_exclusions
from image_classifier.dataset.audit.fix import FILE_NAME, Correction, Fixes, read_fixes
from image_classifier.dataset.audit.issues import Audit, AuditSettings, issue_counts_text
from image_classifier.dataset.discovery import FileTree, discover, discover_test, unreadable
from image_classifier.dataset.duplicates import DuplicateSettings, NearDuplicates
from image_classifier.dataset.left_out import excluded_records_path, remove_excluded, split_excluded, with_excluded
from image_classifier.dataset.pixel_cache import CacheSettings
from image_classifier.dataset.scan import FileMetadata, scan_files
from image_classifier.dataset.select import ClassSettings, select
from image_classifier.dataset.split import (
    SplitSettings,
    assign_splits,
    check_folds,
    content_names,
    group_keys,
    join_groups,
)
from image_classifier.dataset.twins_store import known_near_duplicates
from image_classifier.errors import ConfigError, DataError, UnreadableImage
from image_classifier.images import DecodeLimits, Preprocess
from image_classifier.manifest import SPLITS, Manifest, Texts
from image_classifier.text import counted

log = logging.getLogger(__name__)

BALANCES = ("none", "sampler", "weights")


@dataclass(frozen=True)
class DataSettings:
    """The config group `data`: which images, at which size, split how; `source` is the node that fetches them.

    Raises:
        ConfigError: A value that cannot be, named by its key.
    """

    name: str | None = None
    dir: Any = None
    archive: Any = None
    sha256: Any = None
    dvc: bool | None = None
    image_size: int = 64
    batch_size: Any = 64
    progressive_sizes: list[int] | None = None
    resize: str = "crop"
    interpolation: str = "bilinear"
    crop_fraction: float = 1.0
    background: tuple[int, int, int] = (255, 255, 255)
    scaled_decoding: bool = True
    flip: bool = True
    balance: str = "none"
    rename: dict[str, str] = field(default_factory=dict)
    classes: ClassSettings = field(default_factory=ClassSettings)
    exclude_path: str | None = None
    fix_path: str | None = None
    manifest_path: str | None = None
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    duplicates: DuplicateSettings = field(default_factory=DuplicateSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    folds: int | None = None
    fold: int | None = None
    cache: CacheSettings = field(default_factory=CacheSettings)
    source: Any = None

    def __post_init__(self) -> None:
        if self.batch_size != "auto" and (isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int)):
            raise ConfigError(f"data.batch_size must be an int, or auto, got {self.batch_size!r}")
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise ConfigError(f"data.batch_size must be at least 1, not {self.batch_size}")
        if isinstance(self.progressive_sizes, list):
            _check_sizes(self.progressive_sizes, self.image_size)
        if isinstance(self.balance, str) and self.balance not in BALANCES:
            raise ConfigError(f"data.balance must be one of {', '.join(BALANCES)}, not {self.balance!r}")
        check_folds(self.fold, self.folds)
        _ = self.preprocess

    @property
    def preprocess(self) -> Preprocess:
        """The evaluation path that these settings ask for; ConfigError where they cannot be."""
        return Preprocess(
            self.image_size, self.resize, self.interpolation, self.crop_fraction, self.background, self.scaled_decoding
        )

    def place(self, root: Path, paths: Sequence[Path], *more: Any) -> str:
        """What names this data set's files: its name, and 8 hex of its folders and tables and of whatever else decides."""
        name = (self.name or root.resolve().name or "data").replace("/", "_")
        identity = repr(([os.path.realpath(path) for path in paths], more))
        return f"{name}-{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


@dataclass(frozen=True)
class DatasetScan:
    """What is known of a data set before it is split: its files as `fixes` corrected them, what one look at each told, and what the audit found."""

    tree: FileTree
    facts: FileMetadata
    twins: NearDuplicates
    audit: Audit
    exclusions: Exclusions
    directory: Path
    fixes: Fixes
    correction: Correction


def _check_sizes(sizes: Sequence[int], image_size: int) -> None:
    """Progressive sizes grow, and end where the network is validated and used."""
    if not sizes or min(sizes) < 1 or list(sizes) != sorted(sizes) or sizes[-1] != image_size:
        given = ",".join(map(str, sizes))
        fact = f"data.progressive_sizes=[{given}] must grow, and end with data.image_size, {image_size}"
        raise ConfigError(fact, f"such as [{image_size * 3 // 4},{image_size}]")


def manifest_path(root: Path, paths: Sequence[Path], settings: DataSettings) -> Path:
    """Where the manifest of these images, under these settings of selection and split, lies: `data.manifest_path`, else a name of its own."""
    if settings.manifest_path:
        return Path(settings.manifest_path)
    asked = (
        astuple(settings.split),
        settings.folds,
        settings.fold,
        astuple(settings.classes),
        sorted(settings.rename.items()),
    )
    return Path("data/manifests") / f"{settings.place(root, paths, asked)}.csv"


def scan_dataset(
    paths: Sequence[Path], settings: DataSettings, asked: AuditSettings, progress: bool = False
) -> DatasetScan:
    """Look at every file, correct labels as fix.csv says, find what is wrong, and bring exclude.csv up to date.

    Raises:
        DataError: There are no images in class folders, or exclude.csv or fix.csv is damaged.
        StorageError: The stores or exclude.csv cannot be written.
    """
    tree = discover(paths, settings.rename, group_column=settings.split.group, progress=progress)
    store = Path(settings.cache.dir)
    tag_cache(store)
    facts = scan_files(tree, store / "facts", settings.limits, settings.background, settings.cache.workers, progress)
    twins = known_near_duplicates(facts, settings.duplicates, store / "twins", progress)
    place = Path("data/audit") / settings.place(tree.root, paths)
    path = Path(settings.exclude_path) if settings.exclude_path else place / "exclude.csv"
    fixes = read_fixes(Path(settings.fix_path) if settings.fix_path else place / FILE_NAME)
    correction = fixes.applied(tree)
    left_out = {image: f"{fixes.path.name}: {reason}" for image, reason in correction.excluded.items()}
    audit = find_issues(correction.tree, facts, twins, asked, read_exclusions(path).also(left_out), correction.counts)
    exclusions = read_exclusions(path).updated(audit)  # read again: a person may have written to it meanwhile
    exclusions.write(path)
    directory = Path(asked.output_dir) if asked.output_dir else place
    return DatasetScan(correction.tree, facts, twins, audit, exclusions, directory, fixes, correction)


def prepare(
    paths: Sequence[Path], settings: DataSettings, asked: AuditSettings, progress: bool = False
) -> tuple[Manifest, DatasetScan]:
    """Examine the images, leave out, select, deal the splits and write the manifest; images that an earlier one knows keep their split.

    Raises:
        DataError: The images cannot be trained on.
        StorageError: The manifest cannot be written.
    """
    found = scan_dataset(paths, settings, asked, progress)
    manifest = _dealt(found, settings)
    path = manifest_path(found.tree.root, paths, settings)
    previous = Manifest.read(path, manifest.root) if path.exists() else None
    manifest = assign_splits(manifest, settings.split, with_excluded(previous, path), settings.fold, settings.folds)
    manifest, gone = split_excluded(manifest, found.correction)
    _check_classes(manifest)
    if gone is not None:
        gone.write(excluded_records_path(path))
    if previous is None or previous != manifest:  # an untouched file keeps its date, and a read-only one its peace
        manifest.write(path)
    if gone is None:  # only now: a record is always in one of the two files
        remove_excluded(path)
    if previous is not None and settings.folds is None:
        _warn_of_kept_split(manifest, found.tree, settings, path)
    _report(manifest, path)
    if manifest.corrected:
        log.info("%s: %s", found.fixes.path, issue_counts_text(manifest.corrected))
    return manifest, found


def all_folds(found: DatasetScan, settings: DataSettings) -> list[Manifest]:
    """The manifests that `data.fold=0` to the last one of `data.folds` give, none of them written.

    Raises:
        DataError: As `prepare`, or a fold would hold no image.
    """
    whole, folds = _dealt(found, settings), range(settings.folds or 0)
    dealt = [
        split_excluded(assign_splits(whole, settings.split, None, fold, settings.folds), found.correction)[0]
        for fold in folds
    ]
    if empty := sum(not len(manifest.indices("val")) for manifest in dealt):
        raise DataError(
            f"{empty} of {len(folds)} folds would hold no image",
            f"take at most {len(folds) - empty}; 5 or 10 are usual",
        )
    return dealt


def _warn_of_kept_split(manifest: Manifest, tree: FileTree, settings: DataSettings, path: Path) -> None:
    known = len(manifest.indices("train")) + len(manifest.indices("val"))
    share = len(manifest.indices("val")) / max(1, known)
    given = any(image.split for image in tree.images)  # then a val part may be the folder's own, of any size
    if not given and abs(share - settings.split.val) > 0.05:
        log.warning(
            "%s keeps its split: %.0f %% are val, not %.0f %%; delete it to deal anew",
            path,
            100 * share,
            100 * settings.split.val,
        )


def load_test_manifest(
    folders: Sequence[Path], limits: DecodeLimits, store_dir: Path, progress: bool = False
) -> Manifest:
    """The images to test on, every record in the split "test": a tree's own test part where it has one, else all of it.

    Raises:
        DataError: There are no images in class folders, or one of them cannot be read.
    """
    tree = discover_test(folders, progress=progress)
    tag_cache(store_dir)
    facts = scan_files(tree, store_dir / "facts", limits, (255, 255, 255), None, progress)
    if facts.errors:
        raise unreadable(
            tree.root,
            [UnreadableImage(tree.root / tree.images[row].path, reason) for row, reason in facts.errors.items()],
        )
    return manifest_of(tree, facts, np.arange(len(tree.images)))


def _dealt(found: DatasetScan, settings: DataSettings) -> Manifest:
    """The images that are to be dealt, their groups joined; those that fix.csv leaves out among them, so that no other moves because of them."""
    tree, facts = found.tree, found.facts
    _refuse_empty(tree, settings)
    if found.audit.unmatched:
        log.warning("%s: no image is called %s", found.exclusions.path, ", ".join(map(repr, found.audit.unmatched[:5])))
    excluded = found.exclusions.covers([image.path for image in tree.images])
    corrected = found.correction.excluded
    errors = {
        tree.images[row].path: reason
        for row, reason in facts.errors.items()
        if not excluded[row] and tree.images[row].path not in corrected
    }
    broken = [UnreadableImage(tree.root / path, reason) for path, reason in errors.items()]
    if broken:
        raise unreadable(tree.root, broken)
    if excluded.any():
        log.warning("%s left out by %s", counted(int(excluded.sum()), "image"), found.exclusions.path)
    rows = np.flatnonzero(facts.readable)
    whole = _joined(
        manifest_of(tree, facts, rows), found, rows, settings
    )  # before anything leaves: what is left out may link what stays
    whole = whole.take(np.flatnonzero(~excluded[rows]))
    gone = {*(image.label for image in tree.images), *_empty_classes(tree, settings)} - set(whole.classes)
    classes = replace(settings.classes, exclude=[name for name in settings.classes.exclude if name not in gone])
    chosen = select(whole.targets, whole.classes, whole.splits, whole.digests, classes, settings.split.seed)
    if chosen.summary:
        log.info("%s", chosen.summary)
    manifest = whole.take(chosen.rows)
    _check_classes(split_excluded(manifest, found.correction)[0])
    return replace(manifest, corrected=found.correction.counts)


def manifest_of(tree: FileTree, facts: FileMetadata, rows: np.ndarray) -> Manifest:
    """Some of the tree's images as a table, each a group of its own content, in the splits that the tree gives."""
    images = [tree.images[row] for row in rows.tolist()]
    classes = tuple(sorted({image.label for image in images}))
    index = {label: code for code, label in enumerate(classes)}
    codes = {split: code for code, split in enumerate(SPLITS)} | {"": -1}
    digests = facts.digests[rows]
    return Manifest(
        root=tree.root,
        paths=Texts.of(image.path for image in images),
        classes=classes,
        targets=np.array([index[image.label] for image in images], dtype=np.int64),
        splits=np.array([codes[image.split] for image in images], dtype=np.int8),
        groups=content_names(digests),
        digests=digests,
        widths=facts.widths[rows],
        heights=facts.heights[rows],
    )


def _empty_classes(tree: FileTree, settings: DataSettings) -> dict[str, str]:
    """Class name -> folder, of the class folders without images."""
    names = {folder.rpartition("/")[2]: folder for folder in tree.empty}
    return {settings.rename.get(name, name): folder for name, folder in names.items()}


def _refuse_empty(tree: FileTree, settings: DataSettings) -> None:
    for label, folder in _empty_classes(tree, settings).items():
        if label not in settings.classes.exclude and (
            settings.classes.include is None or label in settings.classes.include
        ):
            hint = f"add images to it, remove the folder, or leave it out with data.classes.exclude=[{label}]"
            raise DataError(f"the class folder {str(tree.root / folder)!r} holds no images", hint)


def _check_classes(manifest: Manifest) -> None:
    """Two classes or more to train on, and none that only the held-out parts know."""
    trained = {manifest.classes[code] for code in np.unique(manifest.targets[manifest.splits <= 0]).tolist()}
    if len(trained) < 2:
        named = f"one class only, {next(iter(trained))!r}" if trained else "no class to train on"
        raise DataError(f"{str(manifest.root)!r} holds {named}", "a classifier needs images of two or more classes")
    for code in np.unique(manifest.targets).tolist():
        if manifest.classes[code] not in trained:
            split = SPLITS[int(manifest.splits[np.flatnonzero(manifest.targets == code)[0]])]
            fact = f"the {split} part of {str(manifest.root)!r} has the class {manifest.classes[code]!r}, which the train part lacks"
            raise DataError(
                fact, f"add training images of it, or leave it out with data.classes.exclude=[{manifest.classes[code]}]"
            )


def _joined(manifest: Manifest, found: DatasetScan, rows: np.ndarray, settings: DataSettings) -> Manifest:
    """Copies, twins and images with one group key become one group; `rows` are the manifest's rows in the tree."""
    position = np.full(len(found.tree.images), -1, dtype=np.int64)
    position[rows] = np.arange(len(rows))
    keys: Sequence[str] | None = None
    if settings.split.group:
        keys = [found.tree.images[row].key for row in rows.tolist()]
        keys = keys if any(keys) else group_keys(manifest.paths, settings.split.group)
    return join_groups(manifest, position[found.twins.first], position[found.twins.second], keys)


def _report(manifest: Manifest, path: Path) -> None:
    counts = Counter(manifest.splits.tolist())
    parts = ", ".join(f"{split} {counts[code]}" for code, split in enumerate(SPLITS))
    log.info("%d images, %d classes: %s (%s)", len(manifest), len(manifest.classes), parts, path)
    for split in ("val", "test"):
        leaked = int(manifest.leaked(split).sum())
        if leaked:
            log.warning(
                "%d of %d %s images have a copy, a twin or one of their group in the train part: their figures are flattered",
                leaked,
                counts[SPLITS.index(split)],
                split,
            )
