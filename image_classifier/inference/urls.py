"""Images and archives from the web, within limits: how many bytes, how long, how many redirects, and from public addresses only."""

from __future__ import annotations

import functools
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from image_classifier.dataset.fetch.download import SafeRedirects, check_url, reason_of
from image_classifier.errors import ConfigError, SourceError, UnreadableImage

_BLOCK_BYTES = 2**18


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
            raise ConfigError("fetch.max_bytes, fetch.timeout_s and fetch.total_s must be above 0 and fetch.max_redirects at least 0")


def is_url(text: str) -> bool:
    """Whether this is taken for an address on the web."""
    return text[:8].lower().startswith(("http://", "https://"))


def file_name(url: str) -> str:
    """The last part of an address, without query; "" where it has none."""
    return url.partition("#")[0].partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class Web:
    """Fetches addresses; those of this machine and of private networks only where `allow_private`."""

    limits: UrlLimits
    allow_private: bool = False

    def image(self, url: str, max_bytes: int) -> bytes:
        """The bytes of an image; UnreadableImage says why there are none."""
        try:
            return b"".join(self.blocks(url, max_bytes))
        except SourceError as error:
            raise UnreadableImage(url, error.fact) from error

    def save(self, url: str, file: IO[bytes]) -> None:
        """Write what lies there to a file; SourceError says why it cannot be had."""
        for block in self.blocks(url, self.limits.max_bytes):
            file.write(block)

    def blocks(self, url: str, max_bytes: int) -> Iterator[bytes]:
        """What lies there, piece by piece; SourceError where it cannot be had or is larger."""
        check_url(url)
        end, count = time.monotonic() + self.limits.total_s, 0
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "image_classifier"})
        try:
            with self._opener.open(request, timeout=self.limits.timeout_s) as answer:
                if (answer.length or 0) > max_bytes:
                    raise SourceError(_larger(max_bytes))
                while block := answer.read1(_BLOCK_BYTES):
                    count += len(block)
                    if count > max_bytes:
                        raise SourceError(_larger(max_bytes))
                    if time.monotonic() > end:
                        raise SourceError(f"takes longer than {self.limits.total_s:g} s")
                    yield block
                if answer.length:
                    raise SourceError(f"the connection broke off, {answer.length:,} bytes are missing")
        except urllib.error.HTTPError as error:
            error.close()
            raise SourceError(f"the server answers {error.code} {_first_line(error.reason)}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SourceError(f"cannot be fetched ({reason_of(error)})") from error

    @functools.cached_property
    def _opener(self) -> urllib.request.OpenerDirector:
        redirects = SafeRedirects()
        redirects.max_redirections = redirects.max_repeats = self.limits.max_redirects  # type: ignore[misc]
        if self.allow_private:
            return urllib.request.build_opener(redirects)
        # No proxy: behind one, nobody here sees which address is asked.
        return urllib.request.build_opener(redirects, urllib.request.ProxyHandler({}), _PublicHttp(), _PublicHttps())


def _larger(max_bytes: int) -> str:
    return f"larger than {max_bytes / 2**20:.3g} MiB"


def _first_line(text: object) -> str:
    return " ".join(str(text).split())[:80]


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
    return bool(found.is_global and not found.is_multicast and not found.is_reserved)


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _public_socket(host: str, port: int, timeout: Any) -> socket.socket:
    """A connection to one of the addresses that a name has now, all of which must be public: what was checked is what is asked."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    private = [address[0] for *_, address in found if not is_public(str(address[0]))]
    if private:
        raise SourceError(f"{host} is an address of this machine or of a private network; allow_private_urls=true allows it")
    failure: OSError | None = None
    for *_, address in found:
        try:
            return socket.create_connection((str(address[0]), port), timeout)
        except OSError as error:
            failure = error
    raise failure or OSError(f"{host} has no address")


class _PublicHttpConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _public_socket(self.host, self.port, self.timeout)


class _PublicHttpsConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        plain = _public_socket(self.host, self.port, self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


class _PublicHttp(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicHttpConnection, req)


class _PublicHttps(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicHttpsConnection, req)
