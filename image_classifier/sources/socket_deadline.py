"""A deadline for what goes over a socket: whoever is on its other side may drip as it likes, the time of one request is up when it is up."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType

_LOOK_S = 0.1  # seconds until the end of the run is noticed


class SocketDeadline:
    """While the block runs: cuts the connections that it was given when `total_s` seconds are over, or when the run `ended`."""

    def __init__(self, total_s: float, ended: threading.Event | None = None) -> None:
        self._end = time.monotonic() + total_s
        self._ended, self._done, self._lock = ended, threading.Event(), threading.Lock()
        self._held: list[socket.socket] = []
        self.bit = False

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
        """Watch this one too, which may yet have to connect and be wrapped in TLS; TimeoutError where it is too late."""
        held = socket.socket(
            fileno=os.dup(connection.fileno())
        )  # of its own: wrapping takes the number away from the other
        with self._lock:
            self._held.append(held)
        if self.bit:
            raise TimeoutError

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_S if self.bit else max(0.0, min(_LOOK_S, self._end - time.monotonic()))):
            if time.monotonic() >= self._end or (self._ended is not None and self._ended.is_set()):
                with self._lock:
                    self.bit = True
                    for held in self._held:
                        with suppress(OSError):  # not connected yet, or not any more
                            held.shutdown(socket.SHUT_RDWR)  # closing would not wake whoever waits for it
