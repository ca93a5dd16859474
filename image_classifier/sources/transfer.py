"""One file from the web to a receiver: repeated where that may help, and resumed where a connection breaks off.

The one rule for downloads of data sets and for images that are fetched one by one.
"""

from __future__ import annotations

import errno
import http.client
import logging
import socket
import ssl
import string
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import IO, Protocol
from urllib.parse import quote, urlsplit, urlunsplit

from image_classifier.errors import SourceError
from image_classifier.sources.addresses import AddressGuard, check_url, shown
from image_classifier.sources.socket_deadline import SocketDeadline
from image_classifier.text import printable

log = logging.getLogger(__name__)

_BLOCK_BYTES = 2**18
_RETRIED = frozenset({408, 416, 425, 429, 500, 502, 503, 504})  # answers that may be better in a moment
_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL})
_MAX_PAUSE_S = 60.0


@dataclass(frozen=True)
class Retry:
    """How often a request is repeated, after a pause that doubles.

    An attempt that brought something counts as the first again.
    """

    attempts: int
    pause_s: float


class Receiver(Protocol):
    """Keeps what arrives."""

    @property
    def size(self) -> int:
        """Bytes received so far."""

    @property
    def version(self) -> str:
        """The version of the file on the server that these bytes are of, "" where they cannot be resumed."""

    def restart(self, version: str) -> None:
        """Forget all bytes; those of another version follow."""

    def expect(self, kind: str, total: int) -> None:
        """Check the media type and the size of the file, 0 where the server does not give it."""

    def write(self, block: bytes) -> None:
        """Keep the next bytes."""


class TransferFailed(Exception):
    """The network's or the server's error after which nothing was tried any more."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


class _ReceiverFailed(Exception):
    """An OSError of the receiver, which is not the network's."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass(frozen=True)
class Transfer:
    """How files are fetched.

    Args:
        allow_private: See `AddressGuard`.
        timeout_s: Seconds without an answer.
        max_redirects: Redirects in a row.
        retry: Attempts and pauses.
    """

    allow_private: bool | None
    timeout_s: float
    max_redirects: int
    retry: Retry

    def run(self, url: str, receiver: Receiver, deadline: SocketDeadline) -> None:
        """Fetch a file.

        Raises:
            SourceError: The URL or a redirect is not allowed, or the receiver refuses.
            TransferFailed: The network or the server failed.
            OSError: The receiver cannot write.
        """
        check_url(url)
        failures = 0
        while True:
            before = receiver.size
            try:
                return self._attempt(url, receiver, deadline)
            except _ReceiverFailed as error:
                raise error.cause from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                failures = 1 if receiver.size > before else failures + 1
                if deadline.expired or failures >= self.retry.attempts or not _may_pass(error):
                    raise TransferFailed(error) from error
                pause = min(_MAX_PAUSE_S, self.retry.pause_s * 2 ** (failures - 1))
                log.warning("%s: %s; trying again in %.1f s", shown(url), reason_of(error), pause)
                deadline.wait(pause)

    def _attempt(self, url: str, receiver: Receiver, deadline: SocketDeadline) -> None:
        """Receive the file or the rest of it; an error where the connection breaks off."""
        with _receiving():
            headers = {"Accept-Encoding": "identity", "User-Agent": "image_classifier", **_resuming(receiver)}
        request = urllib.request.Request(encoded_url(url), headers=headers)
        opener = AddressGuard(self.allow_private, deadline).opener(self.max_redirects)
        try:
            answer = opener.open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 416:
                raise
            if (error.headers.get("Content-Range") or "").endswith(f"*/{receiver.size}") and receiver.size:
                return  # nothing was missing
            with _receiving():
                receiver.restart("")
            raise
        with answer:
            with _receiving():
                total = _begin(receiver, answer)
                receiver.expect(answer.headers.get_content_type(), total)
            while block := answer.read1(_BLOCK_BYTES):
                with _receiving():
                    receiver.write(block)
        if receiver.size < total:
            raise ConnectionError(f"the connection broke off after {receiver.size:,} of {total:,} bytes")


@contextmanager
def _receiving() -> Iterator[None]:
    """Mark an OSError of the block as the receiver's, unless it is about the connection."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise _ReceiverFailed(error) from error


def _resuming(receiver: Receiver) -> dict[str, str]:
    """Return headers that request the rest only, and only of the same version (RFC 9110, 13.1.5 If-Range)."""
    if not receiver.size:
        return {}
    if not receiver.version:
        receiver.restart("")
        return {}
    return {"Range": f"bytes={receiver.size}-", "If-Range": receiver.version}


def _begin(receiver: Receiver, answer: http.client.HTTPResponse) -> int:
    """Prepare the receiver for the answer's body; return the size of the file, 0 where the server does not give it."""
    if answer.status == 206:
        span, _, total = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] != str(receiver.size) or not total.isdecimal():
            receiver.restart("")
            raise ConnectionError("the server sent another range than was requested")
        return int(total)
    receiver.restart(_version(answer.headers))
    return answer.length or 0


def _version(headers: Message) -> str:
    """Return what If-Range may name: a strong ETag, else the date of the last change."""
    etag = headers.get("ETag") or ""
    return etag if etag.startswith('"') else headers.get("Last-Modified") or ""


def _may_pass(error: Exception) -> bool:
    """Return whether another attempt may help.

    It does not where there is no such host, no route to it, nobody who answers, or no valid certificate.
    """
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _RETRIED
    reason = getattr(error, "reason", error)
    if isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError, http.client.InvalidURL, ValueError)):
        return False
    if getattr(reason, "errno", None) in _UNREACHABLE:
        return False
    return not (isinstance(error, urllib.error.URLError) and isinstance(reason, (TimeoutError, str)))


def reason_of(error: Exception) -> str:
    """Return why a request failed, in a few words."""
    reason = getattr(error, "reason", error)
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return printable(" ".join(text.split()))[:120]


def encoded_url(url: str) -> str:
    """Return a URL as it goes over the wire: percent signs for other letters and spaces, IDNA for the host.

    >>> encoded_url("http://bücher.example/ü 1.png#top")
    'http://xn--bcher-kva.example/%C3%BC%201.png'
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", f":{parts.port}" if parts.port else ""
    netloc = parts.netloc if host.isascii() else host.encode("idna").decode() + port
    rest = (quote(part, safe=string.punctuation, errors="surrogateescape") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, netloc, *rest, ""))


@dataclass
class FileReceiver:
    """Writes up to `max_bytes` bytes to an empty file; `counted` is called with the size of each block before that."""

    file: IO[bytes]
    max_bytes: int
    counted: Callable[[int], object] = lambda count: None
    version: str = ""
    size: int = 0

    def restart(self, version: str) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.version = version
        self.size = 0

    def expect(self, kind: str, total: int) -> None:
        if total > self.max_bytes:
            raise self._too_large()

    def write(self, block: bytes) -> None:
        if self.size + len(block) > self.max_bytes:
            raise self._too_large()
        self.counted(len(block))
        self.file.write(block)
        self.size += len(block)

    def _too_large(self) -> SourceError:
        return SourceError(f"larger than {self.max_bytes / 2**20:.3g} MiB")
