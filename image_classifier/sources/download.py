"""Downloading a file once: taken up where it broke off, checked, and whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import http.client
import logging
import os
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from image_classifier.atomic_io import file_lock, write_text
from image_classifier.errors import SourceError, StorageError, storage_errors
from image_classifier.text import printable

log = logging.getLogger(__name__)

_BLOCK_BYTES = 2**20
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers that may be better in a moment
_NO_WAY = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL})


@dataclass(frozen=True)
class Download:
    """A file on the web and the place it is to lie at; `checksum` is "sha256:HEX" or "md5:HEX", or "" where none is known."""

    url: str
    path: Path
    checksum: str = ""
    timeout_s: float = 30.0
    attempts: int = 4
    pause_s: float = 1.0

    def __call__(self) -> Path:
        """The file, fetched if it is not there; what an earlier, interrupted call received is kept and gone on from.

        An attempt that brought nothing is repeated after a pause that doubles; one that brought something counts as the first again.

        Raises:
            SourceError: No network, no such file, a web page instead of the file, or a file of another checksum (which is removed,
                unless it was there before).
            StorageError: No space or no permission.
        """
        check_url(self.url)
        with storage_errors(self.path):
            lock = self.path.with_name(f".{self.path.name}.lock")
            with file_lock(lock, remove=True):  # another run may be fetching the same file
                if self.path.exists():
                    check(self.path, self.checksum, f"delete it, and it is fetched again from {shown(self.url)}")
                else:
                    self._fetch()
        return self.path

    def _fetch(self) -> None:
        log.info("downloading %s to %s", shown(self.url), self.path)
        part = _Part(self.path.with_name(f"{self.path.name}.part"), self.url)
        failures = 0
        while True:
            before = part.size
            try:
                self._receive(part)
                break
            except (OSError, http.client.HTTPException) as error:
                failures = 1 if part.size > before else failures + 1
                self._give_up(error, failures)
                pause = min(60.0, self.pause_s * 2 ** (failures - 1))
                log.warning("%s: %s; trying again in %.0f s", shown(self.url), reason_of(error), pause)
                time.sleep(pause)
        self._keep(part)

    def _receive(self, part: _Part) -> None:
        request = urllib.request.Request(
            self.url, headers={"Accept-Encoding": "identity", "User-Agent": "image_classifier", **part.headers()}
        )
        try:
            answer = _OPENER.open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            if (
                error.code == 416
                and part.size
                and (error.headers.get("Content-Range") or "").endswith(f"*/{part.size}")
            ):
                return  # it was all there: a kill came just before the renaming
            if error.code == 416:
                part.forget()
            raise
        with answer:
            if answer.headers.get_content_type() == "text/html":
                raise SourceError(
                    f"{shown(self.url)} answers with a web page, not a file",
                    f"fetch it by hand and put it at {str(self.path)!r}",
                )
            total = part.begin(answer)
            _check_space(self.path, total - part.size)
            with part.path.open("ab") as file, _progress(self.path.name, part.size, total) as bar:
                while block := answer.read1(_BLOCK_BYTES):
                    file.write(block)
                    bar.update(bar.task_ids[0], advance=len(block))
        if part.size < total:
            raise ConnectionError(f"the connection broke off after {part.size:,} of {total:,} bytes")

    def _give_up(self, error: Exception, failures: int) -> None:
        """Raise what the user is to be told, unless trying again may help."""
        place = f"put it at {str(self.path)!r}"
        if isinstance(error, urllib.error.HTTPError):
            if error.code in _AGAIN | {416} and failures < self.attempts:
                return
            raise SourceError(
                f"{shown(self.url)} answers {error.code} {error.reason}", f"find the file elsewhere and {place}"
            ) from error
        if is_of_the_disk(error):
            raise error
        if _is_hopeless(error) or failures >= self.attempts:
            fact = f"{shown(self.url)} cannot be downloaded ({reason_of(error)})"
            raise SourceError(fact, f"no network? fetch it elsewhere and {place}") from error

    def _keep(self, part: _Part) -> None:
        with part.path.open("rb+") as file:
            os.fsync(file.fileno())
        try:
            check(
                part.path,
                self.checksum,
                f"it was removed; the file at {shown(self.url)} has changed, or its checksum is misspelt",
            )
        except SourceError:
            part.forget()
            raise
        os.replace(part.path, self.path)
        part.forget()


class _Part:
    """What has come of a file so far; beside it lies which version of the file on the server that is."""

    def __init__(self, path: Path, url: str) -> None:
        self.path = path
        self.name = hashlib.sha256(url.encode()).hexdigest()  # the URL itself may hold a secret
        self.version_path = path.with_name(f"{path.name}.version")
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def headers(self) -> dict[str, str]:
        """Ask for the rest only, and only of the same version (RFC 9110, If-Range)."""
        try:
            name, version = self.version_path.read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, ValueError):
            name = version = ""
        if not self.size or name != self.name or not version:
            self.forget()
            return {}
        return {"Range": f"bytes={self.size}-", "If-Range": version}

    def begin(self, answer: http.client.HTTPResponse) -> int:
        """Get ready for the answer's body and return how many bytes the whole file has, 0 where the server does not say."""
        if answer.status == 206:
            span, _, total = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
            if span.partition("-")[0] != str(self.size) or not total.isdecimal():
                self.forget()
                raise ConnectionError("the server sent another part of the file than was asked for")
            return int(total)
        self.forget()
        version = _version(answer.headers)
        if version:
            write_text(self.version_path, f"{self.name}\n{version}\n")
        return answer.length or 0

    def forget(self) -> None:
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


