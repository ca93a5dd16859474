"""Where a data set comes from: each source, called, returns the path of a folder-per-class tree and does its work only once."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from rich.progress import track

from image_classifier.dataset.archive import is_archive, new_tree, unpack_once
from image_classifier.dataset.scan import list_folder
from image_classifier.errors import ConfigError, SourceError

log = logging.getLogger(__name__)


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
    """A folder of one's own, or a .tar, .tar.gz, .tgz or .zip of one, unpacked once under `unpack_dir`.

    A relative archive that is not there is looked for in the folders of `search`; `hint` says where to get it.
    """

    dir: str | None = None
    archive: str | None = None
    unpack_dir: str = "data"
    search: Sequence[str] = ()
    hint: str = ""

    def __call__(self) -> Path:
        """The folder that holds the class (or split) folders.

        Raises:
            ConfigError: Neither a folder nor an archive was named.
            SourceError: It is not there, or the archive is damaged or unsafe.
            StorageError: No space or no permission to unpack.
        """
        given = self.dir or self.archive
        if not given:
            raise ConfigError("data.dir is not set", "pass data.dir=FOLDER or data.archive=FILE.tar.gz")
        path = self._located(given)
        if path.is_dir():
            return unwrapped(path)
        if not is_archive(path):
            raise SourceError(f"{str(path)!r} is neither a folder nor an archive", "data.archive takes .tar, .tar.gz, .tgz and .zip")
        return unwrapped(unpack_once(path, Path(self.unpack_dir)))

    def _located(self, given: str) -> Path:
        path = Path(given).expanduser()
        candidates = [path] if self.dir or path.is_absolute() else [path, *(Path(folder) / path for folder in self.search)]
        for candidate in candidates:
            if candidate.exists():
                return candidate
        raise SourceError(f"{given!r} does not exist", self.hint or _nearest(path))


@dataclass(frozen=True)
class TorchvisionDataset:
    """A data set of torchvision (or anything like one), written once as PNG under `dir/{train,test}/<class>/`.

    `train` and `test` give the data set when called; `archive` replaces the download by a file.
    """

    dir: str
    train: Callable[[], IndexedImages]
    test: Callable[[], IndexedImages] | None = None
    archive: str | None = None
    unpack_dir: str = "data"
    search: Sequence[str] = ()

    def __call__(self) -> Path:
        """The folder of PNGs, or the unpacked archive.

        Raises:
            SourceError: The download failed.
            StorageError: No space or no permission.
        """
        if self.archive:
            return Folder(archive=self.archive, unpack_dir=self.unpack_dir, search=self.search)()
        with _written_once(Path(self.dir)) as part:
            if part:
                _write_images(_fetched(self.train), part / "train")
                if self.test:
                    _write_images(_fetched(self.test), part / "test")
        return Path(self.dir)


def deferred(factory: str, **arguments: Any) -> Callable[[], Any]:
    """A call of a data set in `torchvision.datasets` for later: naming it in a config then costs no import of torch."""
    if not factory.startswith("torchvision.datasets."):
        raise ConfigError(f"{factory!r} is not in torchvision.datasets", "write factory: torchvision.datasets.NAME")

    def call() -> Any:
        module, _, name = factory.rpartition(".")
        return getattr(importlib.import_module(module), name)(**arguments)

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
    names = [name.replace("/", "_") for name in images.classes]
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    numbers: Iterable[int] = track(range(len(images)), f"writing {folder.name}", transient=True, disable=not os.isatty(2))
    for number in numbers:
        picture, label = images[number]
        picture.save(folder / names[label] / f"{number:06d}.png")


def _fetched(factory: Callable[[], IndexedImages]) -> IndexedImages:
    try:
        return factory()
    except (OSError, RuntimeError) as error:  # urllib's URLError is an OSError; torchvision raises RuntimeError for a damaged file
        hint = "no network? pass data.archive=PATH, a .tar.gz or .zip with one folder a class"
        raise SourceError(f"the data set could not be downloaded ({str(error)[:120]})", hint) from error


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
