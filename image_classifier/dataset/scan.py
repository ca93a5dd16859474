"""Reading a folder-per-class tree, or one with train/ [val/] test/ inside, into a Manifest."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from image_classifier.errors import DataError, UnreadableImage
from image_classifier.images import is_image_name, load_bytes, read_size
from image_classifier.records import Manifest, Record

log = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_JUNK_FOLDERS = frozenset({"__MACOSX", "__pycache__", "lost+found"})
_TREE_HINT = "give each class its own sub-folder: FOLDER/cat/1.jpg, FOLDER/dog/2.jpg"


@dataclass(frozen=True, slots=True)
class _Found:
    """One image on disk: `path` relative to the root, in posix form; `split` is "" where the tree does not say."""

    path: str
    label: str
    split: str


def scan(root: Path, progress: bool = False) -> Manifest:
    """All images under `root`, sorted by path; a record's split is "" until `assign_splits` deals it.

    Raises:
        DataError: The tree holds no images, no class folders, an empty class or fewer than two classes; the test part knows
            a class that the train part lacks; or several files cannot be read.
        UnreadableImage: One file cannot be read.
    """
    found = _find(root)
    classes = {image.label for image in found if image.split in ("", "train")}
    if len(classes) < 2:
        raise DataError(f"{str(root)!r} holds one class only, {next(iter(classes))!r}", "a classifier needs images of two or more classes")
    for image in found:
        if image.label not in classes:
            fact = f"the {image.split} part of {str(root)!r} has the class {image.label!r}, which the train part lacks"
            raise DataError(fact, "add training images of it or remove the folder")
    return Manifest(root, _records(root, found, progress))


def load_test_manifest(root: Path, progress: bool = False) -> Manifest:
    """The images to test on, every record in the split "test": the tree's own test part where it has one, else all of it.

    Raises:
        DataError: As `scan`, except that one class is enough: the caller compares the classes with the model's.
    """
    folder = list_folder(root)
    test_folders = [name for name in folder.folders if SPLIT_FOLDERS.get(name.lower()) == "test" and list_folder(root / name).folders]
    found = [image for name in test_folders for image in _find_classes(root, name, "test")] or _find(root)
    found = [_Found(image.path, image.label, "test") for image in sorted(found, key=lambda image: image.path)]
    return Manifest(root, _records(root, found, progress))


def unreadable(root: Path, failures: Sequence[UnreadableImage]) -> DataError:
    """One line for all files that cannot be read: the first three by name."""
    hint = "delete or replace it" if len(failures) == 1 else "delete or replace them"
    if len(failures) == 1:
        return UnreadableImage(failures[0].path, failures[0].reason, hint)
    named = ", ".join(f"{failure.path!r} ({failure.reason})" for failure in failures[:3])
    more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
    return DataError(f"{len(failures)} images under {str(root)!r} cannot be read: {named}{more}", hint)


def _find(root: Path) -> list[_Found]:
    """Every image of the tree with its label and given split, sorted by path; DataError where the tree is not one."""
    top = list_folder(root)
    parts = _split_parts(root, top)
    if parts:
        ignored = [name for name in top.folders if name not in parts]
        found = [image for name, split in parts.items() for image in _find_classes(root, name, split)]
    else:
        ignored = []
        found = _find_classes(root, "", "")
    if ignored:
        log.warning("%s: not part of any split and left out: %s", root, ", ".join(ignored))
    return sorted(found, key=lambda image: image.path)


def _split_parts(root: Path, top: Listing) -> dict[str, str]:
    """Folder name -> split where the tree is given in parts, else nothing: then a folder called "train" is a class of trains."""
    parts = {name: SPLIT_FOLDERS[name.lower()] for name in top.folders if name.lower() in SPLIT_FOLDERS}
    train = [name for name, split in parts.items() if split == "train"]
    alone = len(parts) == 1 and len(top.folders) > 1
    if not train or alone or not all(list_folder(root / name).folders for name in train):
        return {}
    return parts


def _find_classes(root: Path, part: str, split: str) -> list[_Found]:
    """The images of each class folder directly in `root/part`."""
    folder = root / part
    top = list_folder(folder)
    if not top.folders:
        if top.images:
            raise DataError(f"the images lie directly in {str(folder)!r}, not in class folders", _TREE_HINT)
        raise DataError(f"{str(folder)!r} holds no images", _TREE_HINT)
    if top.images:
        log.warning("%s: %d images beside the class folders belong to no class and are left out", folder, len(top.images))
    found: list[_Found] = []
    for label in top.folders:
        if any("\ud800" <= letter <= "\udfff" for letter in label):
            raise DataError(f"the name of the class folder {str(folder / label)!r} is not UTF-8", "rename it: classes are written into JSON and ONNX")
        paths = list(_walk(folder / label, f"{part}/{label}" if part else label, ()))
        if not paths:
            raise DataError(f"the class folder {str(folder / label)!r} holds no images", "add images to it or remove the folder")
        found += [_Found(path, label, split) for path in paths]
    return found


def _walk(folder: Path, relative: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Relative paths of the images under `folder`; links are followed, but never in a circle."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    listing = list_folder(folder)
    yield from (f"{relative}/{name}" for name in listing.images)
    for name in listing.folders:
        yield from _walk(folder / name, f"{relative}/{name}", (*above, identity))


@dataclass(frozen=True, slots=True)
class Listing:
    """Names of the visible sub-folders and images of one folder, sorted."""

    folders: list[str]
    images: list[str]


def list_folder(folder: Path) -> Listing:
    """What `folder` itself shows of sub-folders and images; DataError where it cannot be read."""
    listing = Listing([], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                _sort_in(entry, listing)
    except OSError as error:
        raise DataError(f"cannot read the folder {str(folder)!r} ({error.strerror})", "check the path and its permissions") from error
    listing.folders.sort()
    listing.images.sort()
    return listing


def _sort_in(entry: os.DirEntry[str], listing: Listing) -> None:
    if entry.name.startswith(".") or entry.name in _JUNK_FOLDERS:
        return
    if entry.is_dir():
        listing.folders.append(entry.name)
    elif is_image_name(entry.name):
        listing.images.append(entry.name)


def _records(root: Path, found: Sequence[_Found], progress: bool) -> tuple[Record, ...]:
    failures: list[UnreadableImage] = []
    records: list[Record] = []
    for result in _read_all(root, found, progress):
        failures.append(result) if isinstance(result, UnreadableImage) else records.append(result)
    if failures:
        raise unreadable(root, failures)
    return tuple(records)


def _read_all(root: Path, found: Sequence[_Found], progress: bool) -> Iterable[Record | UnreadableImage]:
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) * 2)) as pool:
        blocks = [found[start : start + 64] for start in range(0, len(found), 64)]  # a task a file would cost more than the file
        results = pool.map(lambda block: [_read(root, image) for image in block], blocks)
        for block in track(results, "reading images", total=len(blocks), disable=not progress, transient=True):
            yield from block


def _read(root: Path, image: _Found) -> Record | UnreadableImage:
    path = root / image.path
    try:
        content = load_bytes(path)
        width, height = read_size(content)
    except UnreadableImage as error:
        return UnreadableImage(path, error.reason)
    digest = hashlib.sha256(content).hexdigest()
    return Record(image.path, image.label, image.split, digest[:16], digest, width, height)