def shown(url: str) -> str:
    """The URL without what may be secret: user, password, query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "this URL"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def check_url(url: str) -> None:
    """SourceError unless it begins with http:// or https://, names a host and holds no password."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and not parts.username
    except ValueError:
        usable = False
    if not usable:
        raise SourceError(
            f"{shown(url)!r} is not fetched", "a download begins with https:// or http:// and holds no password"
        )


def is_of_the_disk(error: Exception) -> bool:
    """Whether the operating system refused to read or write a file, and no network is to blame."""
    network = (ConnectionError, TimeoutError, ssl.SSLError, socket.gaierror)
    return (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, network)
        and error.errno not in _NO_WAY
    )


def _is_hopeless(error: Exception) -> bool:
    """Whether trying again would only make the user wait: no such host, no way to it, nobody who answers, no valid certificate."""
    reason = getattr(error, "reason", error)
    if (
        isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError, http.client.InvalidURL))
        or getattr(reason, "errno", None) in _NO_WAY
    ):
        return True
    return isinstance(error, urllib.error.URLError) and isinstance(reason, (TimeoutError, str))


def _version(headers: Message) -> str:
    """What If-Range may name: an ETag unless it is a weak one, else the date of the last change."""
    etag = headers.get("ETag") or ""
    return etag if etag.startswith('"') else headers.get("Last-Modified") or ""


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        fact = f"{path.name!r} needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
        raise StorageError(fact, "free some space and run the same command again")


def _progress(name: str, done: int, total: int) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    bar.add_task(name, completed=done, total=total or None)
    return bar


def reason_of(error: Exception) -> str:
    """Why a download failed, in a few words."""
    reason = getattr(error, "reason", error)
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return printable(" ".join(text.split()))[:120]


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows what leads to https, and to http from http: never from an encrypted connection to an open one."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        allowed = ("https",) if req.type == "https" else ("https", "http")
        if urlsplit(newurl).scheme not in allowed:
            raise SourceError(
                f"{shown(req.full_url)} leads to {shown(newurl)}", "that is not followed: fetch it by hand"
            )
        fp.close()  # what comes with it has no end, maybe, and would be read to it
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(SafeRedirects)
