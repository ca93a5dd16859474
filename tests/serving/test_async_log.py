"""Asynchronous log lines: written in order, and a slow reader never blocks the writer."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.serving import async_log
from image_classifier.serving.async_log import AsyncLineWriter, AsyncStream
from image_classifier.serving.worker import framing
from tests.conftest import ROOT


@given(st.lists(st.text(max_size=50), max_size=50))
def test_all_is_written_in_its_order(texts: list[str]) -> None:
    written: list[str] = []
    made = AsyncLineWriter("test", written.append)
    for text in texts:
        made.put(text)
    made.close()
    assert written == texts


def test_what_nobody_takes_is_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(async_log, "_MAX_WAITING", 5)
    taken, written = threading.Event(), []

    def write(line: str) -> None:
        taken.wait()
        written.append(line)

    made = AsyncLineWriter("the log", write)
    for number in range(100):
        made.put(str(number))
    taken.set()
    made.close()
    left_out = 100 - len(written)
    assert 5 <= len(written) <= 7 and written == sorted(written, key=int)
    assert f"{left_out} lines were dropped" in caplog.text


def test_an_error_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def write(line: str) -> None:
        raise OSError(28, "No space left on device")

    made = AsyncLineWriter("the log", write)
    for _ in range(3):
        made.put("")
    made.close()
    assert caplog.text.count("cannot write a line (No space left on device)") == 1


def test_a_pipe_that_nobody_reads_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_log, "_FLUSH_S", 0.1)
    reading, writing = os.pipe()
    stream = AsyncStream(writing)
    logger = logging.Logger("aside")
    logger.addHandler(logging.StreamHandler(stream))
    for number in range(3000):
        logger.info("%d %s", number, "x" * 100)
    stream.end()  # it is stuck, and this ends
    found = b""
    while b"2999 " not in found:
        found += os.read(reading, 2**16)
    assert [int(line.split()[0]) for line in found.decode().splitlines() if line.endswith("xx")][:2999] == list(
        range(2999)
    )
    os.close(reading)


def test_a_models_process_that_fails_says_why_before_it_ends() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(framing.encode({"what": "is no order"}))
        line = [sys.executable, "-m", "image_classifier.serving.worker.main", str(theirs.fileno())]
        done = subprocess.run(
            line, cwd=ROOT, pass_fds=[theirs.fileno()], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1 and "TypeError" in done.stderr
