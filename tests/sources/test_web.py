"""Images and archives from the web: a real server on this machine, and what must never be asked."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import pytest

from image_classifier.errors import ConfigError, SourceError, UnreadableImage
from image_classifier.sources import addresses
from image_classifier.sources.addresses import is_public
from image_classifier.sources.image_source import ImageSource
from image_classifier.sources.inputs import Inputs
from image_classifier.sources.web import UrlLimits, WebClient
from tests.sources.test_inputs import as_tar, as_zip, picture


class Handler(BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {}
    moved: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path in self.moved:
            self.send_response(302)
            self.send_header("Location", self.moved[path])
            self.end_headers()
        elif path in self.files:
            self.send_response(200)
            if path != "/endless.png":
                self.send_header("Content-Length", str(len(self.files[path]) + (10 if path == "/cut.png" else 0)))
            self.end_headers()
            self._send(path)
        elif path == "/rude.png":
            self.send_response(404, "\x1b[2J gone \x9b")
            self.end_headers()
        else:
            self.send_error(404)

    def _send(self, path: str) -> None:
        try:
            self.wfile.write(self.files[path])
            while path == "/endless.png":
                self.wfile.write(bytes(2**16))
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    as_zip(tmp_path / "a.zip", [("1.png", picture(1)), ("2.png", picture(2))])
    as_tar(tmp_path / "a.tar.gz", [("1.png", picture(1))])
    archives = {f"/{name}": (tmp_path / name).read_bytes() for name in ("a.zip", "a.tar.gz")}
    Handler.files = archives | {
        "/1.png": picture(1),
        "/download": picture(2),
        "/any": archives["/a.zip"],
        "/cut.png": b"x",
        "/endless.png": b"",
    }
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    own = f"http://127.0.0.1:{web.server_port}"
    Handler.asked = []
    Handler.moved = {"/loop.png": "/loop.png", "/moved.png": "/1.png", "/file.png": "file:///etc/passwd"}
    Handler.moved |= {f"/hop{number}.png": f"/hop{number + 1}.png" for number in range(8)}
    thread = threading.Thread(target=web.serve_forever, args=(0.02,))
    thread.start()
    yield own
    web.shutdown()
    web.server_close()
    thread.join()


def found(items: list[str], web: WebClient, stdin: bytes = b"") -> list[ImageSource]:
    return list(Inputs(items, lambda: io.BytesIO(stdin), web=web))


def reason(item: ImageSource) -> str:
    with pytest.raises(UnreadableImage) as caught:
        item.content()
    return caught.value.reason


ALLOWED = WebClient(UrlLimits(timeout_s=5), allow_private=True)


def test_images_and_archives_are_fetched(server: str) -> None:
    items = found(
        [f"{server}/1.png?key=secret", f"{server}/download", f"{server}/a.zip", f"{server}/a.tar.gz", f"{server}/any"],
        ALLOWED,
    )
    own = [item.name.removeprefix(server) for item in items]
    assert own == [
        "/1.png?key=secret",
        "/download",
        "/a.zip/1.png",
        "/a.zip/2.png",
        "/a.tar.gz/1.png",
        "/any/1.png",
        "/any/2.png",
    ]
    assert [item.content() for item in items] == [picture(number) for number in (1, 2, 1, 2, 1, 1, 2)]
    assert [item.content() for item in found(["-"], ALLOWED, f"{server}/1.png\n{server}/moved.png".encode())] == [
        picture(1)
    ] * 2


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("/none.png", "answers 404"),
        ("/none", "answers 404"),
        ("/rude.png", r"answers 404 \x1b[2J gone \x9b"),
        ("/cut.png", "broke off after 1 of 11 bytes"),
        ("/endless.png", "larger than"),
        ("/loop.png", "redirect"),
        ("/hop0.png", "redirect"),
        ("/file.png", "not allowed"),
    ],
)
def test_what_cannot_be_fetched_is_a_row_that_says_why(server: str, place: str, says: str) -> None:
    web = WebClient(UrlLimits(timeout_s=5, max_redirects=3), allow_private=True)
    (item,) = found([server + place], web)
    assert says in reason(item)


def test_letters_of_all_languages_and_spaces_can_be_asked_for(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("/ü 1.png", "/%C3%BC.png", "/odd \udcff.png"):
        Handler.files[quote(name, safe="/%", errors="surrogateescape")] = picture(3)
        (item,) = found([f"{server}{name}?q=ö#part"], ALLOWED)
        assert item.content() == picture(3) and item.name == f"{server}{name}?q=ö#part"
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: asked.append((host, port)) or [])
    for address in ("http://bücher.example:81/1.png", "http://bücher.example/1.png"):
        assert "has no address" in reason(found([address], ALLOWED)[0])
    assert asked == [("xn--bcher-kva.example", 81), ("xn--bcher-kva.example", 80)]
    assert "cannot be fetched" in reason(found([f"http://{'ü' * 99}.example/1.png"], ALLOWED)[0])


def test_an_archive_that_is_too_large_is_a_row(server: str) -> None:
    (item,) = found([f"{server}/a.zip"], WebClient(UrlLimits(max_bytes=100), allow_private=True))
    assert "larger than" in reason(item)


@pytest.mark.slow
def test_a_server_that_falls_silent_is_left() -> None:
    start = time.monotonic()
    web = WebClient(UrlLimits(timeout_s=0.3), allow_private=True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (item,) = found([f"http://127.0.0.1:{silent.getsockname()[1]}/1.png"], web)
        assert "cannot be fetched" in reason(item)
    assert time.monotonic() - start < 3


def test_addresses_of_this_machine_are_refused_by_default(server: str) -> None:
    port = server.rpartition(":")[2]
    for place in (
        server,
        f"http://localhost:{port}",
        f"http://[::ffff:127.0.0.1]:{port}",
        f"http://2130706433:{port}",
        f"http://0x7f.1:{port}",
    ):
        for name in ("1.png", "a.zip", "download"):
            (item,) = found([f"{place}/{name}"], WebClient(UrlLimits(timeout_s=5)))
            assert "private network" in reason(item)
    assert not Handler.asked
    assert found([f"{server}/1.png"], ALLOWED)[0].content() == picture(1)  # the server was there all the time


def test_a_redirect_to_this_machine_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address counts as public, the one it leads to does not."""
    host, port = "127.0.0.1", server.rpartition(":")[2]
    Handler.moved["/away.png"] = f"http://127.0.0.2:{port}/1.png"
    monkeypatch.setattr(addresses, "is_public", lambda address: address == host)
    client = WebClient(UrlLimits(timeout_s=5))
    assert client.image(f"{server}/moved.png", 10**6) == picture(1)
    with pytest.raises(UnreadableImage, match="private network"):
        client.image(f"{server}/away.png", 10**6)


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(SourceError, match="private network"):
        WebClient(UrlLimits()).fetch("http://example.org/1.png", io.BytesIO(), 10)


PRIVATE_4 = (
    "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 0.0.0.0 100.64.0.1 224.0.0.1 "
    "255.255.255.255 240.0.0.1 168.63.129.16 192.0.0.192"
)
PRIVATE_6 = (
    "::1 :: fe80::1%eth0 fc00::1 ff02::1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: ::ffff:169.254.169.254 "
    "fec0::1 64:ff9b::a83f:8110"
)


@pytest.mark.parametrize("address", [*PRIVATE_4.split(), *PRIVATE_6.split()])
def test_private_addresses_are_known(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_public_addresses_are_known(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("url", ["http://user:password@host/1.png", "http:///1.png", "https://["])
def test_what_is_no_address_is_a_row(url: str) -> None:
    (item,) = found([url], ALLOWED)
    assert "is not fetched" in reason(item)
    assert "password" not in reason(item)


def test_limits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="fetch"):
        UrlLimits(timeout_s=0)
