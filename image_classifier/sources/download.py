"""Downloading a file once: resumed where it broke off, checked, and complete or not there at all."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import shutil
import socket
import ssl
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from image_classifier.atomic_io import file_lock, write_text
from image_classifier.errors import SourceError, StorageError, storage_errors
from image_classifier.sources.addresses import PrivateAddress, check_url, shown
from image_classifier.sources.socket_deadline import SocketDeadline
from image_classifier.sources.transfer import Retry, Transfer, TransferFailed, reason_of

log = logging.getLogger(__name__)

_MAX_REDIRECTS = 10
_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL})


@dataclass(frozen=True)
class DownloadSettings:
    """The keys of `data.download`.

    Args:
        allow_private: Whether addresses of this machine and of private networks are fetched. None: those that are
            written in the configuration are, but no redirect leads from a public address to a private one.
    """

    allow_private: bool | None = None


@dataclass(frozen=True)
class Download:
    """A file on the web and where it goes; `checksum` is "sha256:HEX", "md5:HEX", or "" where none is known.

    An attempt that brought nothing is repeated after a pause that doubles; one that brought something counts as the
    first again.
    """

    url: str
    path: Path
    checksum: str = ""
    timeout_s: float = 30.0
    attempts: int = 4
    pause_s: float = 1.0
    allow_private: bool | None = None

    def __call__(self) -> Path:
        """Return the file, which is fetched if it is not there; an interrupted download is resumed.

        Raises:
            SourceError: No network, no such file, an address that is not allowed, a web page instead of the file, or a
                file of another checksum (which is removed, unless it was there before).
            StorageError: No space or no permission.
        """
        check_url(self.url)
        with storage_errors(self.path):
            lock = self.path.with_name(f".{self.path.name}.lock")
            with file_lock(lock, remove=True):  # another run may be fetching the same file
                if self.path.exists():
                    check(self.path, self.checksum, f"delete it to fetch it again from {shown(self.url)}")
                else:
                    self._fetch()
        return self.path

    def _fetch(self) -> None:
        log.info("downloading %s to %s", shown(self.url), self.path)
        transfer = Transfer(self.allow_private, self.timeout_s, _MAX_REDIRECTS, Retry(self.attempts, self.pause_s))
        with _PartFile(self.path, self.url).opened() as part, SocketDeadline(math.inf) as deadline:
            try:
                transfer.run(self.url, part, deadline)
            except TransferFailed as error:
                raise self._failed(error.cause) from error
            except PrivateAddress as error:
                raise SourceError(error.fact, "data.download.allow_private=true allows it") from error
        self._keep(part)

    def _failed(self, error: Exception) -> SourceError:
        put = f"put it at {str(self.path)!r}"
        if isinstance(error, urllib.error.HTTPError):
            fact = f"{shown(self.url)} answers {error.code} {error.reason}"
            return SourceError(fact, f"find the file elsewhere and {put}")
        fact = f"{shown(self.url)} cannot be downloaded ({reason_of(error)})"
        return SourceError(fact, f"no network? fetch it elsewhere and {put}")

    def _keep(self, part: _PartFile) -> None:
        with part.path.open("ab") as file:
            os.fsync(file.fileno())
        hint = f"it was removed; the file at {shown(self.url)} has changed, or its checksum is misspelt"
        try:
            check(part.path, self.checksum, hint)
        except SourceError:
            part.forget()
            raise
        os.replace(part.path, self.path)
        part.forget()


class _PartFile:
    """The bytes of a file so far, in FILE.part; FILE.part.version names the version on the server that they are of."""

    def __init__(self, target: Path, url: str) -> None:
        self.target = target
        self.url = url
        self.path = target.with_name(f"{target.name}.part")
        self.version_path = target.with_name(f"{target.name}.part.version")
        self._url_hash = hashlib.sha256(url.encode()).hexdigest()  # the URL itself may hold a secret
        target.parent.mkdir(parents=True, exist_ok=True)
        self.size = self.path.stat().st_size if self.path.exists() else 0
        self.version = self._read_version()
        self._bar = _progress_bar(target.name)

    def _read_version(self) -> str:
        try:
            url_hash, version = self.version_path.read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, ValueError):
            return ""
        return version if url_hash == self._url_hash else ""

    @contextmanager
    def opened(self) -> Iterator[_PartFile]:
        """Show a progress bar, and keep the file open, while the block runs."""
        try:
            with self.path.open("ab") as self._file, self._bar:
                yield self
        finally:
            if not self.size:
                self.forget()

    def restart(self, version: str) -> None:
        self._file.truncate(0)
        self.size = 0
        self.version = version
        self.version_path.unlink(missing_ok=True)
        if version:
            write_text(self.version_path, f"{self._url_hash}\n{version}\n")

    def expect(self, kind: str, total: int) -> None:
        if kind == "text/html":
            fact = f"{shown(self.url)} answers with a web page, not a file"
            raise SourceError(fact, f"download it by hand and put it at {str(self.target)!r}")
        _check_space(self.target, total - self.size)
        self._bar.update(self._bar.task_ids[0], completed=self.size, total=total or None)

    def write(self, block: bytes) -> None:
        self._file.write(block)
        self.size += len(block)
        self._bar.update(self._bar.task_ids[0], advance=len(block))

    def forget(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self.version_path.unlink(missing_ok=True)


def check(path: Path, checksum: str, hint: str) -> None:
    """Compare a file with "sha256:HEX" or "md5:HEX"; nothing is compared where `checksum` is "".

    Raises:
        SourceError: They differ, or `checksum` is not of that form.
    """
    if not checksum:
        return
    kind, _, expected = checksum.partition(":")
    if kind not in ("sha256", "md5") or len(expected) != (64 if kind == "sha256" else 32):
        raise SourceError(f"{checksum!r} is no checksum", "a sha256 has 64 hexadecimal digits")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    if found != expected.lower():
        raise SourceError(f"{str(path)!r} has the {kind} {found}, not {expected.lower()}", hint)


def is_of_the_disk(error: Exception) -> bool:
    """Whether the operating system refused to read or write a file, and no network is to blame."""
    network = (ConnectionError, TimeoutError, ssl.SSLError, socket.gaierror)
    return (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, network)
        and error.errno not in _NO_ROUTE
    )


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        fact = f"{path.name!r} needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
        raise StorageError(fact, "free some space and run the same command again")


def _progress_bar(name: str) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    bar.add_task(name, total=None)
    return bar
