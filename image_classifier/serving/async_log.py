"""Log lines written by a background thread, so that a pipe that nobody reads or a slow disk delays no request."""

from __future__ import annotations

import io
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_MAX_WAITING = 10_000  # lines; more are dropped
_STDERR_FD = 2
_FLUSH_S = 2.0  # how long `close` waits for the last lines


class AsyncLineWriter:
    """A thread that writes lines in order. A line that cannot be written is logged once and costs nothing else."""

    def __init__(self, name: str, write: Callable[[str], None]) -> None:
        self._name = name
        self._write = write
        self._waiting: queue.Queue[str | None] = queue.Queue(_MAX_WAITING)
        self._dropped = 0
        self._failed = False
        # A daemon: a line that blocks must not delay the end of the program.
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line, or drop it where too many wait."""
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait a short time until the queued lines are written."""
        if self._thread.is_alive():
            try:
                self._waiting.put(None, timeout=_FLUSH_S)
            except queue.Full:
                return
            self._thread.join(_FLUSH_S)

    def _loop(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                self._write(line)
            except (OSError, ValueError) as error:  # a closed stream raises ValueError
                if not self._failed:
                    reason = getattr(error, "strerror", None) or error
                    log.warning("%s: cannot write a line (%s)", self._name, reason)
                self._failed = True
                continue
            if self._dropped:
                log.warning("%s: %d lines were dropped because the queue was full", self._name, self._dropped)
            self._failed = False
            self._dropped = 0


class AsyncStream(io.TextIOBase):
    """A text stream that a thread writes to a file descriptor: for a standard error that nobody may be reading."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines = AsyncLineWriter("standard error", self._write_all)

    def write(self, text: str) -> int:
        """Queue the text."""
        self._lines.put(text)
        return len(text)

    def end(self) -> None:
        """Wait a short time until the queued text is written."""
        self._lines.close()

    def _write_all(self, text: str) -> None:
        content = memoryview(text.encode("utf-8", "backslashreplace"))
        # os.write bypasses Python's buffer, whose lock a blocked thread would hold for ever.
        while content:
            content = content[os.write(self._descriptor, content) :]


@contextmanager
def async_logging() -> Iterator[AsyncStream]:
    """Let a thread write what is logged to standard error while the block runs; yield the stream."""
    stream = AsyncStream(_STDERR_FD)
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    ]
    for handler in handlers:
        handler.setStream(stream)
    try:
        yield stream
    finally:
        for handler in handlers:
            handler.setStream(sys.stderr)
        stream.end()
