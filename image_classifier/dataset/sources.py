"""Where a data set comes from: each source, called, returns the paths of folder-per-class trees or tables and does its work only once."""

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
from image_classifier.sources.download import Download, is_of_the_disk, shown
from image_classifier.sources.dvc import pull_missing
from image_classifier.sources.hub import fetch_from_hub, folder_name, is_hub_name
from image_classifier.sources.table import is_table
from image_classifier.sources.unpack import SUFFIXES, is_archive, new_tree, stem, unpack_once

log = logging.getLogger(__name__)

Names = str | Sequence[str] | None  # one, several or none


class IndexedImages(Protocol):
    """What torchvision's data sets look like: (picture, class index) by number, and the classes' names."""

    classes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1 797 handwritten digits, 8 x 8 grey PNG, under `dir/{train,test}/{0..9}/`; every fifth of a class is test."""

    dir: str

    def __call__(self) -> Path:
        with _written_once(Path(self.dir)) as part:
            if part:
                _write_digits(part)
        return Path(self.dir)


@dataclass(frozen=True)
class Folder:
    """Images of one's own: `dir` or `archive` names a folder, a table (.csv, .tsv, .parquet), an archive, its URL, a hub's name, or several.

    Archives are unpacked once under `unpack_dir` and compared with `sha256` (one each) before; URLs go to `downloads_dir`. A relative
    archive that is not there is looked for in the folders of `search`; `hint` says where to get it. `inner` is the name of the folder
    below that holds the classes, where there is more beside it. `dvc` is `data.dvc`: see `dvc.pull_missing`.
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

    def __call__(self) -> Path | list[Path]:
        """The folder that holds the class (or split) folders, or the table; a list of them where several were named.

        Raises:
            ConfigError: Neither a folder nor an archive was named, or not one sha256 for each.
            SourceError: It is not there and cannot be fetched, or the archive is damaged or unsafe.
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
        if is_archive(path.name) and path.is_file():
            return self._inside(unpack_once(path, Path(self.unpack_dir), sha256))
        if sha256:
            raise ConfigError(
                f"data.sha256 is of an archive, and {str(path)!r} is none",
                f"the suffixes of archives are {', '.join(SUFFIXES)}",
            )
        if path.is_dir():
            return self._inside(path)
        if is_table(path):
            return path
        hint = f"data.archive takes {', '.join(SUFFIXES)}, and data.dir .csv, .tsv and .parquet too"
        raise SourceError(f"{str(path)!r} is neither a folder nor an archive nor a table", hint)

    def _from_web(self, url: str, sha256: str) -> Path:
        name = PurePosixPath(unquote(urlsplit(url).path)).name
        if not is_archive(name):
            raise SourceError(
                f"{shown(url)!r} is no archive by its name", f"fetch it by hand and pass data.archive=FILE{SUFFIXES[1]}"
            )
        name = f"{stem(name)}-{hashlib.sha256(url.encode()).hexdigest()[:8]}{name[len(stem(name)) :]}"  # two hosts may both have a data.zip
        path = Download(url, Path(self.downloads_dir) / name, f"sha256:{sha256}" if sha256 else "")()
        try:
            return unpack_once(path, Path(self.unpack_dir), sha256)
        except SourceError as error:
            raise SourceError(error.fact, f"{error.hint}; delete {str(path)!r} to have it fetched again") from error

    def _located(self, given: str) -> Path:
        path = Path(given).expanduser()
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
    """A data set of a hub, `kind` hf or kaggle, by its name with or without `kind:` before it; see `hub.fetch_from_hub`."""

    name: str | None
    kind: str
    unpack_dir: str = "data"
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None

    def __call__(self) -> Path:
        """The folder of images by class.

        Raises:
            ConfigError: The name or a column cannot be.
            SourceError: The client is not installed, there is no network, or the data set cannot be had.
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
    """A data set of torchvision (or anything like one), written once under `dir/{train,val,test}/<class>/`: its files as they are, else PNG.

    `train`, `val` and `test` give the data set when called with `root` and `download`. `files` (url, md5 and `path`, where torchvision
    looks for it below its root) are fetched to `downloads_dir` first, so that a download can be taken up again; `archive` replaces all by
    a folder-per-class archive.
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

    def __call__(self) -> Path | list[Path]:
        """The folder of images, or the unpacked archive.

        Raises:
            SourceError: The download failed.
            StorageError: No space or no permission.
        """
        if self.archive:
            return Folder(
                None, self.archive, self.sha256, self.dvc, None, self.unpack_dir, self.downloads_dir, self.search
            )()
        with _written_once(Path(self.dir)) as part:
            if part:
                with tempfile.TemporaryDirectory(
                    dir=part, prefix="."
                ) as scratch:  # torchvision may be killed while it unpacks
                    self._write(part, Path(scratch))
        return Path(self.dir)

    def _write(self, part: Path, scratch: Path) -> None:
        for position, file in enumerate(self.files):
            place = Path(self.downloads_dir) / file["path"]
            try:
                Download(file["url"], place, f"md5:{file['md5']}")()
            except SourceError as error:
                later = [
                    f"{more['url']} to {str(Path(self.downloads_dir) / more['path'])!r}"
                    for more in self.files[position + 1 :]
                ]
                raise SourceError(error.fact, "; also ".join([error.hint, *later])) from error
            link_or_copy(place, scratch / file["path"])
        for name, factory in (("train", self.train), ("val", self.val), ("test", self.test)):
            if factory:
                _write_images(_built(factory, scratch), part / name)


def deferred(factory: str, **arguments: Any) -> Callable[..., Any]:
    """A call of a data set in `torchvision.datasets` for later: naming it in a config then costs no import of torch."""
    if not factory.startswith("torchvision.datasets."):
        raise ConfigError(f"{factory!r} is not in torchvision.datasets", "write factory: torchvision.datasets.NAME")

    def call(**defaults: Any) -> Any:
        module, _, name = factory.rpartition(".")
        return getattr(importlib.import_module(module), name)(**{**defaults, **arguments})

    return call


def unwrapped(root: Path) -> Path:
    """The folder below single wrapping folders: an archive's `flowers/rose/1.jpg` gives `root/flowers`.

    A folder whose only sub-folder holds images stays: that one is a class.
    """
    while True:
        outer = list_folder(root)
        if len(outer.folders) != 1 or outer.images:
            return root
        inner = list_folder(root / outer.folders[0])
        if inner.images or not inner.folders:
            return root
        root = root / outer.folders[0]


def _write_digits(part: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    for number, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        split = "test" if seen[label] % 5 == 4 else "train"
        seen[label] += 1
        folder = part / split / str(label)
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
    """Path and class index of each image, if the data set lies on the disk as files: then nothing need be decoded and written anew."""
    samples = getattr(images, "samples", None)  # ImageFolder and what derives from it
    if samples is None:
        paths = getattr(images, "_image_files", None) or getattr(images, "_images", None) or []
        samples = list(zip(paths, getattr(images, "_labels", []), strict=False))
    whole = len(samples) == len(images) and all(
        isinstance(path, (str, Path)) and isinstance(label, int) for path, label in samples
    )
    return list(samples) if whole else []


def _built(factory: Callable[..., IndexedImages], scratch: Path) -> IndexedImages:
    try:
        return factory(root=str(scratch), download=True)
    except (
        OSError,
        RuntimeError,
    ) as error:  # urllib's URLError is an OSError; torchvision raises RuntimeError for a damaged file
        if is_of_the_disk(error):
            raise
        hint = "no network? pass data.archive=PATH, a .tar.gz or .zip with one folder a class"
        raise SourceError(f"the data set could not be downloaded ({str(error)[:120]})", hint) from error


def _listed(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else [str(name) for name in names or ()]


@contextmanager
def _written_once(path: Path) -> Iterator[Path | None]:
    """A new folder that becomes `path` when the block ends well; None where `path` is already there."""
    if path.is_dir() and any(path.iterdir()):
        yield None
        return
    log.info("writing the images once to %s", path)
    with new_tree(path) as part:
        yield part


def _nearest(path: Path) -> str:
    """A hint for a path that is not there: the most alike name beside the first part of `path` that is not there."""
    while not path.parent.exists():
        path = path.parent
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {str(path.parent / close[0])!r}?" if close else "check data.dir or data.archive"
