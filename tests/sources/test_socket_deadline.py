"""Servers that never come to an end: the time of a download holds, and Ctrl-C ends it."""

from __future__ import annotations

import io
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from image_classifier.errors import SourceError, UnreadableImage
from image_classifier.inference.triton.over_http import HttpChannel
from image_classifier.inference.triton.protocol import Address, Refused
from image_classifier.sources.image_source import ImageSource
from image_classifier.sources.web import UrlLimits, WebClient
from tests.conftest import ROOT
from tests.inference.test_predictor import predictor

SILENT = b"", b""
ENDLESS = {
    "headers": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
    "status": (b"HTTP/1.1 ", b"2"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "silent": SILENT,
}
Drip = Callable[[tuple[bytes, bytes]], str]


@pytest.fixture
def drip() -> Iterator[Drip]:
    """`drip((first, again))` is the address of a server that sends the second piece for ever."""
    over, threads = threading.Event(), list[threading.Thread]()

    def begin(pieces: tuple[bytes, bytes]) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        server.settimeout(5)

        def serve() -> None:
            with server, suppress(OSError), server.accept()[0] as connection:
                connection.sendall(pieces[0])
                while not over.wait(0.02):
                    connection.sendall(pieces[1])

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield begin
    over.set()
    for thread in threads:
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENDLESS)
def test_no_download_takes_longer_than_it_may(drip: Drip, kind: str) -> None:
    web, start = WebClient(UrlLimits(timeout_s=3, total_s=0.3), allow_private=True), time.monotonic()
    with pytest.raises(SourceError, match=r"takes longer than 0\.3 s"):
        web.fetch(f"{drip(ENDLESS[kind])}/1.png", io.BytesIO(), 10**9)
    assert time.monotonic() - start < 2


def test_a_connection_that_does_not_come_about_takes_no_longer(drip: Drip) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, socket.create_connection(server.getsockname()):
        web, start = WebClient(UrlLimits(timeout_s=3, total_s=0.3), allow_private=True), time.monotonic()
        with pytest.raises(SourceError, match=r"takes longer than 0\.3 s"):
            web.fetch(f"http://127.0.0.1:{server.getsockname()[1]}/1.png", io.BytesIO(), 10**9)
        assert time.monotonic() - start < 2


def test_what_is_fetched_when_the_run_ends_is_left(drip: Drip) -> None:
    web, start = WebClient(UrlLimits(timeout_s=9), allow_private=True), time.monotonic()
    threading.Timer(0.1, web.stop).start()
    with pytest.raises(UnreadableImage, match="the run was stopped"):
        web.image(f"{drip(SILENT)}/1.png", 10**9)
    assert time.monotonic() - start < 2
    assert pickle.loads(pickle.dumps(web)) == web


def test_nobody_waits_for_what_is_being_read_when_the_answers_are_left() -> None:
    """What Ctrl-C comes to."""
    goes_on = threading.Event()

    def slow() -> bytes:
        goes_on.wait(5)
        return b""

    answers, start = (
        predictor(batch_size=1).answers([ImageSource.missing("1", "no"), *[ImageSource("2", slow)] * 9]),
        time.monotonic(),
    )
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    took = time.monotonic() - start
    goes_on.set()
    assert took < 2


@pytest.mark.parametrize("kind", ["headers", "continue", "chunk"])
def test_no_answer_of_a_model_server_takes_longer_than_it_may(drip: Drip, kind: str) -> None:
    start = time.monotonic()
    with pytest.raises(Refused, match=r"no answer within 0\.3 s"):
        HttpChannel(Address.of(drip(ENDLESS[kind]))).ready("m", 0.3)
    assert time.monotonic() - start < 2


@pytest.mark.slow
def test_ctrl_c_ends_a_run_at_once(trained: Path) -> None:
    line = [
        sys.executable,
        str(ROOT / "commands.py"),
        "infer",
        "--checkpoint_name",
        "digits",
        "allow_private_urls=true",
        "--images",
    ]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        run = subprocess.Popen(
            [*line, f"http://127.0.0.1:{silent.getsockname()[1]}/1.png"], cwd=trained, stderr=subprocess.PIPE
        )
        with silent.accept()[0]:
            time.sleep(0.5)
            start = time.monotonic()
            run.send_signal(signal.SIGINT)
            _, said = run.communicate(timeout=30)
    assert (run.returncode, said) == (130, b"stopped by Ctrl-C\n") and time.monotonic() - start < 3
