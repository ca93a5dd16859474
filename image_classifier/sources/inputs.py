"""Everything `--images` can name as one stream of images.

Files, folders, globs, archives, tables, addresses on the web or in S3-like storage, standard input.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from image_classifier.errors import ConfigError, DataError, SourceError, storage_errors
from image_classifier.extras import install
from image_classifier.images import DEFAULT_LIMITS, IMAGE_SUFFIXES, DecodeLimits, is_image_name
from image_classifier.sources.archive import ArchiveLimits, images_in, is_archive, is_archive_name
from image_classifier.sources.folders import expanded, walk
from image_classifier.sources.image_source import ImageSource
from image_classifier.sources.object_store import Storage, is_stored
from image_classifier.sources.stdin import HEAD, is_picture, lines, read_head
from image_classifier.sources.suffixes import ZSTD_SUFFIXES
from image_classifier.sources.table import is_table, read_paths
from image_classifier.sources.web import UrlLimits, WebClient, file_name, is_url

STDIN = "-"
_SPOOL_BYTES = 2**24  # of an archive that comes as a stream, kept in memory


@dataclass(frozen=True)
class Inputs:
    """The images to answer for, and the limits that hold on the way to them.

    Args:
        items: Names, as the user writes them.
        stdin: Returns standard input, once it is needed.
        limits: Of a single image.
        archive: Of an archive.
        web: Fetches addresses.
        storage: The S3-like storage of `s3://`.
    """

    items: Sequence[str]
    stdin: Callable[[], IO[bytes]]
    limits: DecodeLimits = DEFAULT_LIMITS
    archive: ArchiveLimits = field(default_factory=ArchiveLimits)
    web: WebClient = field(default_factory=lambda: WebClient(UrlLimits()))
    storage: Storage = field(default_factory=Storage.here)

    def check(self) -> None:
        """Check that folders and patterns have an image and tables a path; DataError if not. No address is fetched."""
        for item in self.items:
            _check_package(item)
            if item == STDIN or is_address(item):
                continue
            item = expanded(item)
            path = Path(item)
            if os.path.isfile(item) and is_table(path):
                next(_table(path), None)
            elif os.path.isdir(item) or (glob.has_magic(item) and not os.path.exists(item)):
                images: Iterable[object] = _images_below(item) if os.path.isdir(item) else _matches(item)
                if next(iter(images), None) is None:
                    raise DataError(f"{item!r} holds no image", f"images end in {', '.join(sorted(IMAGE_SUFFIXES))}")

    def __iter__(self) -> Iterator[ImageSource]:
        """Yield every image, in the order given; DataError if there is none at all."""
        empty = True
        for item in self.items:
            for image in self._expanded(item):
                empty = False
                yield image
        if empty:
            raise DataError(
                "there is no image to answer for",
                "give files, folders, globs, archives, tables, URLs, s3:// or - for standard input",
            )

    def _expanded(self, item: str) -> Iterator[ImageSource]:
        if item == STDIN:
            return self._of_stdin()
        if is_url(item):
            return self._of_url(item)
        if is_stored(item):
            return self.storage.items(item, self.limits.max_bytes)
        item = expanded(item)
        if os.path.isdir(item):
            return _images_below(item)
        if os.path.exists(item) or not glob.has_magic(item):
            return self._of_file(Path(item))
        return map(ImageSource.file, map(Path, _matches(item)))

    def _of_file(self, path: Path) -> Iterator[ImageSource]:
        if os.path.isfile(path) and is_archive_name(path.name):
            return self._of_archive(path)
        if os.path.isfile(path) and is_table(path):
            return (
                self._named(name) if name else ImageSource.missing(str(path), "a row of the table has no path")
                for name in _table(path)
            )
        return iter([ImageSource.file(path)])

    def _named(self, name: str) -> ImageSource:
        """Return one image of a list: a file, or an address."""
        if is_stored(name):
            return self.storage.item(name, self.limits.max_bytes)
        return (
            ImageSource(name, partial(self.web.image, name, self.limits.max_bytes))
            if is_url(name)
            else ImageSource.file(Path(name))
        )

    def _of_archive(self, path: Path) -> Iterator[ImageSource]:
        try:
            file = path.open("rb")
        except OSError as error:
            yield ImageSource.missing(str(path), f"cannot be opened ({error.strerror})")
            return
        with file:
            yield from images_in(file, str(path), self.archive, self.limits.max_bytes)

    def _of_url(self, url: str) -> Iterator[ImageSource]:
        """Yield an image, fetched when it is its turn, or those of an archive; without a suffix the content decides."""
        if is_image_name(file_name(url)):
            yield self._named(url)
            return
        with _spool() as file:
            try:
                self.web.fetch(url, file, self.web.limits.max_bytes)
            except SourceError as error:
                yield ImageSource.missing(url, error.fact)
                return
            file.seek(0)
            head = file.read(HEAD)
            file.seek(0)
            if is_archive(head):
                yield from images_in(file, url, self.archive, self.limits.max_bytes)
            else:
                yield ImageSource(url, file.read(self.limits.max_bytes + 1))

    def _of_stdin(self) -> Iterator[ImageSource]:
        """Yield the image or those of the archive whose bytes arrive; else those of a list of paths and addresses."""
        stdin = self.stdin()
        head = read_head(stdin)
        if is_picture(head):
            yield ImageSource(STDIN, head + stdin.read(self.limits.max_bytes + 1 - len(head)))
        elif is_archive(head):
            with _spool() as file:
                file.write(head)
                shutil.copyfileobj(stdin, file)
                file.seek(0)
                yield from images_in(file, STDIN, self.archive, self.limits.max_bytes)
        else:
            yield from map(self._named, lines(head, stdin))


@contextmanager
def _spool() -> Iterator[IO[bytes]]:
    """Yield a temporary file for an archive that comes as a stream; StorageError if the disk is full."""
    with storage_errors(tempfile.gettempdir()), tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as file:
        yield file


def _check_package(item: str) -> None:
    name = file_name(item) if is_url(item) else item
    if name.lower().endswith((".parquet", *ZSTD_SUFFIXES)) and find_spec("pyarrow") is None:
        raise ConfigError(f"{item!r} needs a package that is not installed", install("arrow"))


def is_address(item: str) -> bool:
    """Return whether a name is an address on the web or in S3-like storage, not a path of this machine."""
    return is_url(item) or is_stored(item)


def _images_below(folder: str) -> Iterator[ImageSource]:
    """Yield the images below a folder, by name; a folder that cannot be read is an image that cannot be read."""
    unreadable: list[ImageSource] = []

    def note(path: str, error: OSError) -> None:
        unreadable.append(ImageSource.missing(path, f"the folder cannot be listed ({error.strerror})"))

    for entry in walk(folder, note):
        yield from unreadable
        unreadable.clear()
        if is_image_name(entry.name):
            yield ImageSource.file(Path(entry.path))
    yield from unreadable


def _matches(pattern: str) -> Iterable[str]:
    return sorted(name for name in glob.iglob(pattern, recursive=True) if os.path.isfile(name))


def _table(path: Path) -> Iterator[str]:
    """Yield the images of a table as seen from its folder, addresses as they are, "" for a row without one."""
    for value in read_paths(path):
        yield value if is_address(value) or not value.strip() else str(path.parent / value)
