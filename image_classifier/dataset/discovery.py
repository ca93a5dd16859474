"""Finding the images of folder-per-class trees, of trees with train/ [val/] test/ and of tables; no file is opened."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import NoReturn

from image_classifier.errors import ConfigError, DataError, UnreadableImage
from image_classifier.images import is_image_name
from image_classifier.progress import with_bar
from image_classifier.sources.folders import is_folder, visible_entries, walk
from image_classifier.sources.table import SPLIT_NAMES, TableRow, is_table, read_table
from image_classifier.text import listed

log = logging.getLogger(__name__)

_TREE_HINT = "give each class its own sub-folder: FOLDER/cat/1.jpg, FOLDER/dog/2.jpg"
_GONE = -1  # size and times of a file that cannot be looked at, such as a broken link


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image on disk.

    `path` is relative to the tree's root, in posix form; `split` is "" where neither folder nor table gives it; `size`
    is in bytes, `mtime_ns` and `ctime_ns` in nanoseconds, all three -1 if the file cannot be looked at; `key` is the
    value of a table's group column.
    """

    path: str
    label: str
    split: str
    size: int
    mtime_ns: int
    key: str = ""
    ctime_ns: int = 0


@dataclass(frozen=True)
class FileTree:
    """The files below `root`: images sorted by path, and everything else.

    `strays` are visible files that are no images by name or are in no class, `empty` class folders without an image,
    `ignored` folders next to train/, val/ and test/; all relative to `root` and sorted.
    """

    root: Path
    images: tuple[ImageFile, ...]
    strays: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """Names of the visible sub-folders, images and other files of one folder, sorted."""

    folders: list[str]
    images: list[str]
    others: list[str]


SplitFolders = dict[str, str]  # folder name -> split; {"": ""} for a folder that holds classes itself


def discover(
    paths: Sequence[Path],
    rename: Mapping[str, str] | None = None,
    progress: bool = False,
    group_column: str | None = None,
) -> FileTree:
    """Return all images of some folders and tables; classes of the same (renamed) name are one.

    Args:
        paths: Folders of class folders, folders of train/ [val/] test/, or tables (see `table.read_table`). The root of
            the tree is the one folder, or the folder that all have in common.
        rename: New class names by those in the folders and tables.
        progress: Whether to show a bar on standard error.
        group_column: The column of a table that `ImageFile.key` comes from.

    Raises:
        ConfigError: A folder is named twice or is inside another, or `rename` names no class.
        DataError: A folder or table cannot be read, holds no images or no classes, or a class name is not UTF-8.
    """
    sources = _Sources(paths, group_column)
    finder = _Finder(sources, [(folder, _split_folders(folder)) for folder in sources.folders], sources.rows, progress)
    if rename:
        _check_renamed(rename, {image.label for image in finder.images})
    if finder.ignored:
        log.warning("%s: not part of any split and skipped: %s", sources.root, ", ".join(sorted(finder.ignored)))
    return finder.tree(rename or {})


def discover_test(
    paths: Sequence[Path],
    rename: Mapping[str, str] | None = None,
    progress: bool = False,
    group_column: str | None = None,
) -> FileTree:
    """Return the images to test on, all with the split "test".

    They are the test splits of the folders and tables if there are any, else all images.

    Raises:
        ConfigError: As `discover`, except that `rename` may name classes that are not tested.
        DataError: As `discover`.
    """
    sources = _Sources(paths, group_column)
    folders = [(folder, parts) for folder in sources.folders if (parts := _test_folders(folder))]
    rows = [row for row in sources.rows if row.split == "test"]
    if not folders and not rows:
        folders, rows = [(folder, _split_folders(folder)) for folder in sources.folders], sources.rows
    tree = _Finder(sources, folders, rows, progress).tree(rename or {})
    return replace(tree, images=tuple(replace(image, split="test") for image in tree.images))


def unreadable(root: Path, failures: Sequence[UnreadableImage]) -> DataError:
    """Return one error for all files that cannot be read; it names the first three."""
    if len(failures) == 1:
        return UnreadableImage(failures[0].path, failures[0].reason, "delete or replace it")
    named = listed([f"{failure.path!r} ({failure.reason})" for failure in failures], limit=3)
    return DataError(f"{len(failures)} images under {str(root)!r} cannot be read: {named}", "delete or replace them")


