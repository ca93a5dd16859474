"""A real server, started once a test process, and a client that sees what a client sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, write_image
from tests.serving.page_stub import StubServer
from tests.serving.page_tab import Open, Tab


@dataclass(frozen=True)
class Reply:
    """One answer."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


@dataclass(frozen=True)
class Server:
    """A running `commands.py serve`."""

    process: subprocess.Popen[str]
    host: str
    port: int
    log: Path

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60,
    ) -> Reply:
        connection = HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, {key.lower(): value for key, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def send(
        self,
        path: str,
        *files: tuple[str, bytes],
        headers: Mapping[str, str] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> Reply:
        """Files, and texts before them, as a browser's form sends them."""
        body, kind = form(*files, texts=texts)
        return self.ask("POST", path, body, {"Content-Type": kind, **(headers or {})})

    def gauge(self, name: str) -> float:
        """A figure of /metrics, the first of that name."""
        lines = self.ask("GET", "/metrics").content.decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"image_classifier_{name}")).rpartition(" ")[2])

    def end(self, with_signal: int = signal.SIGTERM) -> int:
        """Stop it as an orchestrator does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        code = self.process.wait(timeout=60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def form(*files: tuple[str, bytes], field: str = "images", texts: Mapping[str, str] | None = None) -> tuple[bytes, str]:
    """The body of a form with these texts and files, and its content type."""
    parts = [
        f'--frontier\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
        for name, text in (texts or {}).items()
    ]
    parts += [
        b'--frontier\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n%s\r\n" % (field.encode(), name.encode(), content)
        for name, content in files
    ]
    return b"".join(parts) + b"--frontier--\r\n", "multipart/form-data; boundary=frontier"


def start_server(
    folder: Path, checkpoint: Path, *line: str, host: str = "127.0.0.1", env: Mapping[str, str] | None = None
) -> Server:
    """Start one and wait until it says where it listens, which is when all models answered."""
    log = folder / f"serve-{os.urandom(4).hex()}.log"
    words = [sys.executable, str(ROOT / "commands.py"), "serve", str(checkpoint), "--port", "0", "--host", host, *line]
    with log.open("w") as errors:
        process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said.startswith("serving "), log.read_text()
    address, _, port = said.split()[1].removeprefix("http://").rpartition(":")
    return Server(process, address.strip("[]"), int(port), log)


@pytest.fixture(scope="session")
def server(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The digits as they are served by default."""
    found = start_server(tmp_path_factory.mktemp("serve"), digits_bundle)
    yield found
    assert found.end() == 0, found.log.read_text()
    assert "Traceback" not in found.log.read_text()


KEY = "0123456789abcdef-correct"


@pytest.fixture(scope="session")
def strict(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The digits behind small limits and a key."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "keys.txt").write_text(f"# two keys\n{KEY}\nanother-key-0123456789\n")
    access = ["--access.keys_file", "keys.txt", "access.cors_origins=[https://example.org]"]
    request = [f"request.{name}=1" for name in ("body_s", "headers_s", "keep_alive_s")]
    request += ["request.max_bytes=20000", "request.max_images=3", "request.max_memory=50000"]
    found = start_server(
        folder, digits_bundle, *access, *request, "queue=3", "limits.max_pixels=10000", "limits.formats=[PNG,JPEG]"
    )
    yield found
    assert found.end(signal.SIGINT) == 0, found.log.read_text()
    assert "Traceback" not in found.log.read_text()


@pytest.fixture(scope="session")
def digit(digits_bundle: Path) -> bytes:
    """A real seven."""
    return next(path for path in sorted((digits_bundle.parents[1] / "data/digits/test/7").iterdir())).read_bytes()


@pytest.fixture
def stub() -> Iterator[StubServer]:
    server = StubServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def opened(chromium: Any, stub: StubServer) -> Iterator[Open]:
    """Opens the page; when the test ends it must have been quiet."""
    all_opened: list[Tab] = []

    def open_it(**how: Any) -> Tab:
        all_opened.append(Tab(chromium, stub.address, **how))
        return all_opened[-1]

    yield open_it
    for each in all_opened:
        each.context.close()
    assert [each.complaints for each in all_opened if not each.quiet()] == []


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, size=40: write_image(tmp_path / name, sum(map(ord, name)), size)
