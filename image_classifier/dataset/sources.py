"""Sources of data sets: each one, called, returns folder-per-class trees or tables, and does its work only once."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from image_classifier.atomic_io import link_or_copy
from image_classifier.dataset.discovery import list_folder
from image_classifier.errors import ConfigError, SourceError
from image_classifier.progress import with_bar
from image_classifier.sources.addresses import shown
from image_classifier.sources.archive import UnpackLimits, is_archive_name, stem
from image_classifier.sources.download import Download, DownloadSettings, is_of_the_disk
from image_classifier.sources.dvc import pull_missing
from image_classifier.sources.folders import expanded
from image_classifier.sources.hub import fetch_from_hub, folder_name, is_hub_name
from image_classifier.sources.suffixes import ARCHIVE_SUFFIXES
from image_classifier.sources.table import is_table
from image_classifier.sources.unpack import new_tree, unpack_once

log = logging.getLogger(__name__)

Names = str | Sequence[str] | None  # one, several or none
_UNPACK = UnpackLimits()
_DOWNLOAD = DownloadSettings()


class IndexedImages(Protocol):
    """The interface of torchvision's data sets: (picture, class index) by number, and the names of the classes."""

    classes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1 797 handwritten digits as 8 x 8 grey PNG under `dir/{train,test}/{0..9}/`.

    Every fifth image of a class is test.
    """

    dir: str

    def __call__(self) -> Path:
        with _written_once(Path(self.dir)) as folder:
            if folder:
                _write_digits(folder)
        return Path(self.dir)


@dataclass(frozen=True)
class Folder:
    """The user's images: a folder, a table (.csv, .tsv, .parquet), an archive, its URL, a name of a hub, or several.

    Args:
        dir: Names any of these.
        archive: The same; the key for those that have to be unpacked.
        sha256: Of each archive, compared before it is unpacked.
        dvc: `data.dvc`, see `dvc.pull_missing`.
        inner: Name of the folder that holds the classes, if it has neighbours.
        unpack_dir: Where archives are unpacked, once.
        downloads_dir: Where URLs are downloaded to.
        search: Folders in which a relative archive is looked for if it is not in the working directory.
        hint: Where to get the data set.
        unpack: Limits of an archive; set from `data.unpack`.
        download: Rules of a download; set from `data.download`.
    """

    dir: Names = None
    archive: Names = None
    sha256: Names = None
    dvc: bool | None = None
    inner: str | None = None
    unpack_dir: str = "data"
    downloads_dir: str = "data/downloads"
    search: Sequence[str] = ()
    hint: str = ""
    unpack: UnpackLimits = _UNPACK
    download: DownloadSettings = _DOWNLOAD

    def __call__(self) -> Path | list[Path]:
        """Return the folder of class (or split) folders, or the table; a list of them if several were named.

        Raises:
            ConfigError: Neither a folder nor an archive was named, or not one sha256 for each.
            SourceError: It does not exist and cannot be fetched, or the archive is damaged, unsafe or too large.
            StorageError: No space or no permission to unpack.
        """
        given = _listed(self.dir) or _listed(self.archive)
        if not given:
            raise ConfigError("data.dir is not set", self.hint or "pass data.dir=FOLDER or data.archive=FILE.tar.gz")
        sums = _listed(self.sha256) or [""] * len(given)
        if len(sums) != len(given):
            raise ConfigError(
                f"data.sha256 has {len(sums)} entries for {len(given)} archives", "give one for each, in their order"
            )
        roots = [self._root(name, sha256) for name, sha256 in zip(given, sums, strict=True)]
        return roots[0] if len(roots) == 1 else roots

    def _root(self, name: str, sha256: str) -> Path:
        if is_hub_name(name):
            return self._inside(fetch_from_hub(name, Path(self.unpack_dir)))
        if "://" in name:
            return self._inside(self._from_web(name, sha256))
        path = self._located(name)
        if is_archive_name(path.name) and path.is_file():
            return self._inside(unpack_once(path, Path(self.unpack_dir), sha256, self.unpack))
        if sha256:
            raise ConfigError(
                f"data.sha256 is for archives, but {str(path)!r} is not one",
                f"the suffixes of archives are {', '.join(ARCHIVE_SUFFIXES)}",
            )
        if path.is_dir():
            return self._inside(path)
        if is_table(path):
            return path
        hint = f"data.archive takes {', '.join(ARCHIVE_SUFFIXES)}, and data.dir .csv, .tsv and .parquet too"
        raise SourceError(f"{str(path)!r} is neither a folder nor an archive nor a table", hint)

    def _from_web(self, url: str, sha256: str) -> Path:
        name = PurePosixPath(unquote(urlsplit(url).path)).name
        if not is_archive_name(name):
            hint = "download it by hand and pass data.archive=FILE.tar.gz"
            raise SourceError(f"the name of {shown(url)!r} is not that of an archive", hint)
        # The URL is part of the name: two hosts may both have a data.zip.
        name = f"{stem(name)}-{hashlib.sha256(url.encode()).hexdigest()[:8]}{name[len(stem(name)) :]}"
        checksum = f"sha256:{sha256}" if sha256 else ""
        allow_private = self.download.allow_private
        path = Download(url, Path(self.downloads_dir) / name, checksum, allow_private=allow_private)()
        try:
            return unpack_once(path, Path(self.unpack_dir), sha256, self.unpack)
        except SourceError as error:
            raise SourceError(error.fact, f"{error.hint}; delete {str(path)!r} to have it fetched again") from error

    def _located(self, given: str) -> Path:
        path = Path(expanded(given))
        candidates = (
            [path] if self.dir or path.is_absolute() else [path, *(Path(folder) / path for folder in self.search)]
        )
        for candidate in candidates:
            if self.dvc is not False:
                pull_missing(candidate)
            if candidate.exists():
                return candidate
        if self.dvc:
            pull_missing(path, enabled=True)
            return path
        raise SourceError(f"{given!r} does not exist", self.hint or _nearest(path))

    def _inside(self, root: Path) -> Path:
        if self.inner and root.is_dir():
            for folder, folders, _ in os.walk(root):
                folders.sort()  # or the disk's order would decide between two of the name
                if self.inner in folders:
                    return unwrapped(Path(folder) / self.inner)
        return unwrapped(root)


@dataclass(frozen=True)
class Hub:
    """A data set of a hub by its name; `kind` is hf or kaggle. See `hub.fetch_from_hub`."""

    name: str | None
    kind: str
    unpack_dir: str = "data"
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None

    def __call__(self) -> Path:
        """Return the folder of images by class.

        Raises:
            ConfigError: The name or a column is invalid.
            SourceError: The client is not installed, there is no network, or the data set is not available.
            StorageError: No space or no permission.
        """
        if not self.name:
            raise ConfigError("data.dir is not set", f"pass data.dir={self.kind}:OWNER/NAME")
        name = self.name if is_hub_name(self.name) else f"{self.kind}:{self.name}"
        return unwrapped(
            fetch_from_hub(name, Path(self.unpack_dir), self.revision, self.image_column, self.label_column)
        )


@dataclass(frozen=True)
class TorchvisionDataset:
    """A data set of torchvision (or one like it), written once under `dir/{train,val,test}/<class>/`.

    Its files are kept as they are; images that are not files become PNG.

    Args:
        dir: Where the images go.
        train, val, test: Return the data set when called with `root` and `download`.
        files: Files to download before torchvision looks for them, so that a download can be resumed: url, md5, and
            path below torchvision's root.
        archive: A folder-per-class archive that replaces all of it.
        sha256, dvc, unpack_dir, downloads_dir, search, unpack, download: See `Folder`.
    """

    dir: str
    train: Callable[..., IndexedImages]
    val: Callable[..., IndexedImages] | None = None
    test: Callable[..., IndexedImages] | None = None
    files: Sequence[Mapping[str, str]] = ()
    archive: Names = None
    sha256: Names = None
    dvc: bool | None = None
    unpack_dir: str = "data"
    downloads_dir: str = "data/downloads"
    search: Sequence[str] = ()
    unpack: UnpackLimits = _UNPACK
    download: DownloadSettings = _DOWNLOAD

    def __call__(self) -> Path | list[Path]:
        """Return the folder of images, or the unpacked archive.

        Raises:
            SourceError: The download failed.
            StorageError: No space or no permission.
        """
        if self.archive:
            return Folder(
                archive=self.archive,
                sha256=self.sha256,
                dvc=self.dvc,
                unpack_dir=self.unpack_dir,
                downloads_dir=self.downloads_dir,
                search=self.search,
                unpack=self.unpack,
                download=self.download,
            )()
        with _written_once(Path(self.dir)) as folder:
            if folder:
                # Inside the new folder: torchvision may be killed while it unpacks.
                with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
                    self._write(folder, Path(scratch))
        return Path(self.dir)

    def _write(self, folder: Path, scratch: Path) -> None:
        for position, file in enumerate(self.files):
            path = Path(self.downloads_dir) / file["path"]
            try:
                Download(file["url"], path, f"md5:{file['md5']}", allow_private=self.download.allow_private)()
            except SourceError as error:
                later = [
                    f"{more['url']} to {str(Path(self.downloads_dir) / more['path'])!r}"
                    for more in self.files[position + 1 :]
                ]
                raise SourceError(error.fact, "; also ".join([error.hint, *later])) from error
            link_or_copy(path, scratch / file["path"])
        for name, factory in (("train", self.train), ("val", self.val), ("test", self.test)):
            if factory:
                _write_images(_built(factory, scratch), folder / name)


def deferred(factory: str, **arguments: Any) -> Callable[..., Any]:
    """Return a function that builds a data set of `torchvision.datasets`: naming it in a config imports no torch."""
    if not factory.startswith("torchvision.datasets."):
        raise ConfigError(f"{factory!r} is not in torchvision.datasets", "write factory: torchvision.datasets.NAME")

    def call(**defaults: Any) -> Any:
        module, _, name = factory.rpartition(".")
        return getattr(importlib.import_module(module), name)(**{**defaults, **arguments})

    return call


def unwrapped(root: Path) -> Path:
    """Return the folder below single wrapping folders: `root/flowers` for an archive's `flowers/rose/1.jpg`.

    A folder whose only sub-folder holds images is kept: that one is a class.
    """
    while True:
        outer = list_folder(root)
        if len(outer.folders) != 1 or outer.images:
            return root
        inner = list_folder(root / outer.folders[0])
        if inner.images or not inner.folders:
            return root
        root = root / outer.folders[0]


def _write_digits(root: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    for number, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        split = "test" if seen[label] % 5 == 4 else "train"
        seen[label] += 1
        folder = root / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = np.rint(image * (255 / 16)).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{number:04d}.png")


def _write_images(images: IndexedImages, folder: Path) -> None:
    names = [folder_name(name) for name in images.classes]
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    files = _files_of(images)
    numbers: Iterable[int] = range(len(images))
    if os.isatty(2):
        numbers = with_bar(numbers, f"writing {folder.name}", len(images))
    for number in numbers:
        if files:
            path, label = files[number]
            link_or_copy(Path(path), folder / names[label] / f"{number:06d}{Path(path).suffix.lower()}")
        else:
            picture, label = images[number]
            picture.save(folder / names[label] / f"{number:06d}.png")


def _files_of(images: IndexedImages) -> list[tuple[str | Path, int]]:
    """Return path and class index of each image if the data set is files on the disk, which then are not decoded."""
    samples = getattr(images, "samples", None)  # ImageFolder and its subclasses
    if samples is None:
        paths = getattr(images, "_image_files", None) or getattr(images, "_images", None) or []
        samples = list(zip(paths, getattr(images, "_labels", []), strict=False))
    complete = len(samples) == len(images) and all(
        isinstance(path, (str, Path)) and isinstance(label, int) for path, label in samples
    )
    return list(samples) if complete else []


def _built(factory: Callable[..., IndexedImages], scratch: Path) -> IndexedImages:
    try:
        return factory(root=str(scratch), download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; torchvision raises RuntimeError for damage
        if is_of_the_disk(error):
            raise
        hint = "no network? pass data.archive=PATH, a .tar.gz or .zip with one folder per class"
        raise SourceError(f"the data set could not be downloaded ({str(error)[:120]})", hint) from error


def _listed(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else [str(name) for name in names or ()]


@contextmanager
def _written_once(path: Path) -> Iterator[Path | None]:
    """Yield a new folder that becomes `path` if the block succeeds; None if `path` exists already."""
    if path.is_dir() and any(path.iterdir()):
        yield None
        return
    log.info("writing the images once to %s", path)
    with new_tree(path) as folder:
        yield folder


def _nearest(path: Path) -> str:
    """Return a hint for a path that does not exist: the name most like the first part of it that does not exist."""
    while not path.parent.exists():
        path = path.parent
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {str(path.parent / close[0])!r}?" if close else "check data.dir or data.archive"
