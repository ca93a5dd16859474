"""Which addresses may be connected to: the guard against server-side request forgery, redirects included."""

from __future__ import annotations

import functools
import http.client
import ipaddress
import socket
import ssl
import urllib.request
from collections.abc import Callable, Sequence
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from image_classifier.errors import SourceError
from image_classifier.sources.socket_deadline import SocketDeadline

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_CLOUD_METADATA = {"168.63.129.16", "192.0.0.192"}  # Azure and Oracle hand a machine its secrets there


class PrivateAddress(SourceError):
    """An address of this machine or of a private network, where only public ones are allowed."""


def check_url(url: str) -> None:
    """Check that a URL begins with http:// or https://, names a host and holds no password; SourceError if not."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and not parts.username
    except ValueError:
        usable = False
    if not usable:
        raise SourceError(
            f"{shown(url)!r} is not fetched", "a download must begin with https:// or http:// and hold no password"
        )


def shown(url: str) -> str:
    """Return a URL without what may be secret: user, password, query.

    >>> shown("https://me:secret@host:8080/a.zip?token=secret")
    'https://host:8080/a.zip'
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return "this URL"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_public(address: str) -> bool:
    """Return whether an IP address, also one wrapped in IPv6, belongs to the internet.

    Addresses of this machine, of a private network, of a link or of a group do not.

    >>> is_public("8.8.8.8"), is_public("192.168.1.1"), is_public("::ffff:127.0.0.1")
    (True, False, False)
    """
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        # IPv4 inside IPv6: mapped (RFC 4291), 6to4 (RFC 3056), Teredo (RFC 4380), NAT64 (RFC 6052).
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    site_local = ip.version == 6 and ip.is_site_local
    special = ip.is_multicast or ip.is_reserved or site_local or address in _CLOUD_METADATA
    return bool(ip.is_global and not special)


class AddressGuard:
    """The addresses that one request, with its redirects, may connect to.

    Args:
        allow_private: True: every address. False: public ones only. None: the address that was written may be private,
            as that of an intranet server is, but no redirect leads from a public address to a private one.
        deadline: Holds the sockets.
    """

    def __init__(self, allow_private: bool | None, deadline: SocketDeadline) -> None:
        self.allow_private = allow_private
        self.deadline = deadline
        self._seen_public = False

    def check(self, host: str, addresses: Sequence[str]) -> None:
        """Check the addresses of a host; PrivateAddress if one of them is not allowed."""
        public = all(map(is_public, addresses))
        if not public and (self.allow_private is False or (self.allow_private is None and self._seen_public)):
            raise PrivateAddress(f"{host} is an address of this machine or of a private network")
        self._seen_public |= public

    def check_redirect(self, old: str, new: str) -> None:
        """Check a redirect by the names of its hosts: behind a proxy, only the proxy connects to them."""
        if self.allow_private is None and not _has_private_address(old) and _has_private_address(new):
            raise PrivateAddress(f"{shown(old)} leads to {shown(new)}, an address of a private network")

    def connect(self, target: tuple[str, int], timeout: Any, source: object = None) -> socket.socket:
        """Return a connection to one of the addresses that a host has now: those that were checked, and no others."""
        host, port = target
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.check(host, [str(address[0]) for *_, address in infos])
        failure: OSError | None = None
        for family, kind, protocol, _, address in infos:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(timeout)
                self.deadline.hold(connection)
                connection.connect(address)
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure or socket.gaierror(socket.EAI_NONAME, f"{host} has no address")

    def opener(self, max_redirects: int) -> urllib.request.OpenerDirector:
        """Return an opener of URLs that connects through this guard."""
        redirects = _SafeRedirects(self)
        redirects.max_redirections = redirects.max_repeats = max_redirects  # type: ignore[misc]
        # Without a proxy if only public addresses are allowed: behind one, nobody here sees the address.
        proxies = [urllib.request.ProxyHandler({})] if self.allow_private is False else []
        return urllib.request.build_opener(redirects, *proxies, _Http(self.connect), _Https(self.connect))


def _has_private_address(url: str) -> bool:
    """Return whether a URL's host has a private address, as far as this machine can resolve it."""
    try:
        infos = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return False
    return not all(is_public(str(address[0])) for *_, address in infos)


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and from http to http, within the guard."""

    def __init__(self, guard: AddressGuard) -> None:
        self.guard = guard

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
                f"the redirect from {shown(req.full_url)} to {shown(newurl)} is not followed", "download it yourself"
            )
        self.guard.check_redirect(req.full_url, newurl)
        fp.close()  # the body of a redirect may be endless, and would be read
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Http(urllib.request.HTTPHandler):
    """Opens http with the guard's sockets."""

    def __init__(self, connect: Callable[..., socket.socket]) -> None:
        super().__init__()
        self.connect = connect

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_connection, http.client.HTTPConnection, self.connect), req)


class _Https(urllib.request.HTTPSHandler):
    """Opens https with the guard's sockets."""

    def __init__(self, connect: Callable[..., socket.socket]) -> None:
        super().__init__(context=_tls())
        self.connect = connect

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        make = functools.partial(_connection, http.client.HTTPSConnection, self.connect, context=_tls())
        return self.do_open(make, req)


def _connection(kind: Any, connect: Callable[..., socket.socket], host: str, **options: Any) -> Any:
    connection = kind(host, **options)
    connection._create_connection = connect  # http.client calls it for a socket, before proxy tunnel and TLS
    return connection


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return the TLS settings, with this machine's certificates, which take a while to read."""
    return ssl.create_default_context()
