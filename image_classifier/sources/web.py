"""Images and archives from the web, within limits: how many bytes, how long, how many redirects, and from public addresses only."""

from __future__ import annotations

import functools
import http.client
import ipaddress
import socket
import ssl
import string
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from image_classifier.errors import ConfigError, SourceError, UnreadableImage
from image_classifier.sources.download import SafeRedirects, check_url, reason_of
from image_classifier.sources.socket_deadline import SocketDeadline
from image_classifier.text import printable

_BLOCK_BYTES = 2**18
ALLOWING = "; allow_private_urls=true allows it"  # the last words of a refusal, for the owner of that key


@dataclass(frozen=True)
class UrlLimits:
    """What an address on the web may ask of this machine.

    Args:
        max_bytes: Of an archive; an image has the limit of all images.
        timeout_s: Seconds without an answer.
        total_s: Seconds that one download may take.
        max_redirects: How often an address may lead to another one.

    Raises:
        ConfigError: A value that cannot be.
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
    """Whether this is taken for an address on the web."""
    return text[:8].lower().startswith(("http://", "https://"))


def file_name(url: str) -> str:
    """The last part of an address, without query; "" where it has none."""
    return url.partition("#")[0].partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class WebClient:
    """Fetches addresses; those of this machine and of private networks only where `allow_private`."""

    limits: UrlLimits
    allow_private: bool = False
    _ended: threading.Event = field(default_factory=threading.Event, init=False, repr=False, compare=False)

    def image(self, url: str, max_bytes: int, counted: Callable[[int], object] = lambda count: None) -> bytes:
        """The bytes of an image, each block of which is `counted` before it is kept; UnreadableImage says why there are none."""
        found = bytearray()
        try:
            with closing(self.blocks(url, max_bytes)) as blocks:
                for block in blocks:
                    counted(len(block))
                    found += block
        except SourceError as error:
            raise UnreadableImage(url, error.fact) from error
        return bytes(found)

    def stop(self) -> None:
        """End at once whatever is being fetched, and what would be."""
        self._ended.set()

    def blocks(self, url: str, max_bytes: int) -> Generator[bytes, None, None]:
        """What lies there, piece by piece; SourceError where it cannot be had, takes too long or is larger."""
        check_url(url)
        with SocketDeadline(self.limits.total_s, self._ended) as watchdog:
            try:
                for block in self._blocks(url, max_bytes, watchdog):
                    self._check(watchdog)
                    yield block
                self._check(watchdog)
            except urllib.error.HTTPError as error:
                error.close()
                raise SourceError(f"the server answers {error.code} {_first_line(error.reason)}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._check(watchdog)
                raise SourceError(f"cannot be fetched ({reason_of(error)})") from error

    def _blocks(self, url: str, max_bytes: int, watchdog: SocketDeadline) -> Iterator[bytes]:
        request = urllib.request.Request(
            _ascii(url), headers={"Accept-Encoding": "identity", "User-Agent": "image_classifier"}
        )
        count = 0
        with self._opener(watchdog).open(request, timeout=self.limits.timeout_s) as answer:
            if (answer.length or 0) > max_bytes:
                raise SourceError(_larger(max_bytes))
            while block := answer.read1(_BLOCK_BYTES):
                count += len(block)
                if count > max_bytes:
                    raise SourceError(_larger(max_bytes))
                yield block
            if answer.length:
                raise ConnectionError(f"the connection broke off, {answer.length:,} bytes are missing")

    def _check(self, watchdog: SocketDeadline) -> None:
        """SourceError where the connection was cut from this side, whatever that looked like."""
        if self._ended.is_set():
            raise SourceError("the run was stopped")
        if watchdog.bit:
            raise SourceError(f"takes longer than {self.limits.total_s:g} s")

    def _opener(self, watchdog: SocketDeadline) -> urllib.request.OpenerDirector:
        redirects = SafeRedirects()
        redirects.max_redirections = redirects.max_repeats = self.limits.max_redirects  # type: ignore[misc]
        connect = functools.partial(_connected, watchdog=watchdog, public=not self.allow_private)
        # No proxy: behind one, nobody here sees which address is asked.
        proxies = [] if self.allow_private else [urllib.request.ProxyHandler({})]
        return urllib.request.build_opener(redirects, *proxies, _Http(connect), _Https(connect))

    def __reduce__(self) -> tuple[type[WebClient], tuple[UrlLimits, bool]]:
        return WebClient, (self.limits, self.allow_private)  # another process ends by itself


def _ascii(url: str) -> str:
    """The address as it goes over the wire: other letters and spaces as the percent signs of their UTF-8, in the host as IDNA."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", f":{parts.port}" if parts.port else ""
    named = parts.netloc if host.isascii() else host.encode("idna").decode() + port
    rest = (quote(part, safe=string.punctuation, errors="surrogateescape") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, named, *rest, ""))


def _larger(max_bytes: int) -> str:
    return f"larger than {max_bytes / 2**20:.3g} MiB"


def _first_line(text: object) -> str:
    return printable(" ".join(str(text).split()))[:80]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet: not to this machine, a private network, a link or a group, be it wrapped in IPv6."""
    found: Any = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6:
        packed = int(found)
        within = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in _NAT64:
            within = ipaddress.ip_address(packed & 0xFFFFFFFF)
        if within is not None:
            return is_public(str(within))
    within_a_site = found.version == 6 and found.is_site_local
    return bool(
        found.is_global
        and not found.is_multicast
        and not found.is_reserved
        and not within_a_site
        and address not in _OF_CLOUDS
    )


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_OF_CLOUDS = {"168.63.129.16", "192.0.0.192"}  # Azure and Oracle tell a machine its secrets there


def _connected(
    place: tuple[str, int], timeout: Any, source: object = None, *, watchdog: SocketDeadline, public: bool
) -> socket.socket:
    """A connection to one of the addresses that a name has now, all of which must be public if one must: what was checked is what is asked."""
    host, port = place
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if public and not all(is_public(str(address[0])) for *_, address in found):
        raise SourceError(f"{host} is an address of this machine or of a private network{ALLOWING}")
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            watchdog.hold(connection)
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure or OSError(f"{host} has no address")


class _Http(urllib.request.HTTPHandler):
    """Connects as it is told."""

    def __init__(self, connect: Callable[..., socket.socket]) -> None:
        super().__init__()
        self.connect = connect

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_made, http.client.HTTPConnection, self.connect), req)


class _Https(urllib.request.HTTPSHandler):
    """Connects as it is told."""

    def __init__(self, connect: Callable[..., socket.socket]) -> None:
        super().__init__(context=_encryption())
        self.connect = connect

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(
            functools.partial(_made, http.client.HTTPSConnection, self.connect, context=_encryption()), req
        )


def _made(kind: Any, connect: Callable[..., socket.socket], host: str, **options: Any) -> Any:
    connection = kind(host, **options)
    connection._create_connection = connect  # what both kinds ask for their socket, before a proxy or TLS
    return connection


@functools.cache
def _encryption() -> ssl.SSLContext:
    """The certificates of this machine, which take a while to read."""
    return ssl.create_default_context()
