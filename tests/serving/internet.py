"""A fake internet for a server under test: names and a public address that lead only to a web server of the test.

Only system calls are replaced: the name look-up, and the connection to an allowed address.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECRET = b"known-to-the-private-network-only"
LARGE = 90_000  # bytes, which are no picture

_SITECUSTOMIZE = """
import socket
PUBLIC = "93.184.216.34"
NAMES = {"public.example": [PUBLIC], "private.example": ["127.0.0.1"], "both.example": [PUBLIC, "10.0.0.1"]}
TURNS = {"turning.example": [[PUBLIC], ["127.0.0.1"]]}
real_lookup, real_connect = socket.getaddrinfo, socket.socket.connect

def lookup(host, *arguments, **options):
    addresses = TURNS[host].pop(0) if host in TURNS else NAMES.get(host, [host])
    return [found for address in addresses for found in real_lookup(address, *arguments, **options)]

def connect(self, address):
    return real_connect(self, ("127.0.0.1", address[1]) if address[0] == PUBLIC else address)

socket.getaddrinfo, socket.socket.connect = lookup, connect
"""


class Site:
    """What lies on the internet, who asked for it under which name, and how many connections it keeps waiting."""

    def __init__(self, port: int, image: bytes) -> None:
        self.port, self.image = port, image
        self.asked: list[tuple[str, str]] = []
        self.over, self.holding = threading.Event(), 0
        self.lock = threading.Lock()

    def url(self, path: str, host: str = "public.example") -> str:
        return f"http://{host}:{self.port}{path}"


class _Handler(BaseHTTPRequestHandler):
    server: Any  # with its `site`

    def do_GET(self) -> None:
        site: Site = self.server.site
        site.asked.append((self.headers["Host"].rpartition(":")[0], self.path))
        path, _, rest = self.path.partition("?")
        with suppress(OSError):
            getattr(self, f"_{path.strip('/').partition('.')[0]}", self._nothing)(rest)

    def _begin(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def _nothing(self, rest: str) -> None:
        self.send_response(404, "\x1b[2J gone")
        self.end_headers()
        self.wfile.write(SECRET)

    def _7(self, rest: str) -> None:
        self._begin(200, Content_Length=len(self.server.site.image))
        self.wfile.write(self.server.site.image)

    def _secret(self, rest: str) -> None:
        self._begin(200, Content_Length=len(SECRET))
        self.wfile.write(SECRET)

    def _large(self, rest: str) -> None:
        self._begin(200, Content_Length=LARGE)
        self.wfile.write(bytes(LARGE))

    def _huge(self, rest: str) -> None:
        self._begin(200, Content_Length=10**12)

    def _cut(self, rest: str) -> None:
        self._begin(200, Content_Length=LARGE)
        self.wfile.write(b"half")

    def _endless(self, rest: str) -> None:
        self._begin(200)
        self._write_for_ever()

    def _drip(self, rest: str) -> None:
        self._begin(200)
        while not self.server.site.over.wait(0.05):
            self.wfile.write(b"x")

    def _silent(self, rest: str) -> None:
        self.connection.recv(1)

    def _held(self, rest: str) -> None:
        """Nearly all of it, and then nothing until the other side goes away."""
        site: Site = self.server.site
        self._begin(200, Content_Length=LARGE + 1)
        self.wfile.write(bytes(LARGE))
        with site.lock:
            site.holding += 1
        try:
            self.connection.recv(1)
        finally:
            with site.lock:
                site.holding -= 1

    def _to(self, rest: str) -> None:
        self._begin(302, Location=rest)

    def _loop(self, rest: str) -> None:
        self._begin(302, Location="/loop")

    def _hops(self, rest: str) -> None:
        self._begin(302, Location=f"/hops?{int(rest) - 1}" if int(rest) else "/7.png")

    def _flood(self, rest: str) -> None:
        self._begin(302, Location="/7.png")
        self._write_for_ever()

    def _write_for_ever(self) -> None:
        while not self.server.site.over.is_set():
            self.wfile.write(bytes(2**16))

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def internet(image: bytes) -> Iterator[Site]:
    """A web server that plays it."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    site = web.site = Site(web.server_port, image)  # type: ignore[attr-defined]
    thread = threading.Thread(target=web.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield site
    finally:
        site.over.set()
        web.shutdown()
        web.server_close()
        thread.join()


def environment(folder: Path, site: Site) -> Mapping[str, str]:
    """Of a program for which it is the internet; it names a proxy too, which must not be asked."""
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return {**os.environ, "PYTHONPATH": str(folder), "http_proxy": f"http://127.0.0.1:{site.port}"}
