"""A time limit on everything that goes over a socket, however slowly the other side sends."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType

_POLL_S = 0.1  # seconds until the end of the run is noticed


class SocketDeadline:
    """Shuts the sockets it was given once `total_s` seconds are over, or once the run has `ended`."""

    def __init__(self, total_s: float, ended: threading.Event | None = None) -> None:
        self._end = time.monotonic() + total_s
        self._ended = ended
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._held: list[socket.socket] = []
        self.expired = False

    def __enter__(self) -> SocketDeadline:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        with self._lock:
            for held in self._held:
                held.close()
            self._held.clear()

    def hold(self, connection: socket.socket) -> None:
        """Watch a socket that may yet have to connect and be wrapped in TLS; TimeoutError if time is up already."""
        # A descriptor of its own: wrapping takes the number away from the other.
        held = socket.socket(fileno=os.dup(connection.fileno()))
        with self._lock:
            self._held.append(held)
        if self.expired:
            raise TimeoutError

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the end of time or run."""
        end = time.monotonic() + seconds
        while not self.expired and (left := end - time.monotonic()) > 0:
            time.sleep(min(_POLL_S, left))

    def _watch(self) -> None:
        while not self._done.wait(_POLL_S if self.expired else max(0.0, min(_POLL_S, self._end - time.monotonic()))):
            if time.monotonic() >= self._end or (self._ended is not None and self._ended.is_set()):
                with self._lock:
                    self.expired = True
                    for held in self._held:
                        with suppress(OSError):  # not connected yet, or no longer
                            held.shutdown(socket.SHUT_RDWR)  # closing would not wake a thread that waits for it
