"""Lines that are written beside the server's loop, so that a pipe that nobody reads or a slow disk stops no request."""

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

_MOST = 10_000  # that wait; more are left out
_STANDARD_ERROR = 2
_LAST_S = 2.0  # in which what waits at the end must be written


class AsyncLineWriter:
    """Hands lines to `write` in their order, in a thread of its own; what cannot be written is said once and costs nothing else."""

    def __init__(self, what: str, write: Callable[[str], None]) -> None:
        self._what, self._write = what, write
        self._waiting: queue.Queue[str | None] = queue.Queue(_MOST)
        self._left_out = 0
        self._failed = False
        self._thread = threading.Thread(
            target=self._loop, name=what, daemon=True
        )  # whoever holds up a line does not hold up the end
        self._thread.start()

    def put(self, line: str) -> None:
        """Let a line be written soon, or leave it out where too many wait."""
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Wait a little for what is still to be written."""
        if self._thread.is_alive():
            try:
                self._waiting.put(None, timeout=_LAST_S)
            except queue.Full:
                return
            self._thread.join(_LAST_S)

    def _loop(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                self._write(line)
            except (OSError, ValueError) as error:  # a closed stream is a ValueError
                if not self._failed:
                    log.warning(
                        "%s: a line cannot be written (%s)", self._what, getattr(error, "strerror", None) or error
                    )
                self._failed = True
                continue
            if self._left_out:
                log.warning("%s: %d lines were left out, as nobody took them", self._what, self._left_out)
            self._failed, self._left_out = False, 0


class AsyncStream(io.TextIOBase):
    """A stream whose text is written to a file descriptor by a thread: for a standard error that nobody may be reading."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines = AsyncLineWriter("standard error", self._write_all)

    def write(self, text: str) -> int:
        """Let it be written soon."""
        self._lines.put(text)
        return len(text)

    def end(self) -> None:
        """Wait a little for what is still to be written."""
        self._lines.close()

    def _write_all(self, text: str) -> None:
        content = memoryview(text.encode("utf-8", "backslashreplace"))
        while content:  # past Python's own buffer, whose lock a thread that is stuck would hold for ever
            content = content[os.write(self._descriptor, content) :]


@contextmanager
def async_logging() -> Iterator[AsyncStream]:
    """Let what is logged to standard error be written by a thread of its own while the block runs, and give that stream."""
    stream = AsyncStream(_STANDARD_ERROR)
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
