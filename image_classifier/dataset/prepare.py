"""The data stage: scan, audit, exclude, select, keep duplicates together, assign splits, write `manifest.csv`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from image_classifier.dataset.audit.checks import find_issues
from image_classifier.dataset.audit.exclude import Exclusions, read_exclusions
from image_classifier.dataset.audit.fix import FILE_NAME, Correction, Fixes, read_fixes
from image_classifier.dataset.audit.issues import Audit, AuditSettings, issue_counts_text
from image_classifier.dataset.cache_dir import tag_cache
from image_classifier.dataset.discovery import FileTree, discover, discover_test, unreadable
from image_classifier.dataset.duplicate_cache import known_near_duplicates
from image_classifier.dataset.duplicates import NearDuplicates
from image_classifier.dataset.excluded_records import (
    excluded_records_path,
    remove_excluded,
    split_excluded,
    with_excluded,
)
from image_classifier.dataset.scan import FileMetadata, scan_files
from image_classifier.dataset.select import select
from image_classifier.dataset.settings import DataSettings
from image_classifier.dataset.split import (
    assign_splits,
    content_names,
    group_keys,
    join_groups,
)
from image_classifier.errors import DataError, UnreadableImage
from image_classifier.images import DecodeLimits
from image_classifier.manifest import SPLITS, Manifest, Texts
from image_classifier.text import counted, listed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetScan:
    """A data set before it is split: the files with labels corrected by `fixes`, their metadata, and the audit."""

    tree: FileTree
    metadata: FileMetadata
    near_duplicates: NearDuplicates
    audit: Audit
    exclusions: Exclusions
    directory: Path
    fixes: Fixes
    correction: Correction


def manifest_path(root: Path, paths: Sequence[Path], settings: DataSettings) -> Path:
    """Return the path of the manifest: `data.manifest_path`, else one made of the data set, its selection and split."""
    if settings.manifest_path:
        return Path(settings.manifest_path)
    decisive = (
        astuple(settings.split),
        settings.folds,
        settings.fold,
        astuple(settings.classes),
        sorted(settings.rename.items()),
    )
    return Path("data/manifests") / f"{settings.unique_name(root, paths, decisive)}.csv"


def scan_dataset(
    paths: Sequence[Path], settings: DataSettings, audit: AuditSettings, progress: bool = False
) -> DatasetScan:
    """Look at every file, correct labels by fix.csv, find issues, and bring exclude.csv up to date.

    Raises:
        DataError: There are no images in class folders, or exclude.csv or fix.csv is damaged.
        StorageError: The caches or exclude.csv cannot be written.
    """
    # Every file, its metadata, and which files are alike.
    tree = discover(paths, settings.rename, group_column=settings.split.group, progress=progress)
    cache_dir = Path(settings.cache.dir)
    tag_cache(cache_dir)
    workers = settings.cache.workers
    metadata = scan_files(tree, cache_dir / "facts", settings.limits, settings.background, workers, progress)
    near_duplicates = known_near_duplicates(metadata, settings.duplicates, cache_dir / "twins", progress)
    # What people wrote: corrections of labels, and images to leave out.
    directory = Path("data/audit") / settings.unique_name(tree.root, paths)
    exclude_path = Path(settings.exclude_path) if settings.exclude_path else directory / "exclude.csv"
    fixes = read_fixes(Path(settings.fix_path) if settings.fix_path else directory / FILE_NAME)
    correction = fixes.applied(tree)
    reasons = {image: f"{fixes.path.name}: {reason}" for image, reason in correction.excluded.items()}
    excluded = read_exclusions(exclude_path).also(reasons)
    issues = find_issues(correction.tree, metadata, near_duplicates, audit, excluded, correction.counts)
    # Read exclude.csv again: a person may have written to it meanwhile.
    exclusions = read_exclusions(exclude_path).updated(issues)
    exclusions.write(exclude_path)
    output_dir = Path(audit.output_dir) if audit.output_dir else directory
    return DatasetScan(correction.tree, metadata, near_duplicates, issues, exclusions, output_dir, fixes, correction)


def prepare(
    paths: Sequence[Path], settings: DataSettings, audit: AuditSettings, progress: bool = False
) -> tuple[Manifest, DatasetScan]:
    """Scan the images, exclude, select, assign splits and write the manifest.

    Images that an earlier manifest knows keep their split.

    Raises:
        DataError: The images cannot be trained on.
        StorageError: The manifest cannot be written.
    """
    scan = scan_dataset(paths, settings, audit, progress)
    unsplit = _selected(scan, settings)
    path = manifest_path(scan.tree.root, paths, settings)
    previous = Manifest.read(path, unsplit.root) if path.exists() else None
    # Images that fix.csv excludes are assigned with the others, then set aside: no other image moves because of them.
    known = with_excluded(previous, path)
    assigned = assign_splits(unsplit, settings.split, known, settings.fold, settings.folds)
    manifest, excluded = split_excluded(assigned, scan.correction)
    _check_classes(manifest)
    # A record must always be in one of the two files: write the new one first, remove the old one last.
    if excluded is not None:
        excluded.write(excluded_records_path(path))
    if previous is None or previous != manifest:  # an unchanged file keeps its date, and may be read-only
        manifest.write(path)
    if excluded is None:
        remove_excluded(path)
    if previous is not None and settings.folds is None:
        _warn_of_kept_split(manifest, scan.tree, settings, path)
    _report(manifest, path)
    if manifest.corrected:
        log.info("%s: %s", scan.fixes.path, issue_counts_text(manifest.corrected))
    return manifest, scan


def all_folds(scan: DatasetScan, settings: DataSettings) -> list[Manifest]:
    """Return the manifests of `data.fold=0` to the last one of `data.folds`; none of them is written.

    Raises:
        DataError: As `prepare`, or a fold would have no image.
    """
    unsplit = _selected(scan, settings)
    folds = range(settings.folds or 0)
    manifests = [
        split_excluded(assign_splits(unsplit, settings.split, None, fold, settings.folds), scan.correction)[0]
        for fold in folds
    ]
    if empty := sum(not len(manifest.indices("val")) for manifest in manifests):
        raise DataError(
            f"{empty} of {len(folds)} folds would have no image",
            f"take at most {len(folds) - empty}; 5 or 10 are usual",
        )
    return manifests


def _warn_of_kept_split(manifest: Manifest, tree: FileTree, settings: DataSettings, path: Path) -> None:
    known = len(manifest.indices("train")) + len(manifest.indices("val"))
    share = len(manifest.indices("val")) / max(1, known)
    given = any(image.split for image in tree.images)  # a val split of the folder may have any size
    if not given and abs(share - settings.split.val) > 0.05:
        log.warning(
            "%s keeps its split: %.0f %% are val, not %.0f %%; delete it for a new split",
            path,
            100 * share,
            100 * settings.split.val,
        )


def load_test_manifest(
    folders: Sequence[Path], limits: DecodeLimits, store_dir: Path, progress: bool = False
) -> Manifest:
    """Return the images to test on, all with the split "test": the test split of a folder that has one, else all of it.

    Raises:
        DataError: There are no images in class folders, or one of them cannot be read.
    """
    tree = discover_test(folders, progress=progress)
    tag_cache(store_dir)
    metadata = scan_files(tree, store_dir / "facts", limits, (255, 255, 255), None, progress)
    if metadata.errors:
        raise unreadable(
            tree.root,
            [UnreadableImage(tree.root / tree.images[row].path, reason) for row, reason in metadata.errors.items()],
        )
    return manifest_of(tree, metadata, np.arange(len(tree.images)))


def _selected(scan: DatasetScan, settings: DataSettings) -> Manifest:
    """Return the images to split, in groups: readable, not excluded by exclude.csv, and selected by `data.classes`.

    Images that fix.csv excludes are among them, so that no other image moves because of them.
    """
    tree, metadata = scan.tree, scan.metadata
    _refuse_empty(tree, settings)
    if scan.audit.unmatched:
        log.warning("%s: there is no image %s", scan.exclusions.path, listed(list(map(repr, scan.audit.unmatched))))
    excluded = scan.exclusions.covers([image.path for image in tree.images])
    _refuse_unreadable(scan, excluded)
    if excluded.any():
        log.warning("%s excluded by %s", counted(int(excluded.sum()), "image"), scan.exclusions.path)
    # Groups first: an excluded image may link two that stay.
    rows = np.flatnonzero(metadata.readable)
    manifest = _grouped(manifest_of(tree, metadata, rows), scan, rows, settings)
    manifest = manifest.take(np.flatnonzero(~excluded[rows]))
    # `data.classes.exclude` may name a class that has no image left.
    gone = {*(image.label for image in tree.images), *_empty_classes(tree, settings)} - set(manifest.classes)
    classes = replace(settings.classes, exclude=[name for name in settings.classes.exclude if name not in gone])
    chosen = select(manifest.targets, manifest.classes, manifest.splits, manifest.digests, classes, settings.split.seed)
    if chosen.summary:
        log.info("%s", chosen.summary)
    manifest = manifest.take(chosen.rows)
    _check_classes(split_excluded(manifest, scan.correction)[0])
    return replace(manifest, corrected=scan.correction.counts)


def _refuse_unreadable(scan: DatasetScan, excluded: np.ndarray) -> None:
    """Raise DataError for unreadable images that neither exclude.csv (bool [N]) nor fix.csv excludes."""
    tree, corrected = scan.tree, scan.correction.excluded
    errors = {
        tree.images[row].path: reason
        for row, reason in scan.metadata.errors.items()
        if not excluded[row] and tree.images[row].path not in corrected
    }
    if errors:
        raise unreadable(tree.root, [UnreadableImage(tree.root / path, reason) for path, reason in errors.items()])


def manifest_of(tree: FileTree, metadata: FileMetadata, rows: np.ndarray) -> Manifest:
    """Return some images of the tree as records, each a group of its content, in the splits that the tree gives."""
    images = [tree.images[row] for row in rows.tolist()]
    classes = tuple(sorted({image.label for image in images}))
    index = {label: code for code, label in enumerate(classes)}
    codes = {split: code for code, split in enumerate(SPLITS)} | {"": -1}
    digests = metadata.digests[rows]
    return Manifest(
        root=tree.root,
        paths=Texts.of(image.path for image in images),
        classes=classes,
        targets=np.array([index[image.label] for image in images], dtype=np.int64),
        splits=np.array([codes[image.split] for image in images], dtype=np.int8),
        groups=content_names(digests),
        digests=digests,
        widths=metadata.widths[rows],
        heights=metadata.heights[rows],
    )


def _empty_classes(tree: FileTree, settings: DataSettings) -> dict[str, str]:
    """Return the class folders without images, by class name."""
    names = {folder.rpartition("/")[2]: folder for folder in tree.empty}
    return {settings.rename.get(name, name): folder for name, folder in names.items()}


def _refuse_empty(tree: FileTree, settings: DataSettings) -> None:
    """Raise DataError for a class folder without images, unless `data.classes` leaves the class out."""
    for label, folder in _empty_classes(tree, settings).items():
        if label not in settings.classes.exclude and (
            settings.classes.include is None or label in settings.classes.include
        ):
            hint = f"add images to it, remove the folder, or leave it out with data.classes.exclude=[{label}]"
            raise DataError(f"the class folder {str(tree.root / folder)!r} holds no images", hint)


def _check_classes(manifest: Manifest) -> None:
    """Check that there are two classes to train on, and none that only val or test has."""
    trained = {manifest.classes[code] for code in np.unique(manifest.targets[manifest.splits <= 0]).tolist()}
    if len(trained) < 2:
        named = f"one class only, {next(iter(trained))!r}" if trained else "no class to train on"
        raise DataError(f"{str(manifest.root)!r} holds {named}", "a classifier needs images of two or more classes")
    for code in np.unique(manifest.targets).tolist():
        label = manifest.classes[code]
        if label not in trained:
            split = SPLITS[int(manifest.splits[np.flatnonzero(manifest.targets == code)[0]])]
            fact = f"the {split} split of {str(manifest.root)!r} has the class {label!r}, which the train split lacks"
            hint = f"add training images of it, or leave it out with data.classes.exclude=[{label}]"
            raise DataError(fact, hint)


def _grouped(manifest: Manifest, scan: DatasetScan, rows: np.ndarray, settings: DataSettings) -> Manifest:
    """Return the manifest with copies, near-duplicates and images of one key in one group each.

    `rows`, int64, are the manifest's rows in the tree.
    """
    position = np.full(len(scan.tree.images), -1, dtype=np.int64)
    position[rows] = np.arange(len(rows))
    keys: Sequence[str] | None = None
    if settings.split.group:
        keys = [scan.tree.images[row].key for row in rows.tolist()]
        keys = keys if any(keys) else group_keys(manifest.paths, settings.split.group)
    pairs = scan.near_duplicates
    return join_groups(manifest, position[pairs.first], position[pairs.second], keys)


def _report(manifest: Manifest, path: Path) -> None:
    counts = Counter(manifest.splits.tolist())
    sizes = ", ".join(f"{split} {counts[code]}" for code, split in enumerate(SPLITS))
    log.info("%d images, %d classes: %s (%s)", len(manifest), len(manifest.classes), sizes, path)
    for split in ("val", "test"):
        leaked = int(manifest.leaked(split).sum())
        if leaked:
            log.warning(
                "%d of %d %s images have a copy, a near-duplicate or an image of their group in train: "
                "their scores are too good",
                leaked,
                counts[SPLITS.index(split)],
                split,
            )
