"""Images and archives from the web: public addresses by default, with limits on bytes, time and redirects."""

from __future__ import annotations

import io
import threading
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

from image_classifier.errors import ConfigError, SourceError, UnreadableImage
from image_classifier.sources.addresses import PrivateAddress
from image_classifier.sources.socket_deadline import SocketDeadline
from image_classifier.sources.transfer import FileReceiver, Retry, Transfer, TransferFailed, reason_of
from image_classifier.text import printable

ALLOWING = "; allow_private_urls=true allows it"  # ends a refusal, for those who can set that key
_RETRY = Retry(attempts=3, pause_s=0.5)  # short: somebody waits for the answer


@dataclass(frozen=True)
class UrlLimits:
    """Limits of one address on the web.

    Args:
        max_bytes: Size of an archive; an image has the limit of all images.
        timeout_s: Seconds without an answer.
        total_s: Seconds for one download, retries included.
        max_redirects: Redirects in a row.

    Raises:
        ConfigError: A limit of 0 or below.
    """

    max_bytes: int = 2**30
    timeout_s: float = 20.0
    total_s: float = 600.0
    max_redirects: int = 5

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.timeout_s, self.total_s) <= 0 or self.max_redirects < 0:
            raise ConfigError(
                "fetch.max_bytes, fetch.timeout_s and fetch.total_s must be above 0 and fetch.max_redirects at least 0"
            )


def is_url(text: str) -> bool:
    """Return whether a text is taken for an address on the web.

    >>> is_url("HTTPS://host/cat.jpg"), is_url("cat.jpg")
    (True, False)
    """
    return text[:8].lower().startswith(("http://", "https://"))


def file_name(url: str) -> str:
    """Return the last part of an address, without query; "" where it has none.

    >>> file_name("https://host/photos/cat.jpg?size=big")
    'cat.jpg'
    """
    return url.partition("#")[0].partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class WebClient:
    """Fetches addresses; those of this machine and of private networks only if `allow_private`."""

    limits: UrlLimits
    allow_private: bool = False
    _ended: threading.Event = field(default_factory=threading.Event, init=False, repr=False, compare=False)

    def image(self, url: str, max_bytes: int, counted: Callable[[int], object] = lambda count: None) -> bytes:
        """Return the bytes of an image; `counted` is called with the size of each block before it is kept.

        Raises:
            UnreadableImage: It cannot be fetched, takes too long or is larger.
        """
        content = io.BytesIO()
        try:
            self.fetch(url, content, max_bytes, counted)
        except SourceError as error:
            raise UnreadableImage(url, error.fact) from error
        return content.getvalue()

    def stop(self) -> None:
        """End at once whatever is being fetched, and what would be."""
        self._ended.set()

    def fetch(
        self, url: str, file: IO[bytes], max_bytes: int, counted: Callable[[int], object] = lambda count: None
    ) -> None:
        """Write what an address holds to an empty file.

        Raises:
            SourceError: It cannot be fetched, takes too long or is larger.
            OSError: The file cannot be written.
        """
        transfer = Transfer(self.allow_private, self.limits.timeout_s, self.limits.max_redirects, _RETRY)
        with SocketDeadline(self.limits.total_s, self._ended) as deadline:
            try:
                transfer.run(url, FileReceiver(file, max_bytes, counted), deadline)
            except TransferFailed as error:
                self._check(deadline)
                raise _refused(error.cause) from error
            except PrivateAddress as error:
                raise SourceError(f"{error.fact}{ALLOWING}") from error
            self._check(deadline)

    def _check(self, deadline: SocketDeadline) -> None:
        """Raise SourceError if the connection was cut from this side, whatever that looked like."""
        if self._ended.is_set():
            raise SourceError("the run was stopped")
        if deadline.expired:
            raise SourceError(f"takes longer than {self.limits.total_s:g} s")

    def __reduce__(self) -> tuple[type[WebClient], tuple[UrlLimits, bool]]:
        return WebClient, (self.limits, self.allow_private)  # another process ends by itself


def _refused(error: Exception) -> SourceError:
    if isinstance(error, urllib.error.HTTPError):
        reason = printable(" ".join(str(error.reason).split()))[:80]
        return SourceError(f"the server answers {error.code} {reason}")
    return SourceError(f"cannot be fetched ({reason_of(error)})")