def list_folder(folder: Path) -> Listing:
    """Return what is directly in a folder; DataError if it cannot be read."""
    listing = Listing([], [], [])
    try:
        entries = visible_entries(folder)
    except OSError as error:
        raise _unreadable_folder(folder, error) from error
    for entry in entries:
        if is_folder(entry):
            listing.folders.append(entry.name)
        elif is_image_name(entry.name):
            listing.images.append(entry.name)
        else:
            listing.others.append(entry.name)
    for names in (listing.folders, listing.images, listing.others):
        names.sort()
    return listing


def _unreadable_folder(folder: str | Path, error: OSError) -> DataError:
    fact = f"cannot read the folder {str(folder)!r} ({error.strerror})"
    return DataError(fact, "check the path and its permissions")


def _split_folders(folder: Path) -> SplitFolders:
    """Return the folders train/, val/ and test/ of a tree that has them.

    Without sub-folders or others of their kind, a folder called "train" is a class of trains.
    """
    top = list_folder(folder)
    parts = {name: SPLIT_NAMES[name.lower()] for name in top.folders if name.lower() in SPLIT_NAMES}
    train = [name for name, split in parts.items() if split == "train"]
    alone = len(parts) == 1 and len(top.folders) > 1
    if not train or alone or not all(list_folder(folder / name).folders for name in train):
        return {"": ""}
    return parts


def _test_folders(folder: Path) -> SplitFolders:
    names = [name for name in list_folder(folder).folders if SPLIT_NAMES.get(name.lower()) == "test"]
    return {name: "test" for name in names if list_folder(folder / name).folders}


class _Sources:
    """The folders and table rows of some paths, and the folder `root` (absolute: `base`) that contains them all."""

    def __init__(self, paths: Sequence[Path], group_column: str | None) -> None:
        if not paths:
            raise ConfigError("no folder of images is given", "pass data.dir=FOLDER")
        self.folders = [path for path in paths if not is_table(path)]
        tables = [path for path in paths if is_table(path)]
        _check_apart(self.folders)
        _check_apart(tables)
        self.rows = [row for table in tables for row in read_table(table, group_column)]
        given = [*self.folders, *(table.parent for table in tables)]
        self.base = os.path.commonpath([*map(_absolute, given), *{os.path.dirname(row.path) for row in self.rows}])
        same = [folder for folder in given if _absolute(folder) == self.base]
        absolute = any(path.is_absolute() for path in paths)
        self.root = same[0] if same else Path(self.base if absolute else os.path.relpath(self.base))

    def relative(self, path: str) -> str:
        """Return an absolute path below the root, relative to it; "" for the root itself."""
        return path[len(self.base.rstrip("/")) + 1 :]


def _absolute(path: Path) -> str:
    return os.path.realpath(path) if ".." in path.parts else os.path.abspath(path)


def _check_apart(paths: Sequence[Path]) -> None:
    """Raise ConfigError if a path is another or is inside it: its images would count twice."""
    real = [os.path.realpath(path) for path in paths]
    for i, inner in enumerate(real):
        for k, outer in enumerate(real):
            if i != k and os.path.commonpath([inner, outer]) == outer:
                fact = (
                    f"{str(paths[i])!r} is named twice"
                    if inner == outer
                    else f"{str(paths[i])!r} is inside {str(paths[k])!r}"
                )
                raise ConfigError(f"data.dir: {fact}", "name each folder once")


