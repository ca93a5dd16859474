"""A server of one's own to be mistreated, and clients that do it: bytes as they please, many at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

FORM = b"Content-Type: multipart/form-data; boundary=f\r\n"
JSON = b"Content-Type: application/json\r\n"
HANG_S = 30.0  # whoever gets no answer for so long gets none


@dataclass(frozen=True)
class Victim:
    """A running `commands.py serve`."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def model_pids(self) -> list[int]:
        """Its model processes."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()  # each child belongs to the thread that started it
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]

    def connect(self, timeout_s: float = HANG_S) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)

    def raw(self, content: bytes, timeout_s: float = HANG_S) -> bytes:
        """What it says to these bytes until it closes."""
        with closing(self.connect(timeout_s)) as connection:
            with suppress(ConnectionError):
                connection.sendall(content)
            return all_of(connection)

    def ask(
        self, path: str, body: bytes | None = None, kind: bytes = FORM, method: str = "", more: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of one honest request."""
        verb = method or ("GET" if body is None else "POST")
        said = self.raw(head(verb, path, body, kind, more + b"Connection: close\r\n") + (body or b""))
        return reply_of(said)

    def predict(self, image: bytes, path: str = "/predict") -> dict[str, Any]:
        """The answer for one image."""
        status, _, content = self.ask(path, form(image))
        assert status == 200, (status, content)
        found: dict[str, Any] = json.loads(content)
        return found

    def gauge(self, name: str) -> float:
        """A figure of /metrics, the first of that name."""
        lines = self.ask("/metrics")[2].decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"image_classifier_{name}")).rpartition(" ")[2])

    def memory(self) -> tuple[float, float]:
        """MiB of the server and of its model processes."""
        return resident(self.process.pid), sum(map(resident, self.model_pids))

    def words(self) -> list[str]:
        """Its log but for the lines about requests."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if not line.startswith("{")]

    def requests(self) -> list[dict[str, Any]]:
        """The lines about requests."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(HANG_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()


def resident(pid: int) -> float:
    """MiB of a process; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


@contextmanager
def victim(folder: Path, bundle: Path, *line: str, wrap: tuple[str, ...] = (), **options: Any) -> Iterator[Victim]:
    """A server of this bundle, ended with SIGTERM: then its exit code is 0 and its log holds no traceback."""
    found = begun(folder, bundle, *line, wrap=wrap, **options)
    try:
        wait_until_ready(found)
        yield found
        assert found.end() == 0, "\n".join(found.words())
        assert "Traceback" not in "\n".join(found.words()), "\n".join(found.words())
    finally:
        found.end(signal.SIGKILL)


def begun(folder: Path, bundle: Path, *line: str, wrap: tuple[str, ...] = (), port: int = 0, **options: Any) -> Victim:
    """One that is starting."""
    log = folder / f"serve-{os.urandom(4).hex()}.log"
    port = port or free_port()
    words = [*wrap, sys.executable, str(ROOT / "commands.py"), "serve", str(bundle), "--port", str(port), *line]
    with log.open("w") as errors:
        process = subprocess.Popen(
            words, cwd=folder, **{"stdout": subprocess.PIPE, "stderr": errors, "text": True, **options}
        )
    return Victim(process, port, log)


def wait_until_ready(found: Victim) -> None:
    assert found.process.stdout is not None
    said = found.process.stdout.readline()
    assert said.startswith("serving "), "\n".join(found.words())


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def all_of(connection: socket.socket) -> bytes:
    """What comes until the other side closes, also where it does so rudely."""
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def form(*images: bytes) -> bytes:
    """The body of a form; its boundary is f."""
    parts = [
        b'--f\r\nContent-Disposition: form-data; name="images"; filename="%d.png"\r\n\r\n%s\r\n' % (place, image)
        for place, image in enumerate(images)
    ]
    return b"".join(parts) + b"--f--\r\n"


def head(method: str, path: str, body: bytes | None = None, kind: bytes = FORM, more: bytes = b"") -> bytes:
    """The head of a request with this body."""
    length = b"" if body is None else kind + b"Content-Length: %d\r\n" % len(body)
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + length + more + b"\r\n"


def reply_of(said: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of what was said on a connection that closes after it; status 0 where nothing was."""
    before, _, content = said.partition(b"\r\n\r\n")
    first, *lines = before.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return (int(first.split()[1]) if first else 0), headers, content


def until(condition: Callable[[], bool], what: str, seconds: float = HANG_S) -> None:
    """Wait for a condition; the time is one after which it will never be."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


async def exchange(port: int, request: bytes, timeout_s: float = 2 * HANG_S) -> tuple[int, bytes]:
    """Return status and content of one request; the status is 0 without an answer, -1 without a connection."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    except ConnectionError:
        return -1, b""
    try:
        async with asyncio.timeout(timeout_s):
            writer.write(request)
            said = await reader.read(-1)
    except ConnectionError:
        return 0, b""
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    status, _, content = reply_of(said)
    return status, content


async def keep_asking(port: int, request: bytes, clients: int, going: Callable[[], bool]) -> list[tuple[int, bytes]]:
    """What so many clients get that ask again and again, each on connections of its own, while it is `going`."""
    found: list[tuple[int, bytes]] = []

    async def one() -> None:
        while going():
            found.append(await exchange(port, request))

    await asyncio.gather(*(one() for _ in range(clients)))
    return found
