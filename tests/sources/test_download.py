from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from image_classifier.errors import SourceError, StorageError
from image_classifier.sources import download as module
from image_classifier.sources.addresses import shown
from image_classifier.sources.download import Download
from image_classifier.sources.socket_deadline import SocketDeadline
from tests.conftest import ROOT

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(ThreadingHTTPServer):
    """Serves `content` at every path; a list of `cuts` says after how many bytes the next answers break off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.modified = CONTENT, '"one"', ""
        self.ranges, self.length, self.status, self.kind, self.location = True, True, 200, "application/zip", ""
        self.cuts: list[int] = []
        self.pause_s, self.stall_s = 0.0, 0.0
        self.seen: list[dict[str, str]] = []
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/files/set.zip"

    def handle_error(self, *_: object) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server = self.server
        self.close_connection = True
        server.seen.append({name.lower(): value for name, value in self.headers.items()})
        if server.status != 200 or server.location:
            self.send_response(302 if server.location else server.status)
            if server.location:
                self.send_header("Location", server.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        version = server.etag or server.modified
        start = (
            int((self.headers.get("Range") or "bytes=0-")[6:-1])
            if server.ranges and self.headers.get("If-Range") == version
            else 0
        )
        if start and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.head(start, len(server.content))
        self.body(server.content[start:])

    def head(self, start: int, total: int) -> None:
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", self.server.kind)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if self.server.length:
            self.send_header("Content-Length", str(total - start))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        if self.server.modified:
            self.send_header("Last-Modified", self.server.modified)
        self.end_headers()

    def body(self, rest: bytes) -> None:
        rest = rest[: self.server.cuts.pop(0)] if self.server.cuts else rest
        time.sleep(self.server.stall_s)
        for start in range(0, len(rest), 65536):
            self.wfile.write(rest[start : start + 65536])
            self.server.sent += len(rest[start : start + 65536])
            time.sleep(self.server.pause_s)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "downloads" / "set.zip"


def fetch(server: Server, target: Path, checksum: str = "", **options: float) -> Path:
    return Download(server.url, target, checksum, **{"timeout_s": 10, "pause_s": 0.01, **options})()


def assert_alone(target: Path) -> None:
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_file_is_fetched_once(server, target):
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert fetch(server, target, f"sha256:{digest.upper()}") == target
    assert target.read_bytes() == CONTENT
    assert fetch(server, target, f"md5:{hashlib.md5(CONTENT).hexdigest()}") == target
    assert len(server.seen) == 1
    assert_alone(target)


@pytest.mark.parametrize("validator", ["etag", "date"])
def test_what_broke_off_is_gone_on_from(server, target, validator):
    if validator == "date":
        server.etag, server.modified = 'W/"weak"', "Sat, 21 Nov 2026 10:00:00 GMT"
        server.etag = ""
    server.cuts = [300_000, 200_000, 1]
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert [request.get("range") for request in server.seen] == [
        None,
        "bytes=300000-",
        "bytes=500000-",
        "bytes=500001-",
    ]
    assert server.sent == len(CONTENT)
    assert_alone(target)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(0, len(CONTENT)), max_size=6),
    ranges=st.booleans(),
    etag=st.sampled_from(['"one"', 'W/"weak"', ""]),
)
def test_wherever_it_breaks_off_the_file_is_whole(server, target, cuts, ranges, etag):
    shutil.rmtree(target.parent, ignore_errors=True)
    server.cuts, server.ranges, server.etag = list(cuts), ranges, etag
    fetch(server, target, attempts=10)
    assert target.read_bytes() == CONTENT
    assert_alone(target)


def test_a_part_of_an_older_version_is_thrown_away(server, target):
    server.cuts = [300_000]
    with pytest.raises(SourceError, match="broke off after 300,000 of 1,048,576 bytes"):
        fetch(server, target, attempts=1)
    assert (target.parent / "set.zip.part").stat().st_size == 300_000
    server.content, server.etag = CONTENT[::-1], '"two"'
    fetch(server, target)
    assert target.read_bytes() == CONTENT[::-1]
    assert_alone(target)


def test_a_part_of_another_url_is_thrown_away(server, target):
    server.cuts = [300_000]
    with pytest.raises(SourceError):
        fetch(server, target, attempts=1)
    Download(f"{server.url}?version=2", target)()
    assert "range" not in server.seen[-1]
    assert target.read_bytes() == CONTENT


def test_a_kill_just_before_the_renaming_costs_nothing(server, target):
    server.cuts = [len(CONTENT) - 1]
    with pytest.raises(SourceError):
        fetch(server, target, attempts=1)
    with (target.parent / "set.zip.part").open("ab") as file:
        file.write(CONTENT[-1:])
    server.sent = 0
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.sent == 0


def test_a_length_that_is_not_said_is_taken_as_it_comes(server, target):
    server.length = False
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_a_wrong_checksum_removes_what_was_fetched_but_not_what_was_there(server, target):
    with pytest.raises(SourceError, match=r"has the sha256 [0-9a-f]{64}, not 0{64}: it was removed"):
        fetch(server, target, f"sha256:{'0' * 64}")
    assert [path.name for path in target.parent.iterdir() if "lock" not in path.name] == []
    target.write_bytes(b"mine")
    with pytest.raises(SourceError, match=r"has the md5 .*: delete it to fetch it again"):
        fetch(server, target, f"md5:{'0' * 32}")
    assert target.read_bytes() == b"mine"
    with pytest.raises(SourceError, match="is no checksum"):
        fetch(server, target, "sha256:abc")


def test_what_the_server_refuses(server, target):
    server.status = 404
    with pytest.raises(
        SourceError,
        match=r"set\.zip answers 404 Not Found: find the file elsewhere and put it at '.*downloads/set\.zip'",
    ):
        fetch(server, target)
    assert len(server.seen) == 1
    server.status = 503
    with pytest.raises(SourceError, match="answers 503"):
        fetch(server, target, attempts=3)
    assert len(server.seen) == 4
    server.status, server.kind = 200, "text/html; charset=utf-8"
    with pytest.raises(SourceError, match="answers with a web page, not a file"):
        fetch(server, target)


def test_redirects_stay_on_the_web(server, target, tmp_path):
    (tmp_path / "secret").write_text("x")
    for location in (f"file://{tmp_path}/secret", "ftp://127.0.0.1/secret"):
        server.location = location
        with pytest.raises(SourceError, match="is not followed|is not allowed"):
            fetch(server, target)
    for url in (
        "ftp://host/set.zip",
        "file:///etc/passwd",
        "https://",
        "https://user:secret@host/set.zip",
        "http://[::1/set.zip",
    ):
        with pytest.raises(SourceError, match="is not fetched") as error:
            Download(url, target)()
        assert "secret" not in str(error.value)


def test_urls_are_shown_without_secrets():
    assert shown("https://user:secret@host:8080/a/b.zip?token=secret#secret") == "https://host:8080/a/b.zip"


def test_a_server_that_stalls(server, target):
    server.stall_s = 30
    start = time.monotonic()
    with pytest.raises(SourceError, match="cannot be downloaded .*timed out"):
        fetch(server, target, timeout_s=0.2, attempts=2)
    assert time.monotonic() - start < 10
    server.stall_s = 0


def test_no_network_says_so_at_once(target, monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(SocketDeadline, "wait", lambda *_: pytest.fail("waited"))
    with pytest.raises(
        SourceError,
        match=r"^https://\S+ cannot be downloaded \(Name or service not known\): no network\? "
        r".* put it at '.*set\.zip'$",
    ):
        Download("https://images.example/set.zip", target)()


def test_nobody_listens(target):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/set.zip"
    with pytest.raises(SourceError, match="refused"):
        Download(url, target, attempts=2, pause_s=0.01)()


def test_the_disk_is_looked_at_first(server, target, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(StorageError, match=r"'set\.zip' needs 1\.0 MB"):
        fetch(server, target)
    assert server.sent <= len(CONTENT)
    assert not target.exists()


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "downloads").write_text("in the way")
    with pytest.raises(StorageError, match="a file has that name"):
        fetch(server, tmp_path / "downloads" / "set.zip")


def test_two_runs_fetch_it_once(server, target):
    server.pause_s = 0.01
    threads = [threading.Thread(target=fetch, args=(server, target)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert server.sent == len(CONTENT)


def test_a_killed_download_is_taken_up_again(server, target):
    server.pause_s = 0.1
    imports = "from image_classifier.sources.download import Download; from pathlib import Path"
    code = f"{imports}; Download({server.url!r}, Path({str(target)!r}))()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    part = target.parent / "set.zip.part"
    end = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 0) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert 0 < kept < len(CONTENT)
    assert not target.exists()
    server.pause_s = 0
    fetch(server, target, f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")
    assert server.seen[-1]["range"] == f"bytes={kept}-"
    assert target.read_bytes() == CONTENT