class _Finder:
    """Lists the files of folders and rows once; paths are relative to the root of the sources."""

    def __init__(
        self, sources: _Sources, folders: Sequence[tuple[Path, SplitFolders]], rows: Iterable[TableRow], progress: bool
    ) -> None:
        self.sources = sources
        self.images: list[ImageFile] = []
        self.strays: list[str] = []
        self.empty: list[str] = []
        self.ignored: list[str] = []
        classes = [entry for folder, parts in folders for entry in self._classes(folder, parts)]
        for folder, label, split in with_bar(classes, "finding images", len(classes)) if progress else classes:
            self._add_class(folder, label, split)
        for row in rows:
            self.images.append(_image(sources.relative(row.path), row.label, row.split, row.status, row.key))

    def tree(self, rename: Mapping[str, str]) -> FileTree:
        """Return the files, in order; DataError if there are none, or one of them twice."""
        images = sorted(self.images, key=attrgetter("path"))
        if rename:
            images = [replace(image, label=rename.get(image.label, image.label)) for image in images]
        if not images:
            raise DataError(f"{str(self.sources.root)!r} holds no images", _TREE_HINT)
        for image, following in pairwise(images):
            if image.path == following.path:
                raise DataError(
                    f"the image {str(self.sources.root / image.path)!r} is given twice",
                    "name each folder and each image once",
                )
        _check_names({image.label for image in images}, self.sources.root)
        return FileTree(
            self.sources.root,
            tuple(images),
            *(tuple(sorted(names)) for names in (self.strays, self.empty, self.ignored)),
        )

    def _classes(self, folder: Path, split_folders: SplitFolders) -> Iterator[tuple[str, str, str]]:
        """Yield path, label and split of each class folder of one tree; note other files and folders."""
        base = _absolute(folder)
        if "" not in split_folders:
            top = list_folder(folder)
            self.strays += self._inside(base, top.images + top.others)
            self.ignored += self._inside(base, [name for name in top.folders if name not in split_folders])
        for name, split in split_folders.items():
            inner = list_folder(folder / name)
            _check_class_folders(folder / name, inner)
            path = os.path.join(base, name) if name else base
            self.strays += self._inside(path, inner.images + inner.others)
            for label in inner.folders:
                yield os.path.join(path, label), label, split

    def _inside(self, folder: str, names: Iterable[str]) -> list[str]:
        return [self.sources.relative(os.path.join(folder, name)) for name in names]

    def _add_class(self, folder: str, label: str, split: str) -> None:
        """Add everything below one class folder."""

        def refuse(path: str, error: OSError) -> NoReturn:
            raise _unreadable_folder(path, error) from error

        before = len(self.images)
        for entry in walk(folder, refuse):
            path = self.sources.relative(entry.path)
            if is_image_name(entry.name):
                self.images.append(_image(path, label, split, _status(entry)))
            else:
                self.strays.append(path)
        if len(self.images) == before:
            self.empty.append(self.sources.relative(folder))


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:  # reading the file later reports it
        return None


def _image(path: str, label: str, split: str, status: os.stat_result | None, key: str = "") -> ImageFile:
    if status is None:
        return ImageFile(path, label, split, _GONE, _GONE, key, _GONE)
    return ImageFile(path, label, split, status.st_size, status.st_mtime_ns, key, status.st_ctime_ns)


def _check_class_folders(folder: Path, listing: Listing) -> None:
    if not listing.folders:
        fact = (
            f"the images are directly in {str(folder)!r}, not in class folders"
            if listing.images
            else f"{str(folder)!r} holds no images"
        )
        raise DataError(fact, _TREE_HINT)
    if listing.images:
        log.warning(
            "%s: %d images next to the class folders belong to no class and are skipped", folder, len(listing.images)
        )


def _check_names(labels: Iterable[str], root: Path) -> None:
    for label in labels:
        if any("\ud800" <= letter <= "\udfff" for letter in label):
            fact = f"the name of the class {label!r} in {str(root)!r} is not UTF-8"
            raise DataError(fact, "rename it: classes are written into JSON and ONNX")


def _check_renamed(rename: Mapping[str, str], labels: Iterable[str]) -> None:
    """Raise ConfigError for a name in `rename` that no class has, or an empty new name."""
    labels = sorted(labels)
    for old, new in rename.items():
        if old not in labels:
            close = difflib.get_close_matches(old, labels, n=1)
            raise ConfigError(
                f"data.rename has {old!r}, which is not a class",
                f"did you mean {close[0]!r}?" if close else f"classes: {listed(labels)}",
            )
        if not new.strip():
            raise ConfigError(f"data.rename gives {old!r} no name", "data.classes.exclude leaves a class out")
